"""Linear and convolution whose gradient to the input goes through B: feedback alignment (Lillicrap et al. 2016).

BP sends the error through the transposed weights ("weight transport"), dL/dx = W^T dL/da. FA sends it through a fixed
random B instead. Only that one product differs; the gradients of weight and bias are BP's, and the forward pass runs
once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from memdfa_lab.core.feedback import Feedback

GetB = Callable[[], Tensor]  # the matrix is asked for when it is needed, in the backward pass


class _Linear(torch.autograd.Function):
    """a = x W^T + b with dL/dx = dL/da B; x (N, ..., in), W and B (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, get_B: GetB) -> Tensor:
        ctx.save_for_backward(x)
        ctx.get_B = get_B
        if x.dim() == 2:
            return F.linear(x, W, b)
        out = F.linear(x.flatten(0, -2), W, b)
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(W)))  # no view: what follows may work in place

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
        backward = torch.ops.aten.convolution_backward
        dx = dW = db = None
        if need_x:
            dx = backward(grad, x, ctx.get_B(), None, *ctx.settings, [True, False, False])[0]
        if need_W or need_b:
            _, dW, db = backward(grad, x, W, ctx.bias_sizes, *ctx.settings, [False, need_W, need_b])
        return dx, dW, db, None, None


class FeedbackTransport(TorchFunctionMode):
    """Within it, every linear and convolution of `model` sends the error back through its B of `feedback`.

    Torch calls `__torch_function__` in place of each function that a module uses, so modules stay as they are.
    Raises ValueError for a weight that is not a parameter of the model (weight_norm computes one in each forward
    pass), for attention and bilinear layers, which have no B, and for a trained weight that is used without a graph, as
    in a checkpoint with use_reentrant=True: they would silently learn as in BP. A module that
    multiplies by its weight with an operator of its own (x @ self.weight) is not seen; give it a linear.
    """

    def __init__(self, feedback: Feedback, model: nn.Module):
        super().__init__()
        self.feedback = feedback
        self.index = {id(parameter): j for j, parameter in enumerate(model.parameters())}
        self.handlers: dict[Any, Callable[..., Tensor]] = {F.linear: self._linear}
        self.handlers |= dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), self._conv)
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        self.handlers |= dict.fromkeys(transposed, self._conv_transpose)
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

    def _conv(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        dims = weight.dim() - 2
        dilation = _per_axis(dilation, dims)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):  # an odd total: one more on the far side, as torch does it
                input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
        settings = (_per_axis(stride, dims), _per_axis(padding, dims), dilation, False, [0] * dims, groups)
        return _Convolution.apply(input, weight, bias, self._get_B(weight), settings)

    def _conv_transpose(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        dims = weight.dim() - 2
        per_axis = [_per_axis(value, dims) for value in (stride, padding, dilation, output_padding)]
        settings = (*per_axis[:3], True, per_axis[3], groups)
        return _Convolution.apply(input, weight, bias, self._get_B(weight), settings)


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
