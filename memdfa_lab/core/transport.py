"""FA's backward pass: each linear layer and convolution sends the error back through its B; the rest is checked.

Autograd differentiates all other operations as in BP. That is correct for operations without a weight, and for a weight
that is added or that scales entry by entry, such as biases and norms in the literature on FA. Any other function of a
weight would send the error back through the weight itself, so that FA would silently be BP. Such functions are refused.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memdfa_lab.core.compat import run_backward, saves_through_hooks, transforms_active
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.terms import leaf_of, leaves_first
from memdfa_lab.core.through_b import SETTINGS, GetB, Linear, convolution

# Functions, by name, that may take a weight beside tensors with a gradient. These pass the error back unchanged,
ADDING = {"add", "sub", "subtract", "rsub", "where", "maximum", "minimum"}
ADDING |= {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "setitem", "copy"}
# these pass back each entry times a number,
SCALING = {"mul", "multiply", "div", "divide", "true_divide", "pow", "clamp", "clip", "lerp", "addcmul", "addcdiv"}
SCALING |= {"prelu", "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
# and these pass it back to the first tensor only: of the second they use the shape or dtype.
LIKENING = {"expand_as", "view_as", "reshape_as", "type_as", "to"}

UNSEEN = "what it does not see (autograd.Function, torch.func, TorchScript, checkpoint)"
LISTS = {list, tuple}  # looked up for each argument: isinstance takes longer


class FeedbackTransport(TorchFunctionMode):
    """A mode within which every linear layer and convolution of `model` sends the error back through its B.

    torch calls `__torch_function__` in place of each function that a module uses, so modules stay unchanged. A weight
    is a parameter of the model, or a tensor computed from parameters and constants (W.t(), W * mask). FA also knows the
    functions in ADDING and SCALING. The error goes back through them as in BP: unchanged, or each entry times one
    number. A function of one weight only returns a weight. A frozen weight counts as a weight, since it may have been
    learned before; a buffer does not count, since it is as fixed as B.

    Raises ValueError for whatever would silently learn as in BP: a weight in a function that FA does not know
    (recurrent layers, attention, x @ self.weight), or that scales one entry into several; a linear layer or convolution
    whose weight is not a parameter of the model; a trained weight that is used without a graph, as in a checkpoint with
    use_reentrant=True, or unseen, as in TorchScript. A product written as repeat, scale and sum is not noticed.
    """

    def __init__(self, feedback: Feedback, model: nn.Module):
        super().__init__()
        self.feedback = feedback
        self.parameters = list(model.named_parameters())
        # id of a weight -> number of the parameter that it is, or (if in `computed`) that it is computed from
        self.weights = {id(p): j for j, (_, p) in enumerate(self.parameters) if p.is_floating_point()}
        self.computed: dict[int, weakref.ref[Tensor]] = {}
        self.seen: set[int] = set()  # the ids of tensors that functions with a graph were given
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
        """Run the backward pass within. Raises ValueError, and drops all gradients, if an unseen weight has one."""
        with self if self.runs_again else nullcontext():
            yield
        for j, (_, parameter) in enumerate(self.parameters):
            if id(parameter) not in self.seen and parameter.requires_grad and parameter.grad is not None:
                for _, each in self.parameters:
                    each.grad = None
                raise self._no_B(j, UNSEEN)

    def check(self, out: Tensor) -> None:
        """Raise ValueError if the graph of a block's output leads to a weight that no function was seen to take."""
        met = {id(leaf_of(node)) for node in leaves_first(out.grad_fn)} if out.requires_grad else set()
        for j, (_, parameter) in enumerate(self.parameters):
            if id(parameter) in met - self.seen and parameter.requires_grad:
                raise self._no_B(j, UNSEEN)

    def backward(self, func: Any, out: Tensor, **settings: Any) -> None:
        """Run out.backward in this mode, so that a checkpoint's second forward pass is seen, too."""
        if settings["gradient"] is None:  # a call by a block, not by the rule
            func(out, **settings)
            return
        with self:  # torch switches a mode off while it runs a function
            run_backward(out, settings["gradient"])

    def gradient(self, func: Any, *args: Any, **settings: Any) -> Any:
        """Run torch.autograd.grad; raise ValueError if it makes a graph, which B does not have."""
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
        kind = str(getattr(func, "__name__", func)).strip("_").partition(".")[0]
        out = func(*args, **kwargs)
        made = list(_tensors([args[0] if kind == "setitem" else out]))
        if not made:
            return out
        if any(tensor.requires_grad for tensor in made):
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
            computed[key] = weakref.ref(tensor, lambda _: (weights.pop(key), computed.pop(key)))  # Python reuses ids
        elif j is None and key in computed:
            del weights[key], computed[key]

    def _no_B(self, j: int, what: str) -> ValueError:
        return ValueError(
            f"FA has no B for {what}, which takes the weight {self.parameters[j][0]}; the error would go back through "
            "it as in BP: use DFA or MEM-DFA, or build the layer of Linear layers without parametrization"
        )

    def _get_B(self, weight: Tensor, bias: Tensor | None) -> GetB:
        if transforms_active():
            raise ValueError("FA has no B within torch.vmap or torch.func: leave that away, or use DFA or MEM-DFA")
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
        self.runs_again = self.runs_again or saves_through_hooks()
        return lambda: self.feedback.weight(j, weight)

    def linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run F.linear."""
        out: Tensor = Linear.apply(input, weight, bias, self._get_B(weight, bias))
        return out

    def convolution(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **named: Any) -> Tensor:
        """Run a convolution of torch, `func`."""
        given = {**SETTINGS[func], **dict(zip(SETTINGS[func], args, strict=False)), **named}
        return convolution(func, self._get_B(weight, given["bias"]), input, weight, given)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: FeedbackTransport.linear,
    **dict.fromkeys(SETTINGS, FeedbackTransport.convolution),
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
