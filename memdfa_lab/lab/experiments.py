"""Training runs from plain settings: names, numbers and a folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memdfa_lab import memory
from memdfa_lab.core import feedback
from memdfa_lab.core.checks import check_int, check_number, lookup
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import datasets, models
from memdfa_lab.lab.distributed import Group
from memdfa_lab.lab.fit import History, fit
from memdfa_lab.lab.losses import LOSSES
from memdfa_lab.lab.resident import resident_peak as resident_peak
from memdfa_lab.lab.settings import OPTIMIZERS as OPTIMIZERS
from memdfa_lab.lab.sync_batchnorm import synchronise
from memdfa_lab.rivals import BASELINES

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from memdfa_lab.lab.datasets import Data
    from memdfa_lab.memory import Trace


def load_for(network: str, dataset: str, root: str | Path | None = None) -> "Data":
    """Return a dataset as the network takes it: digits in the network's own shape, all else as it is."""
    shape = models.get(network).input_shape if dataset in ("mnist5k", "mnist") else None
    flat = shape is not None and shape[:2] == (1, 1)  # 784-[...]: the network flattens what it is given
    return datasets.load(dataset, root=root, shape=None if flat else shape)


def make_rule(
    rule: str,
    network: str,
    data: "Data",
    *,
    lr: float | None = None,
    optimizer: str | None = None,
    weight_decay: float | None = None,
    loss: str | None = None,
    initialisation: str | None = None,
    feedback_kind: str = "stored",
    distribution: str | None = None,
    scale: float = 1.0,
    seed: int = 0,
    clip_norm: float | None = None,
    device: str = "cpu",
) -> Rule:
    """Return a rule with a new network for `data`, from names and numbers; what is None is the network's own setting.

    `seed` gives weights and feedback. Raises ValueError for an unknown name or a device that is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not there: use cpu, or install a torch that finds your GPU")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None:
            check_number(name, value)
    setting = models.get(network)
    as_rule = rule if rule in setting.lr else "bp"  # baselines are set as BP is
    how = initialisation or setting.initialisation[as_rule]
    decay = setting.weight_decay if weight_decay is None else weight_decay
    return lookup("rule", rule, {**RULES, **BASELINES})(
        models.build(network, data.input_shape, data.classes, seed, how).to(device),
        optimizer=partial(
            lookup("optimizer", optimizer or setting.optimizer, OPTIMIZERS),
            lr=setting.lr[as_rule] if lr is None else lr,
            **({} if decay is None else {"weight_decay": decay}),
        ),
        loss_fn=lookup("loss", loss or setting.loss, LOSSES),
        feedback=lookup("feedback", feedback_kind, feedback.KINDS)(seed, distribution or setting.distribution, scale),
        clip_norm=clip_norm,
    )


def train(
    rule: str,
    network: str,
    data: "Data",
    epochs: int | None = None,
    batch_size: int | None = None,
    *,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    seed: int = 0,
    group: Group | None = None,
    sync_batchnorm: bool = False,
    **settings: Any,
) -> tuple[Rule, History]:
    """Train one network with one rule and return both; `settings` go to `make_rule`, None is the network's own.

    With a `folder`, history.csv and checkpoint.pt are written there, and a run that was cut goes on. `group`: the
    processes that train together (`ml.distributed.ranks`), with BatchNorm's statistics over all of them if
    `sync_batchnorm`.
    """
    made = make_rule(rule, network, data, seed=seed, **settings)
    made.group = group or made.group
    if sync_batchnorm:
        synchronise(made.blocks, group or Group())
    history = fit(
        made,
        data,
        models.get(network).epochs if epochs is None else epochs,
        models.get(network).batch_size if batch_size is None else batch_size,
        seed=seed,
        checkpoint=None if folder is None else Path(folder) / "checkpoint.pt",
        overwrite=overwrite,
        progress=progress,
    )
    if folder is not None and made.group.rank == 0:
        history.to_csv(Path(folder) / "history.csv")
    return made, history


def compare(
    network: str,
    data: "Data",
    rules: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    batch_size: int | None = None,
    *,
    folder: str | Path | None = None,
    **settings: Any,
) -> tuple["pd.DataFrame", dict[tuple[str, int], Rule]]:
    """Train a network with each rule from each seed; `settings` go to `train`.

    Returns the histories in one table with the columns rule and seed in front, and the trained rules by (rule, seed).
    With a `folder`, each run has a folder of its own in it, RULE/seedSEED.
    """
    import pandas as pd

    if isinstance(rules, str) or not rules or not isinstance(seeds, Sequence) or not seeds:
        raise ValueError(f"rules and seeds are lists, such as ['bp', 'memdfa'] and [0, 1], got {rules!r} and {seeds!r}")
    tables, trained = [], {}
    for rule in rules:
        for seed in seeds:
            place = None if folder is None else Path(folder) / rule / f"seed{seed}"
            made, history = train(rule, network, data, epochs, batch_size, folder=place, seed=seed, **settings)
            trained[rule, seed] = made
            tables.append(history.table.assign(rule=rule, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table[["rule", "seed", *(name for name in table if name not in ("rule", "seed"))]], trained


def summary(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a row a rule from the table of `compare`: mean and spread over seeds of the last epoch, time of all."""
    runs = table.groupby(["rule", "seed"], sort=False)
    last = runs.last().assign(seconds=runs["seconds"].sum())
    rules = last.groupby("rule", sort=False)
    return rules.agg(
        seeds=("loss", "size"),
        train_loss=("loss", "mean"),
        test_accuracy=("test_accuracy", "mean"),
        test_accuracy_std=("test_accuracy", "std"),
        train_accuracy=("train_accuracy", "mean"),
        seconds=("seconds", "mean"),
    ).reset_index()


def profile(
    rule: str,
    network: str,
    batch_size: int,
    optimizer: str = "sgd",
    feedback_kind: str = "regenerated",
    measured: bool = False,
    seed: int = 0,
) -> "Trace":
    """Return what a step in the steady state holds, from names; predicted, or `measured` on random data.

    The loss is the network's own.

    Raises ValueError for unknown names and a batch size below 1.
    """
    setting = models.get(network)
    shape, loss_fn = (check_int("the batch size", batch_size), *setting.input_shape), LOSSES[setting.loss]
    make = partial(lookup("optimizer", optimizer, OPTIMIZERS), lr=1e-6)
    storage = lookup("feedback", feedback_kind, feedback.KINDS)(seed)
    build = partial(models.build, network)
    if not measured:
        return memory.predict(rule, build, shape, make, storage, loss_fn=loss_fn)
    made = lookup("rule", rule, {**RULES, **BASELINES})(build(), make, loss_fn, storage)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(shape, generator=generator), torch.randint(10, (batch_size,), generator=generator)
    return memory.measure(made, x, y, warm_up=1)


def confusion(y: Tensor, predicted: Tensor, classes: int) -> "np.ndarray":
    """Return how often each class (rows) was taken for each (columns), shape (classes, classes).

    Raises ValueError if y and predicted are not as many whole numbers from 0 to classes - 1.
    """
    check_int("classes", classes)
    both = [z.cpu().long() for z in (y, predicted) if not z.is_floating_point()]  # a byte would not hold their pairs
    good = len(both) == 2 and y.shape == predicted.shape
    if not good or any(z.numel() and not 0 <= z.min() <= z.max() < classes for z in both):
        given = f"shapes {tuple(y.shape)} and {tuple(predicted.shape)}, {y.dtype} and {predicted.dtype}"
        raise ValueError(f"y and predicted must be as many labels from 0 to {classes - 1}; got {given}")
    pairs = both[0] * classes + both[1]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()
