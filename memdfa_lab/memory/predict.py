"""The memory of a step without computing it: the same step runs on tensors that have a shape and no data.

The rule, the blocks and the optimizer are the real ones, under the same ledger as a real step, so that prediction and
measurement cannot drift apart.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core import rules
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.local import block_gradient
from memdfa_lab.core.packing import Packing
from memdfa_lab.core.watcher import unwatched
from memdfa_lab.memory.ledger import Ledger, measure
from memdfa_lab.memory.shapes import ShapesAlone
from memdfa_lab.memory.trace import Trace

Network = nn.Module | Callable[[], nn.Module]


def predict(
    rule: Any,
    network: Network,
    x_shape: tuple[int, ...],
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    feedback: Any = None,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    x_dtype: torch.dtype | None = None,
    y_shape: tuple[int, ...] | None = None,
    y_dtype: torch.dtype | None = None,
    steps: int = 1,
    **options: Any,
) -> Trace:
    """Return what `measure` would return for this rule, network and batch; nothing is computed or allocated.

    `rule`: a name, such as "memdfa", or a class. `network`: a model, which is not changed, or a function that makes
    one without memory: `lambda: ml.models.mlp(784, [800] * 1000, 10)`. `x_shape`: (N, ...). `x_dtype`: default, the
    weights' dtype; words are torch.long. `optimizer`: default, SGD with learning rate 0.1. y is N whole-number labels
    or, with `y_shape`, a tensor of that shape and of `y_dtype` (default: the weights' dtype; labels of words and pixels
    are torch.long).

    `options` go to the rule. The step is one in the steady state, as in `measure(..., warm_up=1)`: the optimizer's
    state and stored feedback, which a first step makes, are in memory already. With `steps=0` the trace has these only.

    Raises TypeError if the network is neither a model nor a function that makes one; ValueError for an unknown rule or
    a bad shape; and what the rule raises.
    """
    if not isinstance(x_shape, Sequence) or not x_shape:
        raise ValueError(f"x_shape must be the shape of a batch (N, ...), such as (128, 784), got {x_shape!r}")
    for size in x_shape:
        check_int("a size in x_shape", size)
    kind: Any = rules.find_rule(rule) if isinstance(rule, str) else rule
    shapes = ShapesAlone()
    feedback = copy.deepcopy(feedback)
    with without_collection(), _with_hints(y_shape is None):
        model = without_data(network)
        torch.optim.SGD([torch.zeros(1)])  # in older releases the first optimizer imports modules that run operations
        with shapes:
            dtype = next(model.parameters()).dtype
            x = torch.empty(x_shape, dtype=x_dtype or dtype)
            labels = torch.long if y_shape is None else dtype
            y = torch.empty(y_shape or x_shape[:1], dtype=y_dtype or labels)
            factory = optimizer or partial(torch.optim.SGD, lr=0.1)
            learner = kind(model, optimizer=factory, loss_fn=loss_fn, feedback=feedback, **options)
            if steps == 0:
                return measure(learner, x, y, steps=0, warm_up=1)
        trace = measure(learner, x, y, steps=steps, run=shapes.watch)
        steady = trace.end_bytes == 0 and not getattr(learner, "prepares", False)
        return trace if steady else measure(learner, x, y, steps=steps, run=shapes.watch)


def kept_bytes(blocks: nn.Sequential, x: Tensor, packing: Packing | None = None) -> list[int]:
    """Return, for each block, by how many bytes memory grows when a forward pass on x (N, ...) keeps that block, too.

    With packing, an output stays exact until the next block has run on it; that block's growth may be negative.
    """
    sizes: list[int] = []
    shapes, kept, seen = ShapesAlone(), [], 0
    gradient = packing.block if packing else block_gradient
    with unwatched():
        alike = without_data(blocks)
        with shapes:
            h = torch.empty(x.shape, dtype=x.dtype)
        with Ledger(run=shapes.watch) as ledger:
            for block in alike.children():
                kept.append(gradient(block, h))
                h = kept[-1].forward()
                sizes.append(sum(event.change_bytes for event in ledger.events[seen:]))
                seen = len(ledger.events)
    return sizes


rules.kept_bytes = kept_bytes


@contextmanager
def without_collection() -> Iterator[None]:
    """Switch Python's garbage collection off within: a prediction makes many small objects, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _with_hints(y_is_labels: bool) -> Iterator[None]:
    """Add a hint to errors within that come from tensors without data."""
    try:
        yield
    except ValueError as problem:
        if y_is_labels and str(problem).startswith("the loss does not take"):
            raise ValueError(
                f"{problem}; for a y that is no labels, say its y_shape, such as (N, C), and its y_dtype"
            ) from problem
        raise
    except (ZeroDivisionError, NotImplementedError) as problem:
        why = " ".join(str(problem).split())[:100]
        hint = "use ml.memory.measure on a batch that fits"
        raise ValueError(f"the step depends on a value, and a prediction has none ({why}): {hint}") from problem
    except RuntimeError as problem:
        if "scalar types: Long, Int" not in str(problem):
            raise
        hint = "for inputs of whole numbers, such as words, say x_dtype=torch.long"
        raise ValueError(f"the network does not take floats: {hint} ({problem})") from problem


def without_data(network: Network) -> nn.Module:
    """Return a copy of a model, or the model that a function makes, with tensors that have no data."""
    with ShapesAlone(truth=0):
        if isinstance(network, nn.Module):
            return _copy_without_data(network)
        model = network() if callable(network) else network
    if not isinstance(model, nn.Module):
        raise TypeError(
            "network must be a model, or a function that makes one, such as "
            f"lambda: ml.models.build('fc_relu'); got {model!r}"
        )
    return model


def _copy_without_data(network: nn.Module) -> nn.Module:
    # deepcopy takes the tensors in its memo, which are made beforehand, so that no data is copied.
    memo: dict[int, Any] = {}
    plain = [value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in (*network.parameters(), *network.buffers(), *plain):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    return copy.deepcopy(network, memo)
