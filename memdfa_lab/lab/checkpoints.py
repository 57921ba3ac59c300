"""What a checkpoint of `fit` holds, and whether it belongs to the run that is to go on from it."""

import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.distributed import digest
from memdfa_lab.lab.files import write_whole

if TYPE_CHECKING:
    from memdfa_lab.lab.datasets import Data

Scheduler = torch.optim.lr_scheduler.LRScheduler
FORMAT = 1


def write(
    path: Path, settings: dict[str, Any], rule: Rule, schedulers: list[Scheduler], progress: dict[str, Any]
) -> None:
    """Write all that a run takes to go on, whole or not at all."""
    state = {
        "format": FORMAT,
        "settings": settings,
        "rule": rule.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "generators": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "progress": progress,
    }
    # numpy's numbers, such as a learning rate out of a logspace, would be refused when they are read back.
    state = tree_map_only(np.generic, np.generic.item, state, lambda part: isinstance(part, OrderedDict))
    write_whole(path, lambda temporary: torch.save(state, temporary))


def read(path: Path, settings: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Return what `write` wrote.

    Raises ValueError if it is damaged, of another version or of other settings, or has come past `epochs`.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not look at them
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        known = state["format"] == FORMAT
    except Exception as problem:  # damage shows as any kind of exception
        raise ValueError(
            f"{path} is damaged or not a checkpoint of memdfa_lab: delete it, or start anew with overwrite=True"
        ) from problem
    if not known:
        raise ValueError(f"{path} was written by another version of memdfa_lab (format {state['format']})")
    for name, ours in settings.items():
        theirs = state["settings"].get(name)
        if theirs != ours:
            theirs, ours = first_difference(theirs, ours)
            raise ValueError(
                f"{path} belongs to a run with {name} {theirs}, this one has {ours}: choose "
                "another file, or start anew with overwrite=True"
            )
    done = state["progress"]
    if (done["epoch"], done["batch"]) > (epochs, 0):
        raise ValueError(
            f"{path} has come past {epochs} epochs, to batch {done['batch']} after {done['epoch']}: ask for more "
            "epochs, choose another file, or start anew with overwrite=True"
        )
    return state


def settings_of(rule: Rule, schedulers: list[Scheduler], data: "Data", batch_size: int, seed: int) -> dict[str, Any]:
    """Return what must not change between a run and its continuation; no scheduler has made a step yet."""
    made = next(optimizer for optimizer in rule.optimizers if optimizer is not None)
    feedback = {name: value for name, value in rule.feedback.state_dict().items() if name != "matrices"}
    some = data.x_train[:: max(1, len(data.x_train) // 100)]
    looks = digest(some, data.y_train)
    return {
        "rule": type(rule).__name__,
        "network": "\n".join(type(part).__name__ for part in rule.blocks.modules()),
        "data": f"{data.name}, {len(data.x_train)} examples of shape {tuple(some.shape[1:])}, digest {looks}",
        "loss": _said(rule.loss_fn),
        "optimizer": f"{type(made).__name__}({', '.join(f'{k}={v}' for k, v in made.defaults.items())})",
        "scheduler": _said(schedulers[0]) if schedulers else None,
        "clip_norm": rule.clip_norm,
        "feedback": feedback,
        "batch_size": batch_size,
        "seed": seed,
    }


def _said(made: Any) -> str:
    """Return a scheduler or a loss as it was made, but for what differs in each process."""
    if isinstance(made, partial):
        name, values = _said(made.func), made.keywords | {str(i): value for i, value in enumerate(made.args)}
    elif hasattr(made, "__name__"):
        return str(made.__name__)
    else:
        name, values = type(made).__name__, getattr(made, "__dict__", {})
    apart = ("optimizer", "base_lrs", "last_epoch", "training")
    given = {key: repr(value) for key, value in values.items() if key[0] != "_" and key not in apart}
    said = ", ".join(f"{key}={value}" for key, value in given.items() if " at 0x" not in value)
    return f"{name}({said})"
