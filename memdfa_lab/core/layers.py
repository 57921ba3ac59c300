"""The layers behind a block's weight layer, with the way of a signal back through each.

What they hold for it is the least: an activation its output, from which its slope follows, a max-pooling the indices,
BatchNorm its input.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.phases import label

aten = torch.ops.aten
Back = Callable[[Tensor, slice], Tensor]  # the signal behind a layer, for these outputs -> the signal before it
Layer = Callable[[Any, Tensor, bool], tuple[Tensor, Back]]  # module, input, may its room be taken -> output, way back
Settings = Callable[[Any], tuple[Any, ...]]


def run(layers: Iterable[nn.Module], h: Tensor) -> tuple[Tensor, list[Back]]:
    """Run the layers on h, whose room they may take; return their output, and the ways back from there, in order.

    A way back takes the signal for some outputs (all, behind a convolution) and may change it in place.
    """
    backs: list[Back] = []
    spare = True  # only an activation looks at what it put out: behind all others, that room may be taken
    for layer in layers:
        h, back = LAYERS[type(layer)](layer, h, spare)
        backs.insert(0, back)
        spare = type(layer) not in ACTIVATIONS and (spare or type(layer) not in VIEWS)
    return h, backs


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient; room for it, if it has none."""
    if parameter.grad is None:
        parameter.grad = label("gradients", torch.empty_like(parameter))
    return parameter.grad


def _elementwise(f: Any, in_place: Any, slope: Any, given: Settings = lambda m: (), for_slope: Any = None) -> Layer:
    """An activation whose slope follows from its output; `given`, `for_slope`: what else f and its slope take of m."""

    def layer(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
        out, more = (in_place if spare else f)(h, *given(m)), (for_slope or given)(m)
        return out, lambda s, outputs: slope.grad_input(s, out[:, outputs], *more, grad_input=s)

    return layer


def _gelu(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    # Two inputs have the same output: its slope cannot be told from that, and the input stays, an activation more.
    how = {"approximate": m.approximate}
    return F.gelu(h, **how), lambda s, outputs: aten.gelu_backward.grad_input(s, h[:, outputs], **how, grad_input=s)


def _batch_norm(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    m._check_input_dim(h)
    counted = m.training and m.track_running_stats
    if counted:
        m.num_batches_tracked.add_(1)
    momentum = m.momentum if m.momentum is not None else 1.0 / float(m.num_batches_tracked) if counted else 0.0
    of_batch = m.training or m.running_mean is None
    running = (m.running_mean, m.running_var) if counted or not of_batch else (None, None)
    if of_batch and h.numel() == h.shape[1]:
        raise ValueError(f"BatchNorm in training mode needs more than one value a channel, got {tuple(h.shape)}")
    out, mean, invstd = aten.native_batch_norm(h, m.weight, m.bias, *running, of_batch, momentum, m.eps)

    def back(s: Tensor, outputs: slice) -> Tensor:
        vectors = (m.weight, *running, mean, invstd)
        sliced = [None if v is None else v[outputs] if v.numel() else v for v in vectors]
        wanted = [True, m.weight is not None, m.bias is not None]
        s, dw, db = aten.native_batch_norm_backward(s, h[:, outputs], *sliced, of_batch, m.eps, wanted)
        for parameter, gradient in ((m.weight, dw), (m.bias, db)):
            if parameter is not None and parameter.requires_grad:
                gradient_of(parameter)[outputs] = gradient
        return s

    return out, back


def _max_pool(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    settings = (*map(_pair, (m.kernel_size, m.stride, m.padding, m.dilation)), m.ceil_mode)
    out, indices = aten.max_pool2d_with_indices(h, *settings)
    return out, _unpool(aten.max_pool2d_with_indices_backward, h, *settings, indices)


def _avg_pool(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    sizes = map(_pair, (m.kernel_size, m.stride, m.padding))
    settings = (*sizes, m.ceil_mode, m.count_include_pad, m.divisor_override)
    return aten.avg_pool2d(h, *settings), _unpool(aten.avg_pool2d_backward, h, *settings)


def _unpool(backward: Any, h: Tensor, *settings: Any) -> Back:
    room = _room_like(h)

    def back(s: Tensor, outputs: slice) -> Tensor:
        into = room()  # of pooling's input only the shape and the layout are asked for
        return backward.grad_input(s, into, *settings, grad_input=into)

    return back


def _view(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    out = m(h)
    if out.shape == h.shape:
        return out, lambda s, outputs: s
    shape, room = h.shape, _room_like(h)
    return out, lambda s, outputs: room().copy_(s.view(shape))


def _room_like(h: Tensor) -> Callable[[], Tensor]:
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
