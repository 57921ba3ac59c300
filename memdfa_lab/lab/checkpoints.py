"""Checkpoints of `fit`: what they hold, and whether one belongs to the run that is to go on from it."""

import re
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.compat import tree_map_only
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.distributed import digest
from memdfa_lab.lab.examples import Examples
from memdfa_lab.lab.files import write_whole

Scheduler = torch.optim.lr_scheduler.LRScheduler
FORMAT = 3


def write(
    path: Path, settings: dict[str, Any], rule: Rule, schedulers: list[Scheduler], progress: dict[str, Any]
) -> None:
    """Write all that a run needs to go on, whole or not at all."""
    state = {
        "format": FORMAT,
        "settings": settings,
        "rule": rule.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "generators": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "progress": progress,
    }
    # numpy's numbers, such as a learning rate from a logspace, would be refused when they are read.
    state = tree_map_only(np.generic, np.generic.item, state, lambda part: isinstance(part, OrderedDict))

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # of a path, torch hides why it could not be written, such as a full disk
            torch.save(state, file)

    write_whole(path, save)


def restore(
    path: Path, settings: dict[str, Any], rule: Rule, schedulers: list[Scheduler], epochs: int
) -> dict[str, Any]:
    """Give a rule, its schedulers and torch's generators their state from a checkpoint, and return the progress.

    Raises ValueError, before anything changes, if the checkpoint is damaged, of another version or of other settings,
    or has come past `epochs`.
    """
    state = _read(path)
    for name, ours in settings.items():
        theirs = state["settings"].get(name)
        if theirs != ours:
            theirs, ours = first_difference(theirs, ours)
            raise ValueError(
                f"{path} belongs to a run with {name} {theirs}, this one has {ours}: choose another file, or start "
                "anew with overwrite=True"
            )
    progress: dict[str, Any] = state["progress"]
    if (progress["epoch"], progress["batch"]) > (epochs, 0):
        raise ValueError(
            f"{path} has come past {epochs} epochs, to batch {progress['batch']} after {progress['epoch']}: ask for "
            "more epochs, choose another file, or start anew with overwrite=True"
        )
    rule.load_state_dict(state["rule"])
    for scheduler, value in zip(schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(value)
    torch.set_rng_state(state["generators"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["generators"]["cuda"])
    return progress


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not check them
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as problem:  # damage shows as any kind of exception
        raise ValueError(
            f"{path} is damaged or not a checkpoint of memdfa_lab: delete it, or start anew with overwrite=True"
        ) from problem
    if version != FORMAT:
        raise ValueError(
            f"{path} was written by another version of memdfa_lab (format {version}, this one has {FORMAT}): finish "
            "the run with that version, or start anew with overwrite=True"
        )
    return state


def settings_of(rule: Rule, schedulers: list[Scheduler], examples: Examples) -> dict[str, Any]:
    """Return what must not change between a run and its continuation; no scheduler has made a step yet.

    The network is known by its representation, which has the settings of each layer, and by the names, shapes and
    dtypes of its state.
    """
    optimizer = next(optimizer for optimizer in rule.optimizers if optimizer is not None)
    feedback = {name: value for name, value in rule.feedback.state_dict().items() if name != "matrices"}
    tensors = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in rule.blocks.state_dict(keep_vars=True).items()]
    return {
        "rule": type(rule).__name__,
        "network": "\n".join([_without_addresses(rule.blocks), *tensors]),
        "data": examples.facts,
        "loss": _described(rule.loss_fn),
        "optimizer": f"{type(optimizer).__name__}({', '.join(f'{k}={v}' for k, v in optimizer.defaults.items())})",
        "scheduler": _described(schedulers[0]) if schedulers else None,
        "clip_norm": rule.clip_norm,
        "clip_global_norm": rule.clip_global_norm,
        "precision": rule.precision,
        "feedback": feedback,
        "batch_size": f"{examples.batch_size}, drop_last" if examples.drop_last else examples.batch_size,
        "augment": _without_addresses(examples.augment),
        "seed": examples.seed,
    }


def _without_addresses(thing: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _described(thing: Any) -> str:
    """Return a scheduler or a loss as it was made, without what differs in each process."""
    if isinstance(thing, partial):
        name, values = _described(thing.func), thing.keywords | {str(i): value for i, value in enumerate(thing.args)}
    elif hasattr(thing, "__name__"):
        return str(thing.__name__)
    else:
        name, values = type(thing).__name__, getattr(thing, "__dict__", {})
    if isinstance(thing, torch.nn.Module):
        values = values | dict(thing.named_buffers())  # such as class weights; parameters learn
    changing = ("optimizer", "base_lrs", "last_epoch", "training")
    given = {
        key: digest(value) if isinstance(value, torch.Tensor) else repr(value)
        for key, value in values.items()
        if key[0] != "_" and key not in changing
    }
    return f"{name}({', '.join(f'{key}={value}' for key, value in given.items() if ' at 0x' not in value)})"
