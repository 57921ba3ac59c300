"""Linear and convolution whose gradient to the input goes through B: feedback alignment (Lillicrap et al. 2016).

BP sends the error through the transposed weights ("weight transport"), dL/dx = W^T dL/da. FA sends it through a fixed
random B instead. Only that one product differs; the gradients of weight and bias are BP's, and the forward pass runs
once.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from memdfa_lab.core.compat import aten, copying_view, run_backward, saved_tensors_hooks, transforms_active
from memdfa_lab.core.feedback import Feedback

# Functions, by name, that may take a weight beside the tensors that the error goes back to. They pass it on as it is,
ADDING = {"add", "sub", "subtract", "rsub", "where", "maximum", "minimum"}
ADDING |= {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "setitem", "copy"}
# or each entry times a number,
SCALING = {"mul", "multiply", "div", "divide", "true_divide", "pow", "clamp", "clip", "lerp", "addcmul", "addcdiv"}
SCALING |= {"prelu", "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
# or to the first tensor alone: of the second they take the form.
LIKENING = {"expand_as", "view_as", "reshape_as", "type_as", "to"}

LISTS = {list, tuple}
GetB = Callable[[], Tensor]  # called in the backward pass, when the matrix is needed
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_CONVOLUTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
# The settings that these take after the weight, in order
CONVOLUTION = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
TRANSPOSED = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


class _Linear(torch.autograd.Function):
    """a = x W^T + b with dL/dx = dL/da B; x (..., in), W and B (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, get_B: GetB) -> Tensor:
        ctx.save_for_backward(x)
        ctx.get_B = get_B
        if x.dim() == 2:
            return F.linear(x, W, b)
        out = F.linear(x.reshape(-1, x.shape[-1]), W, b)
        return copying_view(out, (*x.shape[:-1], len(W)))  # what follows may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dx = grad @ ctx.get_B() if ctx.needs_input_grad[0] else None
        dW = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
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

    torch calls `__torch_function__` in place of each function that a module uses, so modules stay as they are. A weight
    is a parameter of the model, or what is computed from parameters and constants (W.t(), W * mask). Besides linear and
    convolution FA knows the functions of ADDING and SCALING, through which it sends the error as BP does: it passes as
    it is, or each entry times one number. A function of one weight alone puts out a weight. A frozen weight counts as
    one, since the error would go back through what was once learned; a buffer does not: it is as fixed as B.

    Raises ValueError for what would silently learn as in BP: a weight in a function that FA does not know (recurrent
    layers, attention, x @ self.weight), or one that scales an entry into several; a linear or convolution whose weight
    is not a parameter of the model; a trained weight that is used without a graph, as in a checkpoint with
    use_reentrant=True, or out of sight, as in TorchScript.
    """

    def __init__(self, feedback: Feedback, model: nn.Module):
        super().__init__()
        self.feedback = feedback
        self.parameters = list(model.named_parameters())
        # id of a weight -> number of the parameter that it is, or (if in `computed`) that it is computed from
        self.weights = {id(p): j for j, (_, p) in enumerate(self.parameters) if p.is_floating_point()}
        self.computed: dict[int, weakref.ref[Tensor]] = {}
        self.seen: set[int] = set()  # the ids of what functions with a graph have taken
        self.runs_again = False  # whether something may run again in the backward pass, as in a checkpoint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, *args, **(kwargs or {}))
        weights = self.weights
        for values in (args, kwargs.values()) if kwargs else (args,):
            for value in values:
                if id(value) in weights or (type(value) in LISTS and self._hold_weight(value)):
                    return self._with_weight(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Run the backward pass within. Raises ValueError, and drops the gradients, if an unseen weight has one."""
        with self if self.runs_again else nullcontext():
            yield
        for j, (_, parameter) in enumerate(self.parameters):
            if id(parameter) not in self.seen and parameter.requires_grad and parameter.grad is not None:
                for _, each in self.parameters:
                    each.grad = None
                raise self._no_B(j, "what it does not see (autograd.Function, torch.func, TorchScript)")

    def backward(self, func: Any, out: Tensor, **settings: Any) -> None:
        """Run out.backward, and what a checkpoint runs again within this mode."""
        if settings["gradient"] is None:  # not the rule's, but a block's own
            return func(out, **settings)
        with self:  # torch takes a mode off while it runs a function
            run_backward(out, settings["gradient"])

    def gradient(self, func: Any, *args: Any, **settings: Any) -> Any:
        """Run torch.autograd.grad, unless it makes a graph: B has none."""
        if settings["create_graph"]:
            raise ValueError("FA has no gradient of a gradient, which a block takes (create_graph): use DFA or MEM-DFA")
        return func(*args, **settings)

    def _hold_weight(self, values: Iterable[Any]) -> bool:
        return any(id(tensor) in self.weights for tensor in _tensors(values))

    def _with_weight(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function that takes a weight. Raises ValueError if the error might go back through the weight."""
        taken = list(_tensors([args, *kwargs.values()]))
        others = [tensor for tensor in taken if tensor.requires_grad and id(tensor) not in self.weights]
        j = next(self.weights[id(tensor)] for tensor in taken if id(tensor) in self.weights)
        kind = func.__name__.strip("_").partition(".")[0]
        out = func(*args, **kwargs)
        made = list(_tensors([args[0] if kind == "setitem" else out]))
        if not made:
            return out
        if torch.is_grad_enabled():
            self.seen.update(map(id, taken))
        if kind in LIKENING:
            others = [tensor for tensor in others if tensor is args[0]]
        each_to_one = not others or {tensor.numel() for tensor in others} == {made[0].numel()}
        known = len(taken) == 1 or kind in ADDING or kind in LIKENING or (kind in SCALING and each_to_one)
        if not known and any(tensor.requires_grad for tensor in made):
            raise self._no_B(j, kind)
        for tensor in made:
            self._note(tensor, None if others else j)
        return out

    def _note(self, tensor: Tensor, j: int | None) -> None:
        """Note that the tensor is a weight computed from the j-th parameter, or (None) that it is no weight."""
        key, weights, computed = id(tensor), self.weights, self.computed
        if j is not None and key not in weights:
            weights[key] = j
            computed[key] = weakref.ref(tensor, lambda _: (weights.pop(key), computed.pop(key)))  # ids are used again
        elif j is None and key in computed:
            del weights[key], computed[key]

    def _no_B(self, j: int, what: str) -> ValueError:
        return ValueError(
            f"FA has no B for {what}, which takes the weight {self.parameters[j][0]}; the error would go back through "
            "it as in BP: use DFA or MEM-DFA, or build the layer of Linear layers without parametrization"
        )

    def _get_B(self, weight: Tensor, bias: Tensor | None) -> GetB:
        if transforms_active():
            raise ValueError(
                "FA has no B within torch.vmap and torch.func: call the layer on the batch, or use MEM-DFA"
            )
        key = id(weight)
        j = self.weights.get(key)
        if j is None or key in self.computed:
            origin = "" if j is None else f" from {self.parameters[j][0]}"
            raise ValueError(
                f"FA has a B for each parameter of the model; a weight of shape {tuple(weight.shape)} is a buffer, or "
                f"computed in the forward pass{origin}: remove its parametrization, or use DFA or MEM-DFA"
            )
        if weight.requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                "FA met a weight that is used without a graph; if it stands in a checkpoint with use_reentrant=True, "
                "it would silently learn as in BP: take that away, or use DFA or MEM-DFA"
            )
        self.seen.add(key)
        self.seen.add(id(bias))
        self.runs_again = self.runs_again or saved_tensors_hooks(False) is not None
        return lambda: self.feedback.weight(j, weight)

    def linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run F.linear."""
        return _Linear.apply(input, weight, bias, self._get_B(weight, bias))

    def convolution(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **named: Any) -> Tensor:
        """Run a convolution of torch, `func`."""
        if input.dim() < weight.dim():  # one example, without a batch
            return self.convolution(func, input[None], weight, *args, **named)[0]
        defaults = TRANSPOSED if func in TRANSPOSED_CONVOLUTIONS else CONVOLUTION
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
        return _Convolution.apply(input, weight, given["bias"], self._get_B(weight, given["bias"]), settings)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: FeedbackTransport.linear,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), FeedbackTransport.convolution),
    torch.autograd.grad: FeedbackTransport.gradient,
    Tensor.backward: FeedbackTransport.backward,
}


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of real numbers in nested lists and tuples."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
