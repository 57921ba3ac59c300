"""Checkpoints of `fit`: their contents, and the check that a checkpoint belongs to the run that resumes from it."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.generators import of_torch
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.state import described
from memdfa_lab.lab.distributed import digest
from memdfa_lab.lab.examples import Examples
from memdfa_lab.lab.files import locked, read_saved, write_saved

Scheduler = torch.optim.lr_scheduler.LRScheduler
INSTEAD = "delete it, or start anew with overwrite=True"


def checked(checkpoint: str | Path | None, rule: Rule, stop_after: int | None) -> Path | None:
    """Return the path. Raises ValueError if this rule's run cannot be saved there.

    A network that rests in a store has its checkpoint there, with everything else that the run needs.
    """
    store, path = rule.store, None if checkpoint is None else Path(checkpoint)
    if store.offloads and rule.group.size > 1:
        raise ValueError("offload is for one process: leave it out on several")
    if store.offloads and stop_after is not None:
        raise ValueError("stop_after keeps the weights of the best epoch in memory: leave it out with offload")
    folder = getattr(store, "folder", None)
    if store.offloads and path is not None and folder is None:
        raise ValueError(
            "a network in the machine's memory ends with the process: for a checkpoint, use ml.offload.Disk(folder)"
        )
    if store.offloads and path is not None and path.resolve() != Path(folder or "").resolve():
        raise ValueError(f"the network rests in {folder}, and its checkpoint with it: give checkpoint={str(folder)!r}")
    if path is not None and path.is_dir() and not store.offloads:
        raise ValueError(f"checkpoint {path} is a folder: name a file in it, such as {path / 'checkpoint.pt'}")
    return path


def is_there(path: Path, rule: Rule) -> bool:
    """Tell whether there is a run to resume."""
    return rule.store.progress is not None if rule.store.offloads else path.exists()


@contextmanager
def kept(path: Path | None, rule: Rule) -> Iterator[None]:
    """Lock the checkpoint in the with-block; the rule's store then commits only through `write`."""
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
    """Write everything that a run needs to resume, completely or not at all."""
    state = {
        "settings": settings,
        "rule": _groups(rule) if rule.store.offloads else rule.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "generators": {kind: get() for kind, (get, _) in of_torch(rule.device).items()},
        "progress": progress,
    }
    if rule.store.offloads:
        rule.store.commit(state)
    else:
        write_saved(path, state)


def restore(
    path: Path, settings: dict[str, Any], rule: Rule, schedulers: list[Scheduler], epochs: int
) -> dict[str, Any]:
    """Load a checkpoint into a rule, its schedulers and torch's generators, and return the run's progress.

    Raises ValueError, before anything changes, if the checkpoint is damaged, of another version or of other settings,
    or is past `epochs` already.
    """
    state = copy.deepcopy(rule.store.progress) if rule.store.offloads else read_saved(path, INSTEAD)
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
            f"{path} is past {epochs} epochs, at batch {progress['batch']} after epoch {progress['epoch']}: ask for "
            "more epochs, choose another file, or start anew with overwrite=True"
        )
    if rule.store.offloads:
        _load_groups(rule, state["rule"])
    else:
        rule.load_state_dict(state["rule"])
    for scheduler, value in zip(schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(value)
    for kind, (_, put) in of_torch(rule.device).items():
        if kind in state["generators"]:  # a run may resume on another kind of device
            put(state["generators"][kind])
    return progress


def _groups(rule: Rule) -> list[Any]:
    """Return the settings of each optimizer's groups, such as learning rates, which a scheduler changes."""
    return [None if optimizer is None else optimizer.state_dict()["param_groups"] for optimizer in rule.optimizers]


def _load_groups(rule: Rule, saved: list[Any]) -> None:
    for optimizer, groups in zip(rule.optimizers, saved, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True) if optimizer is not None else ():
            group.update({name: value for name, value in values.items() if name != "params"})


def settings_of(rule: Rule, schedulers: list[Scheduler], examples: Examples) -> dict[str, Any]:
    """Return what must not change between a run and its continuation; call it before any scheduler has stepped.

    The network is identified by its repr, which has the settings of each layer, and by the names, shapes and dtypes of
    its state.
    """
    optimizer = next(optimizer for optimizer in rule.optimizers if optimizer is not None)
    settings = [*rule.own_settings, *(["pack"] if rule.pack else [])]
    own = ", ".join(f"{name}={getattr(rule, name)}" for name in settings)
    tensors = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in rule.blocks.state_dict(keep_vars=True).items()]
    return {
        "rule": type(rule).__name__ + (f"({own})" if own else ""),
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
    """Return the settings of a scheduler or a loss, without what differs between processes."""
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
