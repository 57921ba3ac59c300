"""Checks of the figures' arguments: tables with their columns, dicts of tables, arrays of numbers."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from memdfa_lab.core.checks import check_type, lookup
from memdfa_lab.figures.style import FILLS, SETTINGS, STYLES

P = ParamSpec("P")
T = TypeVar("T")


def draws(names: str = "", numbers: str = "", each: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that draws its first argument: check its columns, and set matplotlib's settings.

    Args:
        names: The columns of names or groups that the table must have, separated by spaces. Rules must be in STYLES.
        numbers: The columns of numbers, likewise.
        each: Whether the first argument is a dict, label -> table, in place of a table.
    """

    def decorate(draw: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(draw)
        first = next(iter(signature.parameters))

        @wraps(draw)
        def checked(*args: P.args, **options: P.kwargs) -> T:
            tables = {first: signature.bind(*args, **options).arguments[first]} if names or numbers else {}
            if each:
                tables = {f"{first}[{label!r}]": table for label, table in check_dict(first, tables[first]).items()}
            for what, table in tables.items():
                require_columns(what, table, names.split(), numbers.split())
                for rule in table["rule"].unique() if "rule" in names.split() else ():
                    lookup("rule", rule, STYLES)
            with plt.rc_context(SETTINGS):
                return draw(*args, **options)

        return checked

    return decorate


def require_columns(what: str, table: Any, names: list[str], numbers: list[str]) -> None:
    """Check that a table has a row, the columns `names` and `numbers`, and numbers in the latter; `what` is its name.

    Raises TypeError if it is not a pandas table, ValueError otherwise.
    """
    columns = [*dict.fromkeys([*names, *numbers])]
    check_type(what, table, pd.DataFrame, f"a pandas table with the columns {', '.join(columns)}")
    if lacking := [name for name in columns if name not in table]:
        there = ", ".join(map(str, table)) or "none"
        raise ValueError(f"{what} lacks {', '.join(lacking)}: it needs {', '.join(columns)} (there are: {there})")
    if not len(table):
        raise ValueError(f"{what} has no row, so there is nothing to draw: it needs one or more")
    for name in (name for name in numbers if not is_numeric_dtype(table[name])):
        for text in (value for value in table[name] if isinstance(value, str)):
            raise ValueError(f"column {name} of {what} must have numbers, got {text!r}")


def categories_in(what: str, table: pd.DataFrame) -> list[str]:
    """Return the categories of memory that are columns of the table. Raises ValueError if there are none."""
    found = [name for name in FILLS if name in table]
    if not found:
        raise ValueError(f"{what} lacks columns: it needs one or more of {', '.join(FILLS)}")
    require_columns(what, table, [], found)
    return found


def check_dict(what: str, things: Any) -> Mapping[str, Any]:
    """Return the dict, label -> what is drawn. Raises TypeError if it is not a dict, ValueError if it is empty."""
    check_type(what, things, Mapping, "a dict, label -> what is drawn")
    if not things:
        raise ValueError(f"{what} is empty, so there is nothing to draw: it needs one label or more")
    return things


def check_array(what: str, values: Any, *sizes: str) -> np.ndarray:
    """Return the values as an array of these dimensions. Raises ValueError if they are not, or are empty."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim != len(sizes) or not array.size:
        given = f"a {type(values).__name__} of shape {array.shape}"
        raise ValueError(f"{what} must be an array ({', '.join(sizes)}) of one number or more, got {given}")
    return array
