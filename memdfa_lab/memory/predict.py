"""What a step would hold, without running it: the same step on tensors that have a shape and no data.

On torch's meta device each operation runs for its shapes alone. The rule, the blocks and the optimizer are the real
ones, under the same ledger as a real step, so prediction and measurement cannot drift apart. (torch's FakeTensorMode
gives the same events and takes seven times as long.)
"""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core import rules
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.compat import (
    DEVICE_LISTS,
    TRUTH_VALUE,
    DispatchMode,
    aten,
    convolution_layout,
    storage_id,
    without_modes,
)
from memdfa_lab.core.contract import tensors_in
from memdfa_lab.core.local import block_gradient
from memdfa_lab.memory import autocast as autocast  # which puts itself into core
from memdfa_lab.memory.ledger import Ledger, measure
from memdfa_lab.memory.trace import Trace

META = torch.device("meta")
ONE_AT_A_TIME = RLock()  # what is patched is shared by all threads
MOST_SEEN = 2_000  # operations whose output is remembered
REDUCED = (  # the CPU allocates the terms of these sums, and shrinks that memory to the scalar
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
)
MakeAgain = Callable[[Any, Any], Any]  # makes an operation's output, from its args and kwargs
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
    steps: int = 1,
    **options: Any,
) -> Trace:
    """Return what `measure` would return for this rule, network and batch; nothing is computed or allocated.

    `rule`: a name, such as "memdfa", or a class. `network`: a model, which is not touched, or a function that makes
    one, so that it need not exist: `lambda: ml.models.mlp(784, [800] * 1000, 10)`. `x_shape`: (N, ...). x is of
    `x_dtype`, the weights' if not given; words are torch.long. `optimizer`: SGD with learning rate 0.1 if not given. y
    is N whole-number labels, or floats of `y_shape` if given.
    `options` go to the rule. It is a step in the steady state, `measure(..., warm_up=1)`: what a first step leaves
    behind, the optimizer's state and stored feedback, is in memory already. With `steps=0` it is that alone, and no
    step.

    Raises TypeError if the network is neither a model nor a function that makes one; ValueError for an unknown rule, a
    shape that is none, and what the rule raises.

    Known limits: attention, Mish, convolutions of which only the bias learns, and Adam(foreach=True) run other
    operations without data, and differ; so do layers that enlarge channels-last images of 1 x 1.
    """
    if not isinstance(x_shape, Sequence) or not x_shape:
        raise ValueError(f"x_shape must be the shape of a batch (N, ...), such as (128, 784), got {x_shape!r}")
    for size in x_shape:
        check_int("a size in x_shape", size)
    kind: Any = rules.find_rule(rule) if isinstance(rule, str) else rule
    shapes = _ShapesAlone()
    with ONE_AT_A_TIME, ExitStack() as stack:
        for name in DEVICE_LISTS:
            stack.enter_context(mock.patch(name, return_value=["cpu", "cuda", "meta"]))
        stack.enter_context(without_collection())
        with shapes:
            model = _without_data(network)
            dtype = next(model.parameters()).dtype
            x = torch.empty(x_shape, dtype=x_dtype or dtype)
            y = torch.empty(x_shape[0], dtype=torch.long) if y_shape is None else torch.empty(y_shape, dtype=dtype)
            factory = optimizer or partial(torch.optim.SGD, lr=0.1)
            learner = kind(model, optimizer=factory, loss_fn=loss_fn, feedback=copy.deepcopy(feedback), **options)
            if steps == 0:
                return measure(learner, x, y, steps=0, warm_up=1)
        try:
            trace = measure(learner, x, y, steps=steps, run=shapes.run)
        except ValueError as problem:
            if y_shape is None and str(problem).startswith("the loss does not take"):
                raise ValueError(f"{problem}; for a y that is no labels, say its y_shape, such as (N, C)") from problem
            raise
        return trace if trace.end_bytes == 0 else measure(learner, x, y, steps=steps, run=shapes.run)


def kept_bytes(blocks: nn.Sequential, x: Tensor) -> list[int]:
    """Return, block by block, how many bytes a forward pass on x (N, ...) keeps for the gradients."""
    sizes = []
    with without_modes(), _ShapesAlone() as shapes:
        h = torch.empty(x.shape, dtype=x.dtype)
        for block in _without_data(blocks).children():
            with Ledger(run=shapes.run) as ledger:
                gradient = block_gradient(block, h)
                h = gradient.forward()
                sizes.append(ledger.trace().end_bytes)
    return sizes


rules.kept_bytes = kept_bytes


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage within: the many small objects of a prediction are none, and looking at them takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _ShapesAlone(DispatchMode):
    """Run operations for their shapes alone, on the meta device, and answer each question about a value with 1.

    An operation's output follows from the shapes of its inputs, and blocks are often alike, as are predictions that
    follow one another. So an output that has been worked out once is made again without the operation.
    """

    seen: ClassVar[dict[Any, MakeAgain]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the output of func(*args, **kwargs), without data."""
        if func is TRUTH_VALUE:  # `if torch.isfinite(x):`, but there is no x
            return 1
        if func.is_view:
            return _on_meta(func, args, kwargs)
        key = (func, _shapes(args), _shapes(kwargs), torch.get_default_dtype())
        make_again = self.seen.get(key)
        if make_again is not None:
            return make_again(args, kwargs)
        out = _on_meta(func, args, kwargs)
        make_again = None if torch.Tag.inplace_view in func.tags else _recipe(out, args, kwargs)
        if make_again is not None and key[1:3] == (_shapes(args), _shapes(kwargs)):  # out=... may be resized
            if len(self.seen) >= MOST_SEEN:
                self.seen.clear()
            self.seen[key] = make_again
        return out


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the meta device, and correct what comes out there in another way than on the CPU."""
    if func is aten.lift_fresh.default:  # torch.tensor(1.0)
        return torch.empty_like(args[0], device=META)
    out = func(*args, **({**kwargs, "device": META} if "device" in kwargs else kwargs))
    if func is aten.convolution.default:
        both = [value.float() if value.dim() == 4 else value for value in args[:2]]  # images of any precision
        return torch.empty_like(out, memory_format=convolution_layout(*both))
    if func in REDUCED and not out.dim():
        return torch.empty_like(args[0]).resize_(())
    if func is aten.native_batch_norm.default:  # the precision of mean and deviation, which eval mode does not have
        dtype = next(value.dtype for value in (args[1], args[3], args[0]) if value is not None)
        return out[0], *[value[: None if args[5] else 0].to(dtype, copy=True) for value in out[1:]]
    if func is aten.native_group_norm.default and args[1] is not None:
        return out[0], *[value.to(args[1].dtype) for value in out[1:]]
    if func is aten.native_group_norm_backward.default and out[0] is not None:
        return out[0].to(args[1].dtype), *out[1:]
    if func is aten.native_batch_norm_backward.default:  # gradients that were not asked for
        return tuple(part if wanted else None for part, wanted in zip(out, args[-1], strict=True))
    return out


def _shapes(value: Any) -> Any:
    """Return all that an operation without data can know of an argument."""
    kind = type(value)
    if issubclass(kind, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if kind is tuple or kind is list:
        return tuple([_shapes(item) for item in value])
    if kind is dict:
        return tuple([(name, _shapes(item)) for name, item in value.items()])
    return None if kind is torch.Generator else (kind, value)  # the kind, since 1 == 1.0 == True


def _recipe(out: Any, args: Any, kwargs: Any) -> MakeAgain | None:
    """Return how to make the output for other arguments of these shapes; None if only the operation can."""
    if out is None:
        return lambda args, kwargs: None
    if isinstance(out, (list, tuple)):
        kind: Any = type(out)
        parts: list[Any] = [_recipe(part, args, kwargs) for part in out]
        return None if None in parts else lambda args, kwargs: kind([part(args, kwargs) for part in parts])
    given = {**dict(enumerate(args)), **kwargs}
    for place in [place for place, value in given.items() if value is out]:  # in place, or into out=...
        return lambda args, kwargs: (args if isinstance(place, int) else kwargs)[place]
    if not isinstance(out, Tensor) or storage_id(out) in map(storage_id, tensors_in(given)):
        return None
    anew = partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device=out.device)
    alike = anew().untyped_storage().nbytes() == out.untyped_storage().nbytes()
    return (lambda args, kwargs: anew()) if alike else None


def _without_data(network: Network) -> nn.Module:
    """Return a copy of a model whose tensors have no data, or the model that a function makes."""
    if not isinstance(network, nn.Module):
        model = network() if callable(network) else network
        if not isinstance(model, nn.Module):
            raise TypeError(
                "network must be a model, or a function that makes one, such as "
                f"lambda: ml.models.build('fc_relu'); got {model!r}"
            )
        return model
    # deepcopy takes what its memo has: tensors made beforehand, so that no data are copied.
    memo: dict[int, Any] = {}
    plain = [value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in (*network.parameters(), *network.buffers(), *plain):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    return copy.deepcopy(network, memo)
