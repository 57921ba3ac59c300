"""Training runs from plain settings: names, numbers and a folder."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from memdfa_lab import memory
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.devices import CPU, check_device
from memdfa_lab.core.distributions import seconds_a_number
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import find_rule
from memdfa_lab.lab import datasets, models
from memdfa_lab.lab.batchnorm import synchronise
from memdfa_lab.lab.constraints import standardised
from memdfa_lab.lab.datasets import Data
from memdfa_lab.lab.distributed import Group
from memdfa_lab.lab.evaluation import confusion as confusion
from memdfa_lab.lab.example import example_step, named_feedback
from memdfa_lab.lab.fit import fit
from memdfa_lab.lab.history import History
from memdfa_lab.lab.losses import LOSSES
from memdfa_lab.lab.of_run import feedback_of as feedback_of
from memdfa_lab.lab.of_run import options_of as options_of
from memdfa_lab.lab.offload import Disk
from memdfa_lab.lab.resident import resident_peak as resident_peak
from memdfa_lab.lab.settings import OPTIMIZERS as OPTIMIZERS
from memdfa_lab.lab.settings import RunSettings as RunSettings
from memdfa_lab.memory import sizing


def load_for(network: str, dataset: str, root: str | Path | None = None) -> Data:
    """Return a data set in the shape of the network's input.

    The shape is that of MODULE:FUNCTION@SHAPE, or for MNIST and mnist5k the network's own; other data sets keep theirs.
    """
    setting = models.get(network)
    shape = setting.input_shape or None if setting.function or dataset in ("mnist5k", "mnist") else None
    flat = shape is not None and shape[:2] == (1, 1)  # 784-[...]: the network flattens what it is given
    return datasets.load(dataset, root=root, shape=None if flat else shape)


def make_rule(
    rule: str,
    network: str,
    data: Data,
    *,
    sync_batchnorm: Group | None = None,
    offload: Disk | None = None,
    **settings: Any,
) -> Rule:
    """Return a rule with a new network for `data`, from the names of rule and network and `RunSettings`.

    Settings that are not given are the network's own. `sync_batchnorm`: the group of processes that share BatchNorm's
    statistics; default: none. `offload`: the store in which the network rests; a network in it is trained further.
    Raises ValueError for an unknown name, a number out of its range, or a device that is not there.
    """
    run = RunSettings(rule=rule, network=network, **settings).completed()
    check_device(run.device)
    decay = {} if run.weight_decay is None else {"weight_decay": run.weight_decay}
    make = partial(models.build, network, data.input_shape, data.classes, run.seed, run.initialisation)
    model = make().to(run.device) if offload is None else offload.build(make, run.seed)
    if sync_batchnorm is not None:
        synchronise(model, sync_batchnorm)
    made = partial(OPTIMIZERS[str(run.optimizer)], lr=run.lr, **decay)
    return find_rule(rule)(
        model,
        optimizer=standardised(made, data.classes) if run.standardise else made,
        loss_fn=LOSSES[str(run.loss)],
        feedback=feedback_of(run),
        offload=offload,
        **options_of(run),
    )


def train(
    rule: str,
    network: str,
    data: Data,
    epochs: int | None = None,
    batch_size: int | None = None,
    *,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    seed: int = 0,
    group: Group | None = None,
    sync_batchnorm: bool = False,
    offload: Disk | None = None,
    **settings: Any,
) -> tuple[Rule, History]:
    """Train a network with a rule; return the rule and the history. A setting of None is the network's own.

    With a `folder`, history.csv and checkpoint.pt are written there, and a run in it is resumed, or starts anew
    with `overwrite`. `offload`: the store in which the network rests, together with the run's checkpoint. `group`: the
    processes that train together (`ml.distributed.ranks`), with BatchNorm's statistics over all of them if
    `sync_batchnorm`. `settings`: more of `RunSettings`. Raises ValueError for impossible settings, and what
    `ml.fit` raises.
    """
    run = RunSettings(rule=rule, network=network, epochs=epochs, batch_size=batch_size, seed=seed, **settings)
    run = run.completed()
    own: dict[str, Any] = {"sync_batchnorm": group if sync_batchnorm else None, "offload": offload}
    learner = make_rule(rule, network, data, **own, seed=seed, **settings)
    if group is not None:
        learner.group = group
    checkpoint = offload.folder if offload else None if folder is None else Path(folder) / "checkpoint.pt"
    how: dict[str, Any] = {
        "seed": seed,
        "drop_last": run.drop_last,
        "augment": datasets.flip_and_crop() if run.augment else None,
        "checkpoint": checkpoint,
        "overwrite": overwrite,
        "progress": progress,
    }
    history = fit(learner, data, int(run.epochs or 0), int(run.batch_size or 0), **how)
    if folder is not None and learner.group.rank == 0:
        history.to_csv(Path(folder) / "history.csv")
    return learner, history


def compare(
    network: str,
    data: Data,
    rules: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    batch_size: int | None = None,
    *,
    folder: str | Path | None = None,
    **settings: Any,
) -> tuple[pd.DataFrame, dict[tuple[str, int], Rule]]:
    """Train a network with each rule from each seed; the other arguments are those of `train`.

    Returns the histories in one table with the columns rule and seed in front, and the trained rules by (rule, seed).
    With a `folder`, each run has a folder of its own in it, RULE/seedSEED. Raises ValueError if `rules` or `seeds` is
    empty or not a list.
    """
    if isinstance(rules, str) or not rules or not isinstance(seeds, Sequence) or not seeds:
        raise ValueError(
            f"rules and seeds must be lists, such as ['bp', 'memdfa'] and [0, 1], got {rules!r} and {seeds!r}"
        )
    tables, trained = [], {}
    for rule in rules:
        for seed in seeds:
            place = None if folder is None else Path(folder) / rule / f"seed{seed}"
            learner, history = train(rule, network, data, epochs, batch_size, folder=place, seed=seed, **settings)
            trained[rule, seed] = learner
            tables.append(history.table.assign(rule=rule, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table[["rule", "seed", *table.columns.drop(["rule", "seed"])]], trained


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per rule from the table of `compare`: means over seeds in the last epoch, and the total time.

    If the table has accuracies, their means and the standard deviation over seeds are included.
    """
    runs = table.groupby(["rule", "seed"], sort=False)
    rules = runs.last().assign(seconds=runs["seconds"].sum()).groupby("rule", sort=False)
    columns = {
        "seeds": ("loss", "size"),
        "train_loss": ("loss", "mean"),
        "test_accuracy": ("test_accuracy", "mean"),
        "test_accuracy_std": ("test_accuracy", "std"),
        "train_accuracy": ("train_accuracy", "mean"),
        "seconds": ("seconds", "mean"),
    }
    return rules.agg(**{name: of for name, of in columns.items() if of[0] in table}).reset_index()


def profile(
    rule: str,
    network: str,
    batch_size: int,
    optimizer: str = "sgd",
    feedback_kind: str | Feedback = "regenerated",
    measured: bool = False,
    seed: int = 0,
    device: str = CPU,
    **options: Any,
) -> memory.Trace:
    """Return the memory of a step in the steady state, from names: predicted or, if `measured`, on random data.

    The loss is the network's own; a prediction also takes `loss_fn`. `feedback_kind` may be a Feedback; `options` go to
    the rule. Raises ValueError for unknown names, a batch size below 1, and a device for a prediction.
    """
    check_int("the batch size", batch_size)
    if check_device(device) != CPU and not measured:
        raise ValueError("device is for a measured step: leave it out with --predict, --budget or measured=False")
    if measured:
        step = example_step(rule, network, batch_size, optimizer, feedback_kind, seed, device=device, **options)
        return memory.measure(*step, warm_up=1)
    build, shape, how = _to_predict(network, optimizer, feedback_kind, seed)
    return memory.predict(rule, build, (batch_size, *shape), **{**how, **options})


def sizes(
    rule: str,
    network: str,
    budget: int | str,
    optimizer: str = "sgd",
    feedback_kind: str | Feedback = "regenerated",
    **options: Any,
) -> dict[str, float]:
    """Return the sizes of a rule that are known before it runs; the arguments are those of `profile`.

    "B": the bytes of all its matrices, kept or not. "s to draw B": the seconds that drawing them takes here, estimated
    from a matrix of a million numbers. "largest batch": the largest that fits in the budget, 0 if not one example
    does. Raises ValueError for unknown names and for a budget that is no size.
    """
    build, shape, how = _to_predict(network, optimizer, feedback_kind)
    B = sizing.feedback_bytes(rule, build, shape, **how, **options)
    seconds = seconds_a_number(how["feedback"].distribution) * B / 4
    held = sizing.held_bytes(rule, build, shape, **how, **options)
    return {"B": B, "s to draw B": seconds, "largest batch": sizing.largest(held, memory.bytes_of(budget))}


def _to_predict(
    network: str, optimizer: str, feedback_kind: str | Feedback, seed: int = 0
) -> tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]:
    """Return a function that makes the network, the shape of an example, and further arguments of `memory.predict`."""
    how = {
        "optimizer": partial(lookup("optimizer", optimizer, OPTIMIZERS), lr=1e-6),
        "feedback": named_feedback(feedback_kind, seed),
        "loss_fn": LOSSES[models.get(network).loss],
    }
    return partial(models.build, network), models.input_shape(network), how
