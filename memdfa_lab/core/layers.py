"""The layers after a block's weight layer, each with the function that takes a signal back through it.

Each keeps the least that its backward function needs: an activation its output, from which its slope follows;
max-pooling the indices; BatchNorm its input.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.compat import aten, check_input_dim
from memdfa_lab.core.phases import label

# The signal at a layer's output, for a slice of the outputs -> the signal at its input. It may work in place.
Backward = Callable[[Tensor, slice], Tensor]
# (a tensor that a backward function reads, an upper bound if it has whole numbers) -> (slice -> those outputs of it).
Hold = Callable[..., Callable[[slice], Tensor]]
# Module, input, whether the input's memory may be reused, how to hold what is read back -> output, backward function.
Layer = Callable[[Any, Tensor, bool, Hold], tuple[Tensor, Backward]]
Settings = Callable[[Any], tuple[Any, ...]]


def as_it_is(t: Tensor, below: int = 0) -> Callable[[slice], Tensor]:
    """Hold a tensor (N, ...) as it is."""
    return lambda outputs: t[:, outputs]


def run(layers: Iterable[nn.Module], h: Tensor, hold: Hold = as_it_is) -> tuple[Tensor, list[Backward]]:
    """Run the layers on h (N, ...), which they may change; return their output and the backward functions, in order.

    A backward function takes the signal for a slice of the outputs; after a convolution the slice must be all of them.
    """
    ways_back: list[Backward] = []
    reusable = True  # only an activation's backward function reads its output: other outputs may be overwritten
    for layer in layers:
        h, backward = LAYERS[type(layer)](layer, h, reusable, hold)
        ways_back.insert(0, backward)
        reusable = type(layer) not in ACTIVATIONS and (reusable or type(layer) not in VIEWS)
    return h, ways_back


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient; an empty one, if it has none yet."""
    if parameter.grad is None:
        parameter.grad = label("gradients", torch.empty_like(parameter))
    return parameter.grad


def _elementwise(f: Any, in_place: Any, slope: Any, given: Settings = lambda m: (), for_slope: Any = None) -> Layer:
    """Return an activation whose slope follows from its output.

    `given` and `for_slope` return the settings of the module that f and its slope take as further arguments.
    """

    def layer(m: Any, h: Tensor, reusable: bool, hold: Hold) -> tuple[Tensor, Backward]:
        out, more = (in_place if reusable else f)(h, *given(m)), (for_slope or given)(m)
        read = hold(out)
        return out, lambda s, outputs: slope.grad_input(s, read(outputs), *more, grad_input=s)

    return layer


def _gelu(m: Any, h: Tensor, reusable: bool, hold: Hold) -> tuple[Tensor, Backward]:
    # Two inputs have the same output, so the slope does not follow from it: the input stays in memory, too.
    how, read = {"approximate": m.approximate}, hold(h)
    return F.gelu(h, **how), lambda s, outputs: aten.gelu_backward.grad_input(s, read(outputs), **how, grad_input=s)


def _batch_norm(m: Any, h: Tensor, reusable: bool, hold: Hold) -> tuple[Tensor, Backward]:
    check_input_dim(m, h)
    counted = m.training and m.track_running_stats
    if counted:
        m.num_batches_tracked.add_(1)
    momentum = m.momentum if m.momentum is not None else 1.0 / float(m.num_batches_tracked) if counted else 0.0
    of_batch = m.training or m.running_mean is None
    running = (m.running_mean, m.running_var) if counted or not of_batch else (None, None)
    if of_batch and h.numel() == h.shape[1]:
        raise ValueError(f"BatchNorm in training mode needs more than one value a channel, got {tuple(h.shape)}")
    out, mean, invstd = aten.native_batch_norm(h, m.weight, m.bias, *running, of_batch, momentum, m.eps)

    def backward(s: Tensor, outputs: slice) -> Tensor:
        vectors = (m.weight, *running, mean, invstd)
        sliced = [None if v is None else v[outputs] if v.numel() else v for v in vectors]
        wanted = [True, m.weight is not None, m.bias is not None]
        # h is not held by `hold`: its rounding errors, divided by a small deviation, would be large.
        s, dw, db = aten.native_batch_norm_backward(s, h[:, outputs], *sliced, of_batch, m.eps, wanted)
        for parameter, gradient in ((m.weight, dw), (m.bias, db)):
            if parameter is not None and parameter.requires_grad:
                gradient_of(parameter)[outputs] = gradient
        return s

    return out, backward


def _max_pool(m: Any, h: Tensor, reusable: bool, hold: Hold) -> tuple[Tensor, Backward]:
    settings = (*map(_pair, (m.kernel_size, m.stride, m.padding, m.dilation)), m.ceil_mode)
    out, indices = aten.max_pool2d_with_indices(h, *settings)
    return out, _unpool(aten.max_pool2d_with_indices_backward, h, settings, hold(indices, h[0, 0].numel()))


def _avg_pool(m: Any, h: Tensor, reusable: bool, hold: Hold) -> tuple[Tensor, Backward]:
    sizes = map(_pair, (m.kernel_size, m.stride, m.padding))
    settings = (*sizes, m.ceil_mode, m.count_include_pad, m.divisor_override)
    return aten.avg_pool2d(h, *settings), _unpool(aten.avg_pool2d_backward, h, settings)


def _unpool(pool_backward: Any, h: Tensor, settings: tuple[Any, ...], indices: Any = None) -> Backward:
    empty = _empty_like(h)

    def backward(s: Tensor, outputs: slice) -> Tensor:
        into = empty()  # pooling's backward function reads only the shape and layout of its input
        more = (indices(outputs),) if indices else ()
        pool_backward.grad_input(s, into, *settings, *more, grad_input=into)
        return into

    return backward


def _view(m: Any, h: Tensor, reusable: bool, hold: Hold) -> tuple[Tensor, Backward]:
    out = m(h)
    if out.shape == h.shape:
        return out, lambda s, outputs: s
    shape, empty = h.shape, _empty_like(h)
    return out, lambda s, outputs: empty().copy_(s.view(shape))


def _empty_like(h: Tensor) -> Callable[[], Tensor]:
    """Return a function that makes empty tensors like h; h itself can then be freed."""
    return partial(torch.empty_strided, h.shape, h.stride(), dtype=h.dtype, device=h.device)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


ACTIVATIONS: dict[type, Layer] = {
    nn.ReLU: _elementwise(aten.relu, aten.relu_, aten.threshold_backward, for_slope=lambda m: (0,)),
    nn.LeakyReLU: _elementwise(
        aten.leaky_relu,
        aten.leaky_relu_,
        aten.leaky_relu_backward,
        lambda m: (m.negative_slope,),
        lambda m: (m.negative_slope, True),
    ),
    nn.Tanh: _elementwise(aten.tanh, aten.tanh_, aten.tanh_backward),
    nn.Sigmoid: _elementwise(aten.sigmoid, aten.sigmoid_, aten.sigmoid_backward),
    nn.GELU: _gelu,
}
VIEWS = (nn.Flatten, nn.Identity)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS: dict[type, Layer] = {
    **ACTIVATIONS,
    **dict.fromkeys(NORMS, _batch_norm),
    **dict.fromkeys(VIEWS, _view),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
}
