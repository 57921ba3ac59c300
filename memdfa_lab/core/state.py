"""A rule's optimizers, one a block; changes of its model between steps; and saving and loading of its state.

A rule uses the network as it is at the start of each step: `Watched` notices what was replaced since the rule was made.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.compat import parts_of

Optimizer = torch.optim.Optimizer
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def make_optimizer(factory: OptimizerFactory, parameters: list[nn.Parameter]) -> Optimizer:
    """Return factory(parameters).

    Raises TypeError if it is not an optimizer, ValueError for LBFGS and for an optimizer of other parameters.
    """
    expected = "optimizer must make one optimizer a block from its parameters: pass partial(torch.optim.SGD, lr=0.05)"
    if isinstance(factory, Optimizer) or not callable(factory):
        raise TypeError(f"{expected}, not a {type(factory).__name__}")
    optimizer = factory(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{expected}; what was passed made a {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the whole network again in each step: choose SGD, Adam or another")
    if {id(p) for group in optimizer.param_groups for p in group["params"]} != {id(p) for p in parameters}:
        raise ValueError(f"{expected}; what was passed took other parameters than the block's")
    return optimizer


def described(optimizer: Optimizer) -> str:
    """Return an optimizer's class and settings, and the projection after its steps, if `constraint` names one."""
    name = f"{type(optimizer).__name__}({', '.join(f'{k}={v}' for k, v in optimizer.defaults.items())})"
    return ", ".join([name, *filter(None, [getattr(optimizer, "constraint", None)])])


def learning(thing: object) -> list[nn.Parameter]:
    """Return the parameters of a module that learn; for any other object, none."""
    return [p for p in thing.parameters() if p.requires_grad] if isinstance(thing, nn.Module) else []


def follow_freezing(
    blocks: nn.Sequential,
    parameters: list[list[nn.Parameter]],
    optimizers: list[Optimizer | None],
    make: Callable[[list[nn.Parameter]], Optimizer],
) -> None:
    """Update the lists of parameters and optimizers, one a block, to the parameters that are frozen now.

    A parameter that was frozen when the optimizer was made, and is no longer, joins its first group. A parameter that
    has been frozen since stays in its group, and gets no gradient.
    """
    for i, block in enumerate(blocks):
        parameters[i], optimizer = learning(block), optimizers[i]
        if optimizer is None:
            optimizers[i] = make(parameters[i]) if parameters[i] else None
            continue
        first, *others = (group["params"] for group in optimizer.param_groups)
        here = {id(p) for p in [*first, *parameters[i]]} - {id(p) for params in others for p in params}
        first[:] = [p for p in block.parameters() if id(p) in here]


def follow_settings(optimizer: Optimizer, other: Optimizer) -> None:
    """Give each group of an optimizer the settings of the other's group of the same number, but not its parameters."""
    for group, followed in zip(optimizer.param_groups, other.param_groups, strict=True):
        group.update({name: value for name, value in followed.items() if name not in ("params", "param_names")})


class Watched:
    """The modules and parameters of models, to notice when one has been replaced, frozen or unfrozen."""

    def __init__(self, *models: nn.Module):
        self._models = models
        parts = [held for model in models for part in model.modules() for held in parts_of(part)]
        self._held = list({id(held): held for held in parts}.values())
        self._sizes = list(map(len, self._held))
        self._parts = [(held, name, part) for held in self._held for name, part in held.items()]
        self._parameters = list(models[0].parameters())
        self._learn = [parameter.requires_grad for parameter in self._parameters]

    def check(self) -> bool:
        """Return whether a parameter has been frozen or unfrozen since the last look.

        Raises ValueError if a module or a parameter has been replaced, added or removed.
        """
        same = [held.get(name) is part for held, name, part in self._parts]  # a list, since all() of a list is fast
        if not all(same) or list(map(len, self._held)) != self._sizes:
            raise ValueError(
                f"the model has changed since the rule was made: {self._first_change()}; make the rule again after "
                "changing the model, or change weights in place"
            )
        learn = [parameter.requires_grad for parameter in self._parameters]
        changed, self._learn = learn != self._learn, learn
        return changed

    def _first_change(self) -> str:
        before = {(id(held), name): part for held, name, part in self._parts}
        now = {(id(held), name): part for held in self._held for name, part in held.items()}
        key = next(key for key in {**before, **now} if now.get(key) is not before.get(key))
        named = [pair for model in self._models for pair in model.named_modules()]
        where = [path for path, part in named if key[0] in map(id, parts_of(part))]
        what = "is gone" if key not in now else "is new" if key not in before else "is another one"
        return f"{'.'.join(filter(None, [*where[:1], key[1]]))} {what}"


def optimizer_tensors(optimizers: Sequence[Optimizer | None]) -> list[Tensor]:
    """Return the tensors that the optimizers keep between steps, such as momentum."""
    states = [state for optimizer in optimizers if optimizer is not None for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def save(rule: Any) -> dict[str, Any]:
    """Return a rule's state: its weights and buffers, the state of each optimizer, and the feedback.

    It also has the state of a loss with parameters and of its optimizer and, in float16, each block's scale.
    """
    own: dict[str, Any] = {}
    if rule.loss_optimizer is not None:
        own = {"loss": {"module": rule.loss_fn.state_dict(), "optimizer": _saved(rule.loss_optimizer)}}
    if rule.scalers:
        own["scales"] = [scaler.state_dict() for scaler in rule.scalers]
    return {
        "rule": type(rule).__name__,
        "blocks": rule.blocks.state_dict(),
        "optimizers": [_saved(optimizer) for optimizer in rule.optimizers],
        "feedback": rule.feedback.state_dict(),
        **own,
    }


def load(rule: Any, saved: dict[str, Any]) -> None:
    """Load a copy of a saved state into a rule. Raises ValueError, before any change, for another rule's state."""
    if rule.store.offloads:
        raise ValueError(
            "this rule's network rests in a store: give store.load(make, state) the model's own state_dict"
        )
    if not isinstance(saved, dict) or saved.keys() != save(rule).keys():
        raise ValueError("this is not the state_dict of a rule (with such a loss); load a model's own into the model")
    ours, theirs = _description(save(rule)), _description(saved)
    if ours != theirs:
        ours, theirs = first_difference(ours, theirs)
        raise ValueError(f"this state is of another rule or network: it has {theirs}, the rule has {ours}")
    rule.feedback.load_state_dict(saved["feedback"])
    rule.blocks.load_state_dict(saved["blocks"])
    pairs = [*zip(rule.optimizers, saved["optimizers"], strict=True)]
    if "loss" in saved:
        rule.loss_fn.load_state_dict(saved["loss"]["module"])
        pairs.append((rule.loss_optimizer, saved["loss"]["optimizer"]))
    for scaler, scale in zip(rule.scalers, saved.get("scales", ()), strict=True):
        scaler.load_state_dict(scale)
    for optimizer, saved_optimizer in pairs:
        if optimizer is not None:
            optimizer.load_state_dict(copy.deepcopy(saved_optimizer["state"]))


def _saved(optimizer: Optimizer | None) -> dict[str, Any] | None:
    return None if optimizer is None else {"kind": type(optimizer).__name__, "state": optimizer.state_dict()}


def _description(saved: dict[str, Any]) -> str:
    """Return what two states must share for one to be loaded in place of the other, a line each."""
    lines = [f"rule {saved['rule']}", f"{saved['feedback']['kind']} feedback"]
    own = saved.get("loss", {"module": {}, "optimizer": None})
    for name, value in {**saved["blocks"], **own["module"]}.items():  # tensors, or a module's extra state
        lines.append(f"{name} of shape {tuple(getattr(value, 'shape', ()))}")
    for i, optimizer in enumerate([*saved["optimizers"], own["optimizer"]]):
        groups = [len(group["params"]) for group in optimizer["state"]["param_groups"]] if optimizer else []
        kind = (
            f"{optimizer['kind']} of {' + '.join(map(str, groups))} tensors" if optimizer else "no optimizer (frozen)"
        )
        lines.append(f"{kind} for block {i}")
    return "\n".join(lines)
