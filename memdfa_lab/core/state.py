"""A rule's optimizers, one a block, and its state as a dictionary that can be saved and loaded."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import first_difference

Optimizer = torch.optim.Optimizer
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def make_optimizer(factory: OptimizerFactory, parameters: list[nn.Parameter]) -> Optimizer:
    """Return factory(parameters).

    Raises TypeError if that is not an optimizer, ValueError for LBFGS and for an optimizer of other parameters.
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


def optimizer_tensors(optimizers: Sequence[Optimizer | None]) -> list[Tensor]:
    """Return the tensors that the optimizers keep between steps, such as momentum."""
    states = [state for optimizer in optimizers if optimizer is not None for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def save(rule: Any) -> dict[str, Any]:
    """Return a rule's state: its weights and buffers, the state of each optimizer, and the feedback."""
    return {
        "rule": type(rule).__name__,
        "blocks": rule.blocks.state_dict(),
        "optimizers": [
            None if optimizer is None else {"kind": type(optimizer).__name__, "state": optimizer.state_dict()}
            for optimizer in rule.optimizers
        ],
        "feedback": rule.feedback.state_dict(),
    }


def load(rule: Any, saved: dict[str, Any]) -> None:
    """Give a rule a copy of a saved state. Raises ValueError before anything changes if it is not of such a rule."""
    if not isinstance(saved, dict) or saved.keys() != save(rule).keys():
        raise ValueError("this is not the state_dict of a rule; load a model's own into the model")
    ours, theirs = _description(save(rule)), _description(saved)
    if ours != theirs:
        ours, theirs = first_difference(ours, theirs)
        raise ValueError(f"this state is of another rule or network: it has {theirs}, the rule has {ours}")
    rule.feedback.load_state_dict(saved["feedback"])
    rule.blocks.load_state_dict(saved["blocks"])
    for optimizer, saved_optimizer in zip(rule.optimizers, saved["optimizers"], strict=True):
        if optimizer is not None:
            optimizer.load_state_dict(copy.deepcopy(saved_optimizer["state"]))


def _description(saved: dict[str, Any]) -> str:
    """Return what must be the same in two states for one to be loaded into the other, a line each."""
    lines = [f"rule {saved['rule']}", f"{saved['feedback']['kind']} feedback"]
    for name, value in saved["blocks"].items():  # tensors, or a module's extra state
        lines.append(f"{name} of shape {tuple(getattr(value, 'shape', ()))}")
    for i, optimizer in enumerate(saved["optimizers"]):
        groups = [len(group["params"]) for group in optimizer["state"]["param_groups"]] if optimizer else []
        kind = (
            f"{optimizer['kind']} of {' + '.join(map(str, groups))} tensors" if optimizer else "no optimizer (frozen)"
        )
        lines.append(f"{kind} for block {i}")
    return "\n".join(lines)
