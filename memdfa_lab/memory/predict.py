"""What a step would hold, without running it: the same step on tensors that have a shape and no data.

On torch's meta device each operation runs for its shapes alone. The rule, the blocks and the optimizer are the real
ones, under the same ledger as a real step, so that prediction and measurement cannot drift apart. (torch's
FakeTensorMode gives the same events, and takes longer.)
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
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memdfa_lab.core.checks import known, whole
from memdfa_lab.memory.ledger import Ledger, address, measure, tensors_in
from memdfa_lab.memory.trace import Trace

META = torch.device("meta")
ONE_AT_A_TIME = RLock()  # what is patched is every thread's
MOST_SEEN = 2_000  # operations of which is remembered what comes out
aten = torch.ops.aten
native: Any = torch._C  # its stubs lack some of it
# What torch has for some devices alone, the CPU among them: clipping many tensors at once, Adam(fused=True).
BY_DEVICE = (
    "torch.utils._foreach_utils._get_foreach_kernels_supported_devices",
    "torch.optim.optimizer._get_fused_kernels_supported_devices",
)
REDUCED = (  # the CPU's scalar lies where the terms of its sum were
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
)
Again = Callable[[Any, Any], Any]  # an operation's output, from its args and kwargs
Network = nn.Module | str | Callable[[], nn.Module]


def predict(
    rule: Any,
    network: Network,
    x_shape: tuple[int, ...],
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    feedback: Any = None,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    y_shape: tuple[int, ...] | None = None,
    steps: int = 1,
    **options: Any,
) -> Trace:
    """Return what `measure` would return for this rule, network and batch; nothing is computed, nothing allocated.

    `rule`: a name or a class. `network`: a model, which is not touched; a name of `ml.models`; or a callable that
    makes one, so that it need not exist: `lambda: ml.models.mlp(784, [800] * 1000, 10)`. `x_shape`: (N, ...), floats.
    `optimizer`: SGD with learning rate 0.1 if not given. Labels are N classes, or floats of `y_shape` if given.
    `options` go to the rule. It is a step in the steady state, `measure(..., warm_up=1)`: what a first step leaves
    behind, the optimizer's state and stored feedback, is there already. With `steps=0` it is what rests, and no step.

    Known limits: attention, Mish, convolutions of which only the bias learns, and Adam(foreach=True) take other ways
    without data, and differ.
    """
    if not isinstance(x_shape, Sequence) or not x_shape:
        raise ValueError(f"x_shape must be the shape of a batch (N, ...), such as (128, 784), got {x_shape!r}")
    for size in x_shape:
        whole("a size in x_shape", size)
    shapes = _ShapesAlone()
    with ONE_AT_A_TIME, ExitStack() as stack:
        for name in BY_DEVICE:
            stack.enter_context(mock.patch(name, return_value=["cpu", "cuda", "meta"]))
        stack.enter_context(without_collection())
        with shapes:
            model = _without_data(network)
            dtype = next(model.parameters()).dtype
            x = torch.empty(x_shape, dtype=dtype)
            y = torch.empty(x_shape[0], dtype=torch.long) if y_shape is None else torch.empty(y_shape, dtype=dtype)
            make = optimizer or partial(torch.optim.SGD, lr=0.1)
            made = _class_of(rule)(model, optimizer=make, loss_fn=loss_fn, feedback=copy.deepcopy(feedback), **options)
            if steps == 0:
                return measure(made, x, y, steps=0, warm_up=1)
        trace = measure(made, x, y, steps=steps, run=shapes.run)
        return trace if trace.end_bytes == 0 else measure(made, x, y, steps=steps, run=shapes.run)


def kept_bytes(run: Callable[[nn.Module, Tensor], Any], blocks: nn.Sequential, x: Tensor) -> list[int]:
    """Return, block by block, how many bytes there are more while the result of `run(block, h)` is held.

    Nothing is computed; the result's `out` is the next block's h.
    """
    sizes = []
    with _disable_current_modes(), _ShapesAlone() as shapes:
        h = torch.empty(x.shape, dtype=x.dtype)
        for block in _without_data(blocks).children():
            with Ledger(run=shapes.run) as ledger:
                result = run(block, h)
                sizes.append(ledger.trace().end_bytes)
            h = result.out
    return sizes


@contextmanager
def without_collection() -> Iterator[None]:
    """Look for garbage later: among the many small objects of a prediction is none, and looking takes its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _ShapesAlone(TorchDispatchMode):
    """Run operations for the shapes alone, on the meta device, and answer each question about a value with 1.

    What comes out follows from the shapes that go in, and blocks are often alike, as predictions are that follow one
    another: nothing is worked out twice.
    """

    seen: ClassVar[dict[Any, Again]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return func(*args, **kwargs) without data."""
        if func is aten._local_scalar_dense.default:  # `if torch.isfinite(x):`, but there is no x
            return 1
        if func.is_view:
            return _on_meta(func, args, kwargs)
        key = (func, _shapes(args), _shapes(kwargs), torch.get_default_dtype())
        again = self.seen.get(key)
        if again is not None:
            return again(args, kwargs)
        out = _on_meta(func, args, kwargs)
        again = None if torch.Tag.inplace_view in func.tags else _again(out, args, kwargs)
        if again is not None and key[1:3] == (_shapes(args), _shapes(kwargs)):  # out=... may be resized
            if len(self.seen) >= MOST_SEEN:
                self.seen.clear()
            self.seen[key] = again
        return out


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the meta device; what comes out there in another way than on the CPU is mended."""
    if func is aten.lift_fresh.default:  # torch.tensor(1.0)
        return torch.empty_like(args[0], device=META)
    out = func(*args, **({**kwargs, "device": META} if "device" in kwargs else kwargs))
    if func is aten.convolution.default:  # the layout
        both = [value.float() if value.dim() == 4 else value for value in args[:2]]  # images: whatever their precision
        layout = native._conv_determine_backend_memory_format(*both, native._ConvBackend.Mkldnn)
        return torch.empty_like(out, memory_format=layout)
    if func in REDUCED and not out.dim():
        return torch.empty_like(args[0]).resize_(())
    if func is aten.native_batch_norm.default:  # the precision of mean and deviation; none in eval mode
        dtype = next(value.dtype for value in (args[1], args[3], args[0]) if value is not None)
        return out[0], *[value[: None if args[5] else 0].to(dtype, copy=True) for value in out[1:]]
    if func is aten.native_batch_norm_backward.default:  # gradients that nobody asked for
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


def _again(out: Any, args: Any, kwargs: Any) -> Again | None:
    """Return how to make the output for other arguments of these shapes; None if only the operation can."""
    if out is None:
        return lambda args, kwargs: None
    if isinstance(out, (list, tuple)):
        kind: Any = type(out)
        parts: list[Any] = [_again(part, args, kwargs) for part in out]
        return None if None in parts else lambda args, kwargs: kind([part(args, kwargs) for part in parts])
    given = {**dict(enumerate(args)), **kwargs}
    for place in [place for place, value in given.items() if value is out]:  # in place, or into out=...
        return lambda args, kwargs: (args if isinstance(place, int) else kwargs)[place]
    if not isinstance(out, Tensor) or address(out) in map(address, tensors_in(given)):
        return None
    anew = partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device=out.device)
    alike = anew().untyped_storage().nbytes() == out.untyped_storage().nbytes()
    return (lambda args, kwargs: anew()) if alike else None


def _class_of(rule: Any) -> Any:
    if not isinstance(rule, str):
        return rule
    import memdfa_lab  # by name only: nothing here knows what a rule does

    return known("rule", rule, {**memdfa_lab.RULES, **memdfa_lab.BASELINES})


def _without_data(network: Network) -> nn.Module:
    if isinstance(network, str):
        from memdfa_lab.lab import models

        return models.build(network)
    if not isinstance(network, nn.Module):
        model = network() if callable(network) else network
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"network must be a model, a name of ml.models, or a callable that makes one; got {model!r}"
            )
        return model
    # The copy's tensors are made beforehand: deepcopy finds them in its memory, and copies no data.
    memory: dict[int, Any] = {}
    plain = [value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in (*network.parameters(), *network.buffers(), *plain):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        made = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        memory[id(tensor)] = made
    return copy.deepcopy(network, memory)
