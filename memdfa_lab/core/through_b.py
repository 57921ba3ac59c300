"""Linear and convolution whose input gradient goes through B: feedback alignment (Lillicrap et al. 2016).

BP sends the error through the transposed weights ("weight transport"), dL/dx = W^T dL/da. FA sends it through a fixed
random B instead. Only this product differs: the gradients of weight and bias are those of BP for the same dL/da, and
the forward pass runs once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memdfa_lab.core.compat import aten, copying_view

GetB = Callable[[], Tensor]  # called in the backward pass, when the matrix is needed
# The settings of torch's convolutions, after the weight and in order
CONVOLUTION = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
TRANSPOSED = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
SETTINGS: dict[Any, dict[str, Any]] = dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), CONVOLUTION)
SETTINGS |= dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED)


class Linear(torch.autograd.Function):
    """a = x W^T + b with dL/dx = dL/da B; x (..., in), W and B (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, get_B: GetB) -> Tensor:
        ctx.save_for_backward(x)
        ctx.get_B = get_B
        if x.dim() == 2:
            return F.linear(x, W, b)
        out = F.linear(x.reshape(-1, x.shape[-1]), W, b)
        shaped: Tensor = copying_view(out, (*x.shape[:-1], len(W)))  # the next operation may work in place
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dx = grad @ ctx.get_B() if ctx.needs_input_grad[0] else None
        dW = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        db = flat.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dW, db, None


class Convolution(torch.autograd.Function):
    """Any convolution, transposed ones too, with B of the filters' shape in the input gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, get_B: GetB, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.get_B, ctx.settings = get_B, settings
        ctx.bias_sizes = None if b is None else list(b.shape)
        return torch.convolution(x, W, b, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        backward = aten.convolution_backward
        dx = dW = db = None
        if need_x:
            dx = backward(grad, x, ctx.get_B(), None, *ctx.settings, [True, False, False])[0]
        if need_W or need_b:
            _, dW, db = backward(grad, x, W, ctx.bias_sizes, *ctx.settings, [False, need_W, need_b])
        return dx, dW, db, None, None


def convolution(func: Any, get_B: GetB, input: Tensor, weight: Tensor, given: dict[str, Any]) -> Tensor:
    """Run `func`, one of torch's convolutions; `given` has its arguments after the weight."""
    if input.dim() < weight.dim():  # one example, without a batch
        return convolution(func, get_B, input[None], weight, given)[0]
    dims = weight.dim() - 2
    stride, dilation = (_per_axis(given[name], dims) for name in ("stride", "dilation"))
    padding = given["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):  # an odd total: one more zero at the end, as in torch
            input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
    output_padding = _per_axis(given.get("output_padding", 0), dims)
    transposed = SETTINGS[func] is TRANSPOSED
    settings = (stride, _per_axis(padding, dims), dilation, transposed, output_padding, given["groups"])
    out: Tensor = Convolution.apply(input, weight, given["bias"], get_B, settings)
    return out


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
