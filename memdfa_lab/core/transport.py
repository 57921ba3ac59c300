"""Linear and convolution whose gradient to the input goes through B: feedback alignment (Lillicrap et al. 2016).

BP sends the error through the transposed weights ("weight transport"), dL/dx = W^T dL/da. FA sends it through a fixed
random B instead. Only that one product differs; the gradients of weight and bias are BP's, and the forward pass runs
once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from memdfa_lab.core.compat import aten, copying_view
from memdfa_lab.core.feedback import Feedback

GetB = Callable[[], Tensor]  # called in the backward pass, when the matrix is needed
CONVOLUTION = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
TRANSPOSED = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


class _Linear(torch.autograd.Function):
    """a = x W^T + b with dL/dx = dL/da B; x (N, ..., in), W and B (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, get_B: GetB) -> Tensor:
        ctx.save_for_backward(x)
        ctx.get_B = get_B
        if x.dim() == 2:
            return F.linear(x, W, b)
        out = F.linear(x.flatten(0, -2), W, b)
        return copying_view(out, (*x.shape[:-1], len(W)))  # what follows may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        dx = grad @ ctx.get_B() if ctx.needs_input_grad[0] else None
        dW = flat.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        db = flat.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dW, db, None


class _Convolution(torch.autograd.Function):
    """Any convolution, transposed ones too, with B, of the filters' shape, in the gradient to the input."""

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


class FeedbackTransport(TorchFunctionMode):
    """Within it, every linear and convolution of `model` sends the error back through its B of `feedback`.

    torch calls `__torch_function__` in place of each function that a module uses, so modules stay as they are. A module
    that multiplies by its weight with an operator of its own (x @ self.weight) is not seen; give it a linear.

    Raises ValueError for what would silently learn as in BP: attention and bilinear layers, which have no B; a weight
    that is not a parameter of the model (weight_norm computes one in each forward pass); a trained weight that is used
    without a graph, as in a checkpoint with use_reentrant=True.
    """

    def __init__(self, feedback: Feedback, model: nn.Module):
        super().__init__()
        self.feedback = feedback
        self.index = {id(parameter): j for j, parameter in enumerate(model.parameters())}
        self.handlers: dict[Any, Callable[..., Tensor]] = {F.linear: self._linear}
        self.handlers |= dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), partial(self._convolution, CONVOLUTION))
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        self.handlers |= dict.fromkeys(transposed, partial(self._convolution, TRANSPOSED))
        self.handlers |= dict.fromkeys((F.multi_head_attention_forward, F.bilinear), self._refuse)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handlers.get(func, func)(*args, **(kwargs or {}))

    def _refuse(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(
            "FA has no B for attention and bilinear layers, and they would silently learn as in BP: use DFA or MEM-DFA"
        )

    def _get_B(self, weight: Tensor) -> GetB:
        j = self.index.get(id(weight))
        if j is None:
            raise ValueError(
                f"FA needs each weight to be a parameter of the model; one of shape {tuple(weight.shape)} is computed "
                "in the forward pass: remove its parametrization, or use DFA or MEM-DFA"
            )
        if weight.requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                "FA met a weight that is used without a graph; if it stands in a checkpoint with use_reentrant=True, "
                "it would silently learn as in BP: take that away, or use DFA or MEM-DFA"
            )
        return lambda: self.feedback.weight(j, weight)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(input, weight, bias, self._get_B(weight))

    def _convolution(self, defaults: dict[str, Any], input: Tensor, weight: Tensor, *args: Any, **named: Any) -> Tensor:
        """Run a convolution; `defaults` are the settings that torch's function takes after the weight, in order."""
        given = {**defaults, **dict(zip(defaults, args, strict=False)), **named}
        dims = weight.dim() - 2
        stride, dilation = (_per_axis(given[name], dims) for name in ("stride", "dilation"))
        padding = given["padding"]
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):  # an odd total: one more on the far side, as in torch
                input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
        output_padding = _per_axis(given.get("output_padding", 0), dims)
        settings = (stride, _per_axis(padding, dims), dilation, defaults is TRANSPOSED, output_padding, given["groups"])
        return _Convolution.apply(input, weight, given["bias"], self._get_B(weight), settings)


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
