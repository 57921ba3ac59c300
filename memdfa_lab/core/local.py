"""The local gradient of one block: from its input h_{i-1} and a signal s at its output h_i, its weights' gradients.

For a = h_{i-1} W^T + b and h_i = f(a), with s of h_i's shape (N, n_i):

    dW = (s * f'(a))^T h_{i-1},    db = sum over the batch of s * f'(a).

Autograd can do it for any block (`_ByAutograd`), and holds more than it takes. The common ones, a weight layer and then
BatchNorm, elementwise activations and pooling, do it by hand (`_ByHand`), in parts:

- A dense block learns some outputs at a time: their signal is formed, masked and used. What plain SGD would do to the
  weight is done where it lies, with no room for dW.
- A convolutional block runs and learns some examples at a time, dW summed over them: what lies between h_{i-1} and h_i,
  from the convolution's output to the pooling's indices, is there for these alone. Left are h_{i-1}, h_i and dW.

BatchNorm mixes the examples, so a convolutional block with it is one part: its own input and output, the pooling's
indices, the signal, and that with the size of the convolution's output, are there for the whole batch.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from memdfa_lab.core.blocks import has_hooks, parts_of, run_block
from memdfa_lab.core.feedback import SMALL_BYTES, Signal, cut
from memdfa_lab.core.layers import LAYERS, NORMS, VIEWS, Back, gradient_of, run
from memdfa_lab.core.phases import label
from memdfa_lab.memory.ledger import address

WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Optimizer = torch.optim.Optimizer | None
Context = AbstractContextManager[Any]


class Local(ABC):
    """A block on h (N, ...), in parts of the batch; a part is held from its forward pass to its gradient.

    `forward` runs all parts, as DFA does; else each is run when it is taught, within `during`. `out` is the block's
    whole output, once the last part has run.
    """

    out: Tensor

    def __init__(self, h: Tensor, parts: list[slice], during: Context):
        self.h, self.parts, self.during = h, parts, during
        self.kept: deque[Any] = deque()

    def output(self) -> Tensor:
        """Return the block's output; if it has not run, it does now, and nothing else is held."""
        if not hasattr(self, "out"):
            for part in self.parts:
                self.run(part)
        return self.out

    def run(self, part: slice) -> Any:
        """Run the block on these examples, and return what `learn` takes."""
        with self.during:
            return self._run(part)

    def begin(self) -> None:
        """Run the first part, if none has run."""
        if not self.kept:
            self.kept.append(self.run(self.parts[0]))

    def teach(self, signal: Signal, plain: Optimizer) -> None:
        """Leave the signal's gradient in the block's parameters; if `plain` would only add -lr dW, it may be done."""
        for part in self.parts:
            ran = self.kept.popleft() if self.kept else self.run(part)
            if len(self.parts) > 1:
                signal = signal.held(self.out[0].numel())
            self._learn(ran, signal.of(part), plain)
            del ran  # before the next part runs

    @abstractmethod
    def _run(self, part: slice) -> Any: ...

    @abstractmethod
    def _learn(self, ran: Any, signal: Signal, plain: Optimizer) -> None:
        """Add to the gradient what these examples give."""


def prepare(block: nn.Module, h: Tensor, during: Context | None = None) -> Local:
    """Return a block on h (N, ...), in the way that holds the least; nothing has run yet."""
    during = during or nullcontext()
    views, weight, layers = _by_hand(block)
    if weight is None or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return _ByAutograd(block, h, during)
    for view in views:
        h = view(h)
    if h.dim() != weight.weight.dim():
        return _ByAutograd(nn.Sequential(weight, *layers), h, during)
    return _ByHand(weight, layers, h, during)


def forward(block: nn.Module, h: Tensor) -> Local:
    """Return a block that has run on h (N, ...), with what its gradient takes."""
    local = prepare(block, h)
    local.kept.extend(map(local.run, local.parts))
    return local


class _ByAutograd(Local):
    def __init__(self, block: nn.Module, h: Tensor, during: Context):
        super().__init__(h.detach(), [slice(0, len(h))], during)
        self.block = block

    def _run(self, part: slice) -> Tensor:
        graph = run_block(self.block, self.h)
        self.out = graph.detach()
        return graph

    def _learn(self, ran: Tensor, signal: Signal, plain: Optimizer) -> None:
        if ran.requires_grad:
            ran.backward(signal.whole(self.out))
        elif address(ran) != address(self.h):  # a block that hands on its input, as layer dropout does, learns nothing
            raise RuntimeError(
                f"{type(self.block).__name__} puts out a tensor without a graph, so that it would never learn: set "
                "use_reentrant=False in its checkpoint, or leave torch.no_grad out"
            )


class _ByHand(Local):
    def __init__(self, weight: Any, layers: list[nn.Module], h: Tensor, during: Context):
        super().__init__(h, _parts(weight, layers, h), during)
        self.weight, self.layers, self.laid_out = weight, layers, _layout_for(weight, h)

    def _run(self, part: slice) -> tuple[Tensor, Tensor, list[Back]]:
        with torch.no_grad():
            h = self.laid_out(self.h[part])
            out, backs = run(self.layers, self.weight(h))
            if len(self.parts) == 1:
                self.out = out
                return h, out, backs
            if part.start == 0:
                strides = (out[0].numel(), *out.stride()[1:])
                self.out = out.new_empty_strided((len(self.h), *out.shape[1:]), strides)
            self.out[part] = out
            out.data = self.out[part]  # where the ways back find it
            return h, out, backs

    def _learn(self, ran: tuple[Tensor, Tensor, list[Back]], signal: Signal, plain: Optimizer) -> None:
        h, out, backs = ran
        dense = isinstance(self.weight, nn.Linear)
        gradient = _dense_gradient if dense else _convolution_gradient
        with torch.no_grad():
            for outputs, s in signal.slices(out.shape[1]) if dense else _in_one(signal, out):
                for back in backs:
                    s = back(s, outputs)
                gradient(self.weight, h, s, outputs, plain)
                del s  # before the next one is made


def _in_one(signal: Signal, out: Tensor) -> Iterator[tuple[slice, Tensor]]:
    yield slice(None), signal.whole(out)


def _by_hand(block: nn.Module) -> tuple[list[nn.Module], Any, list[nn.Module]]:
    """Return what reshapes the input, the weight layer, and the layers behind it; None for it if autograd has to do."""
    parts = parts_of(block)
    at = next((i for i, part in enumerate(parts) if type(part) not in VIEWS), 0)
    weight, layers = parts[at], parts[at + 1 :]
    known = type(weight) in WEIGHTS and all(type(layer) in LAYERS for layer in layers)
    known &= not any(isinstance(layer, nn.LeakyReLU) and layer.negative_slope < 0 for layer in layers)
    scales = [parameter for layer in layers if type(layer) in NORMS for parameter in layer.parameters()]
    known &= len(set(scales)) == len(scales)  # one that runs twice has two gradients to be added up
    if not known or _has_any_global_hook() or any(map(has_hooks, parts)) or not _pads_alike(weight):
        return [], None, []
    return parts[:at], weight, layers


def _parts(weight: Any, layers: list[nn.Module], h: Tensor) -> list[slice]:
    """Return eighths of the batch for a convolution, but none that puts out fewer numbers than its filters have.

    Each part costs a pass over dW, and copies of the filters in oneDNN.
    """
    if isinstance(weight, nn.Linear) or any(type(layer) in NORMS for layer in layers):
        return [slice(0, len(h))]
    outputs = max(1, h[0, 0].numel() // prod(weight.stride)) * weight.out_channels  # about, before pooling
    return cut(len(h), 8, max(weight.weight.numel(), SMALL_BYTES / h.element_size()) / outputs)


def _layout_for(m: Any, h: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how to lay out images (N, C, H, W) so that oneDNN copies least; as they are, where it is not used.

    That is each pixel's channels side by side (pooling is much faster on it, too), but for filters that outweigh h:
    those would be copied three times.
    """
    if not isinstance(m, nn.Conv2d) or h.is_cuda or h.dtype not in (torch.float32, torch.bfloat16):
        return lambda h: h
    return Tensor.contiguous if h.numel() < m.weight.numel() else _channels_last


def _channels_last(h: Tensor) -> Tensor:
    N, C, H, W = h.shape
    return h.permute(0, 2, 3, 1).flatten(1).view(N, H, W, C).permute(0, 3, 1, 2)  # strides that say so for C = 1, too


def _pads_alike(weight: Any) -> bool:
    """Whether the layer pads with zeros, as many on either side (or not at all)."""
    if isinstance(weight, nn.Linear):
        return True
    odd = any(d * (k - 1) % 2 for d, k in zip(weight.dilation, weight.kernel_size, strict=True))
    return weight.padding_mode == "zeros" and not (weight.padding == "same" and odd)


def _dense_gradient(m: Any, h: Tensor, s: Tensor, outputs: slice, plain: Optimizer) -> None:
    if m.weight.requires_grad:
        lr = _plain_lr(plain, m.weight)
        if lr is None:
            torch.mm(s.t(), h, out=gradient_of(m.weight)[outputs])
        else:
            m.weight[outputs].addmm_(s.t(), h, alpha=-lr)
    if m.bias is not None and m.bias.requires_grad:
        torch.sum(s, 0, out=gradient_of(m.bias)[outputs])


def _convolution_gradient(m: Any, h: Tensor, s: Tensor, outputs: slice, plain: Optimizer) -> None:
    dims = h.dim() - 2
    padding = m.padding
    if isinstance(padding, str):  # "same", of which each side has half, or "valid"
        padding = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    wanted = [False, m.weight.requires_grad, m.bias is not None and m.bias.requires_grad]
    settings = (m.stride, padding, m.dilation, False, [0] * dims, m.groups)
    _, dW, db = torch.ops.aten.convolution_backward(s, h, m.weight, [m.out_channels], *settings, wanted)
    for parameter, gradient in ((m.weight, dW), (m.bias, db)):  # oneDNN makes dW for db's sake, too
        if gradient is not None and parameter.requires_grad:
            label("gradients", gradient)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _plain_lr(optimizer: Optimizer, parameter: Tensor) -> float | None:
    """Return the learning rate if the optimizer would do no more to the parameter than add -lr dW, else None."""
    if type(optimizer) is not torch.optim.SGD:
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    more = ("momentum", "weight_decay", "maximize", "differentiable")
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return None if any(group[name] for name in more) else float(group["lr"])
    return None  # it was frozen when the optimizer was made
