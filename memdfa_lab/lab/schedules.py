"""Learning-rate schedules: a scheduler for each optimizer, which steps after each epoch or each batch."""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from memdfa_lab.core.checks import check_type
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.checkpoints import Scheduler


def schedulers_of(
    scheduler: Callable[[torch.optim.Optimizer], Scheduler] | None, rule: Rule, each: str, steps: int
) -> list[Scheduler]:
    """Return a scheduler for each optimizer; it steps after each epoch or batch, as `each` says.

    Raises TypeError if it is not a scheduler, ValueError if it has too few steps or cannot step after a batch.
    """
    optimizers = [optimizer for optimizer in rule.optimizers if optimizer is not None]
    made = [scheduler(optimizer) for optimizer in optimizers] if scheduler is not None else []
    for one in made:
        check_type("what scheduler returns", one, Scheduler, "a scheduler of torch.optim.lr_scheduler")
        if each == "batch" and isinstance(one, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau follows the loss of an epoch: use scheduler_each='epoch'")
        most = getattr(one, "total_steps", steps)  # of OneCycleLR
        if steps > most:
            raise ValueError(
                f"{type(one).__name__} has {most} steps, but makes one after each {each}: give it total_steps={steps}"
            )
    return made


def step_all(schedulers: Iterable[Scheduler], loss: float) -> None:
    """Step the schedulers; ReduceLROnPlateau gets the epoch's loss."""
    with warnings.catch_warnings():
        # Some rules, such as LastLayer, do not use all optimizers; torch then warns of a wrong order of steps.
        warnings.filterwarnings("ignore", "Detected call of", UserWarning)
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()
