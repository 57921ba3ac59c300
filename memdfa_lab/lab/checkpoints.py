"""Checkpoints of `fit`: what they hold, and whether one belongs to the run that is to go on from it."""

import copy
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.compat import tree_map_only
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.state import described
from memdfa_lab.lab.distributed import digest
from memdfa_lab.lab.examples import Examples
from memdfa_lab.lab.files import locked, write_whole

Scheduler = torch.optim.lr_scheduler.LRScheduler
FORMAT = 3


def checked(checkpoint: str | Path | None, rule: Rule, stop_after: int | None) -> Path | None:
    """Return the path. Raises ValueError if a run cannot be kept there, or not of this rule.

    What rests in a store is kept there, with all else that the run needs.
    """
    store, path = rule.store, None if checkpoint is None else Path(checkpoint)
    if store.offloads and rule.group.size > 1:
        raise ValueError("offload is for one process: leave it out on several")
    if store.offloads and stop_after is not None:
        raise ValueError("stop_after keeps the weights of the best epoch in memory: leave it out with offload")
    folder = getattr(store, "folder", None)
    if store.offloads and path is not None and folder is None:
        raise ValueError("what rests in the machine's memory ends with the process: take ml.offload.Disk(folder)")
    if store.offloads and path is not None and path.resolve() != Path(folder or "").resolve():
        raise ValueError(f"the network rests in {folder}, and its checkpoint with it: give checkpoint={str(folder)!r}")
    if path is not None and path.is_dir() and not store.offloads:
        raise ValueError(f"checkpoint {path} is a folder: name a file in it, such as {path / 'checkpoint.pt'}")
    return path


def is_there(path: Path, rule: Rule) -> bool:
    """Tell whether there is a run to go on with."""
    return rule.store.progress is not None if rule.store.offloads else path.exists()


@contextmanager
def kept(path: Path | None, rule: Rule) -> Iterator[None]:
    """Keep others from writing the checkpoint within, also the rule's store, except through `write`."""
    if path is None or not rule.store.offloads:
        with nullcontext() if path is None else locked(path):
            yield
        return
    rule.store.commits_by_itself = False
    yield
    rule.store.commits_by_itself = True  # not after an exception: the store would commit without the run's progress


def write(
    path: Path, settings: dict[str, Any], rule: Rule, schedulers: list[Scheduler], progress: dict[str, Any]
) -> None:
    """Write all that a run needs to go on, whole or not at all."""
    state = {
        "format": FORMAT,
        "settings": settings,
        "rule": _groups(rule) if rule.store.offloads else rule.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "generators": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "progress": progress,
    }
    # numpy's numbers, such as a learning rate from a logspace, would be refused when they are read.
    state = tree_map_only(np.generic, np.generic.item, state, lambda part: isinstance(part, OrderedDict))

    if rule.store.offloads:
        rule.store.commit(state)
        return

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
    state = copy.deepcopy(rule.store.progress) if rule.store.offloads else _read(path)
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
    if rule.store.offloads:
        _load_groups(rule, state["rule"])
    else:
        rule.load_state_dict(state["rule"])
    for scheduler, value in zip(schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(value)
    torch.set_rng_state(state["generators"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["generators"]["cuda"])
    return progress


def _groups(rule: Rule) -> list[Any]:
    """Return the settings of each optimizer's groups, such as learning rates, which a scheduler changes."""
    return [None if optimizer is None else optimizer.state_dict()["param_groups"] for optimizer in rule.optimizers]


def _load_groups(rule: Rule, saved: list[Any]) -> None:
    for optimizer, groups in zip(rule.optimizers, saved, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True) if optimizer is not None else ():
            group.update({name: value for name, value in values.items() if name != "params"})


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
    tensors = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in rule.blocks.state_dict(keep_vars=True).items()]
    return {
        "rule": type(rule).__name__,
        "network": "\n".join([without_addresses(rule.blocks), *tensors]),
        "data": examples.facts,
        "loss": _described(rule.loss_fn),
        "optimizer": described(optimizer),
        "scheduler": _described(schedulers[0]) if schedulers else None,
        "clip_norm": rule.clip_norm,
        "clip_global_norm": rule.clip_global_norm,
        "precision": rule.precision,
        "pass1": str(rule.pass1),
        "feedback": rule.feedback.settings(),
        "batch_size": f"{examples.batch_size}, drop_last" if examples.drop_last else examples.batch_size,
        "augment": without_addresses(examples.augment),
        "seed": examples.seed,
    }


def without_addresses(thing: object) -> str:
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
