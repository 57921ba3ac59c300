"""A model's operations in the order in which they run, traced by torch.fx; the model is left as it was."""

import operator
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from memdfa_lab.core.compat import ANY_BATCH_NORM, has_hooks, is_causal_mask
from memdfa_lab.core.devices import CPU
from memdfa_lab.core.generators import drawn, hold, states

WAYS_OUT = (
    "pass a list of modules, or put that code into a module of an nn.ModuleList, which then stays whole, or into a "
    "function that is given to torch.fx.wrap"
)
CREATIONS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "zeros")
fx.wrap("is_causal_mask")


class Untraceable(TypeError):
    """A model that torch.fx cannot trace; `inside`: the modules that ran when it stopped, the outer one first."""

    def __init__(self, model: nn.Module, why: str, inside: Sequence[nn.Module] = ()):
        super().__init__(f"{type(model).__name__} cannot be traced: {why}; {WAYS_OUT}")
        self.inside = inside


def operations(model: nn.Module, closed: Callable[[nn.Module], bool]) -> list[fx.Node]:
    """Return the operations of a model: the input first, the output last.

    `closed` tells which modules count as one operation; torch's own modules do, too. Arguments of the model after the
    first have their defaults.

    Raises Untraceable with the line of the user's code that stops tracing; TypeError if the output is not one tensor.
    """
    root = nn.Sequential(model)  # it has one input
    tracer = _Tracer(lambda m: m is not model and (closed(m) or has_hooks(m)))
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device(CPU))
    restore_generators, generators = hold(device), states(device)
    try:
        with _traced_creations():
            graph = tracer.trace(root)
    except Exception as problem:  # of any type: the user's code meets placeholders in place of values
        raise Untraceable(model, _where(problem), tracer.running) from problem
    finally:
        changed = [key for held, old in before for key in held.keys() | old if held.get(key) is not old.get(key)]
        for held, old in before:
            held.clear()
            held.update(old)
        if drawn(generators, states(device)):
            changed.append("random numbers that do not depend on x")
            restore_generators()
    graph.owning_module, nodes = root, list(graph.nodes)  # type: ignore[assignment]  # its targets are in any module
    changed += [str(node.args[0]) for node in nodes if in_place(node) and node.all_input_nodes[0].op == "get_attr"]
    if changed:
        raise Untraceable(model, f"each run sets or draws {changed[0]}")
    if not isinstance(nodes[-1].args[0], fx.Node):
        kind = type(nodes[-1].args[0]).__name__.removeprefix("immutable_")
        name = type(model).__name__
        raise TypeError(f"{name} returns a {kind}, not one tensor: switch its other outputs off, or wrap it")
    return nodes


def held(node: fx.Node) -> Any:
    """Return the module that a node calls, or the tensor that it stands for."""
    return operator.attrgetter(str(node.target))(node.graph.owning_module)


def called(node: fx.Node) -> str:
    """Return the name of the function that a node calls; "" if it calls none."""
    return str(getattr(node.target, "__name__", node.target)) if node.op in ("call_function", "call_method") else ""


def in_place(node: fx.Node) -> bool:
    """Tell whether a node changes its first input."""
    if node.op == "call_module":
        return bool(getattr(held(node), "inplace", False))
    return bool(node.all_input_nodes) and bool(re.search("[^_]_$", called(node)) or node.kwargs.get("inplace"))


def running(node: fx.Node) -> set[str]:
    """Return the paths in the model of the modules that run this node."""
    return {path.partition(".")[2] for path, _ in node.meta["nn_module_stack"].values()}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, closed: Callable[[nn.Module], bool]):
        super().__init__()
        self.closed = closed
        self.running: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.TransformerEncoder, nn.ModuleDict)):  # of torch, but with layers of the user's
            return self.closed(m)
        changed = isinstance(m, ANY_BATCH_NORM)  # of any class: its statistics are
        return changed or self.closed(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.running.append(m)
        if type(m) is nn.TransformerEncoder:  # its forward depends on values, to run faster on padded words
            forward = partial(_encode, m)
        out = super().call_module(m, forward, args, kwargs)
        self.running.pop()
        return out


@contextmanager
def _traced_creations() -> Iterator[None]:
    """Let functions that create a tensor of a given size be traced; older releases of torch refuse traced sizes."""

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given: list[Any] = []
            fx.node.map_aggregate((args, kwargs), given.append)
            size = next((value for value in given if isinstance(value, fx.Proxy)), None)
            if size is None:
                return function(*args, **kwargs)
            return size.tracer.create_proxy("call_function", function, args, kwargs)

        return recorded

    before = {name: getattr(torch, name) for name in CREATIONS}
    try:
        for name, function in before.items():
            setattr(torch, name, traced(function))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _encode(m: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, **more: Any) -> Any:
    is_causal = more.get("is_causal")
    if is_causal is None:
        is_causal = False if mask is None else is_causal_mask(mask)
    for layer in m.layers:
        src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
    return src if m.norm is None else m.norm(src)


def _where(problem: Exception) -> str:
    """Return the line of the user's code that stopped tracing, and why."""
    why = " ".join(str(problem).split())[:120]
    of_others = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")
    own = [frame for frame in traceback.extract_tb(problem.__traceback__) if not frame.filename.startswith(of_others)]
    return f"`{own[-1].line}` ({own[-1].filename}, line {own[-1].lineno}): {why}" if own else why
