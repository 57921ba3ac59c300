"""Networks of the user: those that a function returns, which is named MODULE:FUNCTION."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

SHAPE = r"\d+(?:x\d+)*"
SPELLING = re.compile(rf"([\w.]+):(\w+)(?:@({SHAPE}))?")
EXAMPLE = "torchvision.models:alexnet@3x224x224"


def find(name: str) -> tuple[Callable[[], Any], tuple[int, ...]]:
    """Return the function of a name such as torchvision.models:alexnet@3x224x224, and the shape of one example.

    The shape is () where the name has none. The module may be a file in the current folder. Raises ValueError for
    another spelling, a module that cannot be imported, and a function that is not there or takes arguments.
    """
    spelt = SPELLING.fullmatch(name)
    if spelt is None:
        raise ValueError(f"a model is named MODULE:FUNCTION, or MODULE:FUNCTION@SHAPE, such as {EXAMPLE}; got {name!r}")
    module, function, shape = spelt.groups("")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = vars(importlib.import_module(module))
    except Exception as problem:  # a module's own code may raise anything
        raise ValueError(f"{name}: cannot import {module}: {type(problem).__name__}: {problem}") from problem
    if not callable(found.get(function)):
        near = difflib.get_close_matches(function, [key for key, value in found.items() if callable(value)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {module} has no function {function!r}{hint}")
    try:
        inspect.signature(found[function]).bind()
    except (TypeError, ValueError) as problem:
        why = f"{problem}; write a function without arguments that returns the model"
        raise ValueError(f"{name}: {function} cannot be called without arguments: {why}") from problem
    return found[function], shape_of(shape)


def shape_of(text: str) -> tuple[int, ...]:
    """Return the shape that 3x224x224 spells, () for no text. Raises ValueError for another spelling."""
    if text and not re.fullmatch(SHAPE, text):
        raise ValueError(f"a shape is written as in 3x224x224, got {text!r}")
    return tuple(map(int, text.split("x"))) if text else ()
