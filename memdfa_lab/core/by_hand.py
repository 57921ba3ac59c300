"""Block gradients by hand, in less memory than autograd: a weight layer, then BatchNorm, activations and pooling.

- A dense block learns some outputs at a time: their signal is formed, multiplied by the slope and used. The update of
  plain SGD is made in place, without memory for dW.
- A convolutional block runs and learns some examples at a time, and sums dW over them. The tensors between h_{i-1} and
  h_i, from the convolution's output to the pooling's indices, exist for these examples only. What remains in memory is
  h_{i-1}, h_i and dW.

BatchNorm mixes the examples of a batch, so a convolutional block with BatchNorm runs on the whole batch at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import parts_of
from memdfa_lab.core.compat import aten, autocast_is_on, has_global_hooks, has_hooks, has_step_hooks
from memdfa_lab.core.layers import LAYERS, NORMS, VIEWS, Backward, Hold, as_it_is, gradient_of, run
from memdfa_lab.core.phases import label
from memdfa_lab.core.signal import SMALL_BYTES, Signal, split

WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Optimizer = torch.optim.Optimizer | None
Ran = tuple[Tensor, Tensor, list[Backward]]  # input, output, backward functions


def block_gradient(
    block: nn.Module, h: Tensor, during: AbstractContextManager[Any], make: "Callable[..., ByHand] | None" = None
) -> "ByHand | None":
    """Return the gradient of a block on h (N, ...), or None if only autograd can form it. `make` makes a ByHand."""
    parts = parts_of(block)
    at = next((i for i, part in enumerate(parts) if type(part) not in VIEWS), 0)
    weight: Any = parts[at]
    layers = parts[at + 1 :]
    if not _can_be_done(weight, layers) or has_global_hooks() or any(map(has_hooks, parts)):
        return None
    if autocast_is_on():
        return None
    for view in parts[:at]:
        h = view(h)
    return (make or ByHand)(weight, layers, h, during) if h.dim() == weight.weight.dim() else None


class ByHand:
    """`local.BlockGradient` in parts of the batch; a part is in memory from its forward pass to its gradient."""

    hold: Hold = staticmethod(as_it_is)

    def __init__(self, weight: Any, layers: list[nn.Module], h: Tensor, during: AbstractContextManager[Any]):
        self.weight, self.layers, self.h, self.during = weight, layers, h, during
        self.parts, self.laid_out = _parts(weight, layers, h), _layout_for(weight, h)
        self.kept: deque[Ran] = deque()

    def forward(self) -> Tensor:
        self.kept.extend(map(self._run, self.parts))
        return self.out

    def begin(self) -> None:
        if not self.kept:
            self.kept.append(self._run(self.parts[0]))

    def learn(self, signal: Signal, in_place_sgd: Optimizer = None) -> bool:
        self.begin()
        signal = signal.cast(self.weight.weight.dtype)
        for part in self.parts:
            ran = self.kept.popleft() if self.kept else self._run(part)
            if len(self.parts) > 1:
                signal = signal.reusable(self.out)
            self._learn(*ran, signal if len(self.parts) == 1 else signal.of(part), in_place_sgd)
            del ran  # before the next part runs
        return True

    def output(self) -> Tensor:
        if not hasattr(self, "out"):
            for part in self.parts:
                self._run(part)
        return self.out

    def _run(self, part: slice) -> Ran:
        """Run the block on these examples; `self.out` is the whole batch's output once the last part has run."""
        with torch.no_grad(), self.during:
            h = self.laid_out(self.h if len(self.parts) == 1 else self.h[part])
            out, ways_back = run(self.layers, self.weight(h), self.hold)
            if len(self.parts) == 1:
                self.out = out
                return h, out, ways_back
            if part.start == 0:
                strides = (out[0].numel(), *out.stride()[1:])
                self.out = out.new_empty_strided((len(self.h), *out.shape[1:]), strides)
            self.out[part] = out
            out.data = self.out[part]  # the backward functions read it there; the part's own memory is freed
            return h, out, ways_back

    def _learn(self, h: Tensor, out: Tensor, ways_back: list[Backward], signal: Signal, sgd: Optimizer) -> None:
        dense = isinstance(self.weight, nn.Linear)
        gradient: Callable[..., None] = _dense_gradient if dense else _convolution_gradient
        with torch.no_grad():
            for outputs, s in signal.slices(out.shape[1]) if dense else _in_one(signal, out):
                for backward in ways_back:
                    s = backward(s, outputs)
                gradient(self.weight, h, s, outputs, sgd)
                del s  # before the next one is made


def _can_be_done(weight: Any, layers: list[nn.Module]) -> bool:
    """Tell whether the backward functions of all these layers are known, and valid for their settings."""
    if type(weight) not in WEIGHTS or any(type(layer) not in LAYERS for layer in layers):
        return False
    if any(isinstance(layer, nn.LeakyReLU) and layer.negative_slope < 0 for layer in layers):
        return False  # the slope does not follow from the output
    scales = [parameter for layer in layers if type(layer) in NORMS for parameter in layer.parameters()]
    return len(set(scales)) == len(scales) and _pads_alike(weight)  # a norm that runs twice would have two gradients


def _pads_alike(weight: Any) -> bool:
    """Tell whether a convolution pads with equally many zeros on both sides; True for a dense layer."""
    if isinstance(weight, nn.Linear):
        return True
    odd = any(d * (k - 1) % 2 for d, k in zip(weight.dilation, weight.kernel_size, strict=True))
    return weight.padding_mode == "zeros" and not (weight.padding == "same" and odd)


def _parts(weight: Any, layers: Iterable[nn.Module], h: Tensor) -> list[slice]:
    """Return eighths of the batch for a convolution, or quarters where the output of an eighth is small.

    The output of each part has at least as many numbers as the filters. Each part costs calls of torch, a pass over
    dW, and copies of the filters in oneDNN.
    """
    if isinstance(weight, nn.Linear) or any(type(layer) in NORMS for layer in layers):
        return [slice(0, len(h))]
    outputs = max(1, h[0, 0].numel() // prod(weight.stride)) * weight.out_channels  # roughly, before pooling
    small = SMALL_BYTES / h.element_size()
    least = max(weight.weight.numel(), small, min(4 * small, len(h) * outputs / 4))
    return split(len(h), 8, least / outputs)


def _layout_for(m: Any, h: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how to lay out images (N, C, H, W) so that oneDNN copies least; other inputs stay as they are.

    That is channels last (on which pooling is much faster, too), unless the filters have more numbers than h: then
    oneDNN would copy them three times.
    """
    if not isinstance(m, nn.Conv2d) or h.device.type not in ("cpu", "meta"):
        return lambda h: h
    if h.dtype not in (torch.float32, torch.bfloat16):
        return lambda h: h
    return Tensor.contiguous if h.numel() < m.weight.numel() else _channels_last


def _channels_last(h: Tensor) -> Tensor:
    N, C, H, W = h.shape
    return h.permute(0, 2, 3, 1).flatten(1).view(N, H, W, C).permute(0, 3, 1, 2)  # these strides also where C is 1


def _in_one(signal: Signal, out: Tensor) -> Iterator[tuple[slice, Tensor]]:
    yield slice(None), signal.shaped_like(out)


def _dense_gradient(m: Any, h: Tensor, s: Tensor, outputs: slice, sgd: Optimizer) -> None:
    if m.weight.requires_grad:
        lr = _plain_lr(sgd, m.weight)
        if lr is None:
            torch.mm(s.t(), h, out=gradient_of(m.weight)[outputs])
        else:
            m.weight[outputs].addmm_(s.t(), h, alpha=-lr)
    if m.bias is not None and m.bias.requires_grad:
        torch.sum(s, 0, out=gradient_of(m.bias)[outputs])


def _convolution_gradient(m: Any, h: Tensor, s: Tensor, outputs: slice, sgd: Optimizer) -> None:
    dims, padding = h.dim() - 2, m.padding
    if isinstance(padding, str):  # "same", half of it on each side, or "valid"
        padding = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    wanted = [False, m.weight.requires_grad, m.bias is not None and m.bias.requires_grad]
    settings = (m.stride, padding, m.dilation, False, [0] * dims, m.groups)
    _, dW, db = aten.convolution_backward(s, h, m.weight, [m.out_channels], *settings, wanted)
    for parameter, gradient in ((m.weight, dW), (m.bias, db)):  # oneDNN makes dW also where only db is wanted
        if gradient is not None and parameter.requires_grad:
            label("gradients", gradient)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _plain_lr(optimizer: Optimizer, parameter: Tensor) -> float | None:
    """Return the learning rate if all that the optimizer does to the parameter is to add -lr dW, else None."""
    if type(optimizer) is not torch.optim.SGD or has_step_hooks(optimizer):
        return None
    more = ("momentum", "weight_decay", "maximize", "differentiable")
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return None if any(group[name] for name in more) else float(group["lr"])
    return None  # the parameter was frozen when the optimizer was made
