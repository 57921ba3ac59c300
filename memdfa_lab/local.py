"""The local gradient of one block: from its input h_{i-1} and a signal s at its output h_i, its weights' gradients.

For a = h_{i-1} W^T + b and h_i = f(a), with s of h_i's shape (N, n_i):

    dW = (s * f'(a))^T h_{i-1},    db = sum over the batch of s * f'(a).

Autograd can do it for any block (`_ByAutograd`). The common ones, a weight layer and then BatchNorm, elementwise
activations and pooling, do it by hand (`_ByHand`), because autograd holds more than it takes: f' is computed from h_i,
which is there anyway; the signal of a dense block is formed, masked and used some outputs at a time; and what plain SGD
would do to a dense weight is done where it lies, with no room for dW. A block's input and output are left.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from memdfa_lab.blocks import has_hooks, parts_of, run_block
from memdfa_lab.feedback import Signal
from memdfa_lab.phases import label

aten = torch.ops.aten
Optimizer = torch.optim.Optimizer | None
Back = Callable[[Tensor, slice], Tensor]  # the signal behind a layer, for these outputs -> the signal before it


class Local(ABC):
    """One block's forward pass: its output, and what its own gradient needs of it."""

    out: Tensor

    @abstractmethod
    def teach(self, signal: Signal, plain: Optimizer) -> None:
        """Leave the signal's gradient in the block's parameters; if `plain` would only add -lr dW, it may be done."""


def forward(block: nn.Module, h: Tensor) -> Local:
    """Run a block on h (N, ...) in the way that holds the least."""
    views, weight, layers = _by_hand(block)
    if weight is None or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return _ByAutograd(block, h)
    for view in views:
        h = view(h)
    dense_on_sequences = isinstance(weight, nn.Linear) and h.dim() != 2
    return _ByAutograd(nn.Sequential(weight, *layers), h) if dense_on_sequences else _ByHand(weight, layers, h)


class _ByAutograd(Local):
    def __init__(self, block: nn.Module, h: Tensor):
        self.graph = run_block(block, h.detach())
        self.out = self.graph.detach()

    def teach(self, signal: Signal, plain: Optimizer) -> None:
        self.graph.backward(signal.whole(self.out))


class _ByHand(Local):
    def __init__(self, weight: Any, layers: list[nn.Module], h: Tensor):
        if isinstance(weight, nn.Conv2d):
            h = _laid_out_for(weight, h)
        self.weight, self.h = weight, h
        self.backs: list[Back] = []
        with torch.no_grad():
            h = weight(h)
            spare = True  # only an activation looks at what it put out: behind all others, that room may be taken
            for layer in layers:
                h, back = LAYERS[type(layer)](layer, h, spare)
                self.backs.insert(0, back)
                spare = type(layer) not in ACTIVATIONS and (spare or type(layer) not in VIEWS)
        self.out = h

    def teach(self, signal: Signal, plain: Optimizer) -> None:
        dense = isinstance(self.weight, nn.Linear)
        gradient = _dense_gradient if dense else _convolution_gradient
        with torch.no_grad():
            for part, s in signal.slices() if dense else [(slice(None), signal.whole(self.out))]:
                for back in self.backs:
                    s = back(s, part)
                gradient(self.weight, self.h, s, part, plain)
                del s  # before the next one is made


def _by_hand(block: nn.Module) -> tuple[list[nn.Module], nn.Module | None, list[nn.Module]]:
    """Return what reshapes the input, the weight layer, and the layers behind it; None for it if autograd has to do."""
    parts = parts_of(block)
    at = next((i for i, part in enumerate(parts) if type(part) not in VIEWS), 0)
    weight, layers = parts[at], parts[at + 1 :]
    known = type(weight) in WEIGHTS and all(type(layer) in LAYERS for layer in layers)
    if not known or _has_any_global_hook() or any(map(has_hooks, parts)) or not _pads_alike(weight):
        return [], None, []
    return parts[:at], weight, layers


def _laid_out_for(m: nn.Conv2d, h: Tensor) -> Tensor:
    """Return images (N, C, H, W) in the layout in which oneDNN copies least; where it is not used, as they are.

    That is each pixel's channels side by side (pooling is much faster on it, too), but for filters that outweigh h:
    those would be copied three times.
    """
    if h.is_cuda or h.dtype not in (torch.float32, torch.bfloat16):
        return h
    if h.numel() < m.weight.numel():
        return h.contiguous()
    N, C, H, W = h.shape
    return h.permute(0, 2, 3, 1).flatten(1).view(N, H, W, C).permute(0, 3, 1, 2)  # strides that say so for C = 1, too


def _pads_alike(weight: Any) -> bool:
    """Whether the layer pads with zeros, as many on either side (or not at all)."""
    if isinstance(weight, nn.Linear):
        return True
    odd = any(d * (k - 1) % 2 for d, k in zip(weight.dilation, weight.kernel_size, strict=True))
    return weight.padding_mode == "zeros" and not (weight.padding == "same" and odd)


# ---------------------------------------------------------------------- weight layers: the gradient of their weights


def _dense_gradient(m: Any, h: Tensor, s: Tensor, part: slice, plain: Optimizer) -> None:
    if m.weight.requires_grad:
        lr = _plain_lr(plain, m.weight)
        if lr is None:
            torch.mm(s.t(), h, out=_gradient_of(m.weight)[part])
        else:
            m.weight[part].addmm_(s.t(), h, alpha=-lr)
    if m.bias is not None and m.bias.requires_grad:
        torch.sum(s, 0, out=_gradient_of(m.bias)[part])


def _convolution_gradient(m: Any, h: Tensor, s: Tensor, part: slice, plain: Optimizer) -> None:
    dims = h.dim() - 2
    padding = m.padding
    if isinstance(padding, str):  # "same", of which each side has half, or "valid"
        padding = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    wanted = [False, m.weight.requires_grad, m.bias is not None and m.bias.requires_grad]
    settings = (m.stride, padding, m.dilation, False, [0] * dims, m.groups)
    _, dW, db = aten.convolution_backward(s, h, m.weight, [m.out_channels], *settings, wanted)
    for parameter, gradient in ((m.weight, dW), (m.bias, db)):  # oneDNN makes dW for db's sake, too
        if gradient is not None and parameter.requires_grad:
            parameter.grad = label("gradients", gradient)


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = label("gradients", torch.empty_like(parameter))
    return parameter.grad


def _plain_lr(optimizer: Optimizer, parameter: Tensor) -> float | None:
    """Return the learning rate if the optimizer would do no more to the parameter than add -lr dW, else None."""
    if type(optimizer) is not torch.optim.SGD:
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    more = ("momentum", "weight_decay", "maximize", "differentiable")
    return None if any(group[name] for name in more) else float(group["lr"])


# ------------------------------------- layers behind it: (module, input, may its room be taken) -> (output, way back)
#
# The way back takes the signal for a part of the outputs (all, behind a convolution) and may change it in place.

Layer = Callable[[Any, Tensor, bool], tuple[Tensor, Back]]


def _relu(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    out = h.relu_() if spare else h.relu()
    return out, lambda s, part: aten.threshold_backward.grad_input(s, out[:, part], 0, grad_input=s)


def _leaky_relu(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    slope, out = m.negative_slope, F.leaky_relu(h, m.negative_slope, inplace=spare)
    return out, lambda s, part: aten.leaky_relu_backward.grad_input(s, out[:, part], slope, True, grad_input=s)


def _tanh(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    out = h.tanh_() if spare else h.tanh()
    return out, lambda s, part: aten.tanh_backward.grad_input(s, out[:, part], grad_input=s)


def _sigmoid(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    out = h.sigmoid_() if spare else h.sigmoid()
    return out, lambda s, part: aten.sigmoid_backward.grad_input(s, out[:, part], grad_input=s)


def _gelu(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    # Two inputs have the same output: its slope cannot be told from that, and the input stays, an activation more.
    settings = {"approximate": m.approximate}
    return F.gelu(h, **settings), lambda s, part: aten.gelu_backward.grad_input(s, h[:, part], **settings, grad_input=s)


def _batch_norm(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    counted = m.training and m.track_running_stats
    if counted:
        m.num_batches_tracked.add_(1)
    momentum = m.momentum if m.momentum is not None else 1.0 / float(m.num_batches_tracked) if counted else 0.0
    of_batch = m.training or m.running_mean is None
    running = (m.running_mean, m.running_var) if counted or not of_batch else (None, None)
    if of_batch and h.numel() == h.shape[1]:
        raise ValueError(f"BatchNorm in training mode needs more than one value a channel, got {tuple(h.shape)}")
    out, mean, invstd = aten.native_batch_norm(h, m.weight, m.bias, *running, of_batch, momentum, m.eps)

    def back(s: Tensor, part: slice) -> Tensor:
        vectors = (m.weight, *running, mean, invstd)
        sliced = [None if v is None else v[part] if v.numel() else v for v in vectors]
        wanted = [True, m.weight is not None, m.bias is not None]
        s, dw, db = aten.native_batch_norm_backward(s, h[:, part], *sliced, of_batch, m.eps, wanted)
        for parameter, gradient in ((m.weight, dw), (m.bias, db)):
            if parameter is not None and parameter.requires_grad:
                _gradient_of(parameter)[part] = gradient
        return s

    return out, back


def _max_pool(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    settings = (*map(_pair, (m.kernel_size, m.stride, m.padding, m.dilation)), m.ceil_mode)
    out, indices = aten.max_pool2d_with_indices(h, *settings)

    def back(s: Tensor, part: slice) -> Tensor:  # of h only the shape is asked for
        into = h if spare else torch.empty_like(h)
        return aten.max_pool2d_with_indices_backward.grad_input(s, h, *settings, indices, grad_input=into)

    return out, back


def _avg_pool(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    sizes = map(_pair, (m.kernel_size, m.stride, m.padding))
    settings = (*sizes, m.ceil_mode, m.count_include_pad, m.divisor_override)

    def back(s: Tensor, part: slice) -> Tensor:
        into = h if spare else torch.empty_like(h)
        return aten.avg_pool2d_backward.grad_input(s, h, *settings, grad_input=into)

    return aten.avg_pool2d(h, *settings), back


def _view(m: Any, h: Tensor, spare: bool) -> tuple[Tensor, Back]:
    out = m(h)
    if out.shape == h.shape:
        return out, lambda s, part: s
    return out, lambda s, part: torch.empty_like(h).copy_(s.view(h.shape))  # in the layout of h


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


ACTIVATIONS: dict[type, Layer] = {
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    nn.GELU: _gelu,
}
VIEWS = (nn.Flatten, nn.Identity)
WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS: dict[type, Layer] = {
    **ACTIVATIONS,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys(VIEWS, _view),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
}
