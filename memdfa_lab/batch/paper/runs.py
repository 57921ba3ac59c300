"""The experiments of the plan, run in order of value, with results in tables; a run can be interrupted and resumed.

An experiment first chooses a learning rate (and other settings, if its `search` names them) for each rule, by the same
small search for every rule, on held-out training images. It then trains on all training images, from each seed, and
evaluates on the test images. A finished run is never repeated.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from memdfa_lab.batch.paper import plan
from memdfa_lab.batch.paper.plan import Experiment
from memdfa_lab.core.checks import lookup
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import alignment, experiments
from memdfa_lab.lab.datasets import Data, flip_and_crop
from memdfa_lab.lab.files import read_csv, write_text
from memdfa_lab.lab.fit import fit

SEARCH_ON = 1 / 6  # of the training images, held out: 10,000 of MNIST, 8,333 of CIFAR-10
PROBE = 500  # the first training images, on which angles are measured
# table -> the files in OUT/runs that it is made of, and the columns that identify a row
TABLES = {
    "histories": ("*/*/seed*/history.csv", ["experiment", "rule", "seed", "epochs", "settings", "epoch"]),
    "choices": ("*/*/search.csv", ["experiment", "rule", "settings", "epochs", "images"]),
}


def run(
    out: str | Path,
    only: Sequence[str] = (),
    budget_s: float | None = None,
    root: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Experiment]:
    """Run the experiments that are not done yet, and keep the tables up to date.

    OUT/histories.csv and OUT/choices.csv record what is done. A run's folder, OUT/runs/NAME/RULE/seedS-EPOCHS-HASH with
    a hash of its settings, has a checkpoint with which an interrupted run continues.

    Args:
        out: The folder of the tables and runs.
        only: Experiments by name; default: all.
        budget_s: Seconds after which no run is started. The plan's times hold for a machine that does nothing else.
        root: Where data sets are kept.
        say: Called with each line of progress.

    Returns:
        The experiments that were to be run.

    Raises:
        ValueError: For an unknown name or a budget below a minute.
    """
    started, out = time.monotonic(), Path(out)
    every = {one.name: one for one in plan.experiments()}
    wanted = [lookup("experiment", name, every) for name in only] or list(every.values())
    if budget_s is not None and budget_s < 60:
        raise ValueError(f"the budget must be a minute or more, got {budget_s:g} s")
    todo = plan.unfinished(wanted, read(out, "histories"))
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} experiments are in {out / 'histories.csv'} already")
    if budget_s is not None:
        todo, lines = plan.within(todo, budget_s)
        for line in lines:
            say(line)
    done_s, left_s = 0.0, sum(one.seconds for one in todo)
    for one in todo:
        pace = (time.monotonic() - started) / done_s if done_s else 1.0  # this machine's time over the plan's
        data = experiments.load_for(one.network, one.dataset, root).subset(train=one.images)
        say(f"{one.name}: {one.network} on {data.name}, {one.epochs} epochs; about {left_s * pace / 60:.0f} min left")
        for rule, seed in one.runs:
            if budget_s is not None and time.monotonic() - started > budget_s:
                say(f"the time is up in {one.name}, before {rule}, seed {seed}: the same command continues there")
                return todo
            try:
                history = train(one, rule, seed, choose(one, rule, data, out, say), data, out)
            except FloatingPointError as problem:
                say(f"  {rule}, seed {seed}: no result, {problem}")
                continue
            error, seconds = 100 * (1 - history["test_accuracy"].iloc[-1]), history["seconds"].sum()
            say(f"  {rule}, seed {seed}: test error {error:.2f} % after {one.epochs} epochs, {seconds:.0f} s")
            collect(out)
        done_s, left_s = done_s + one.seconds, left_s - one.seconds
    return todo


def choose(
    one: Experiment, rule: str, data: Data, out: str | Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Return the settings with which the rule does best on held-out training images.

    Trials that are in the table already are not repeated. DFA's choice is MEM-DFA's: their updates are the same.
    """
    if not one.search:
        return {}
    rule, out, epochs = plan.searched_as(rule), Path(out), one.search_epochs
    before = read(out, "choices")
    key = {"experiment": one.name, "rule": rule, "epochs": epochs, "images": one.search_images or 0}  # 0: all
    before = before[(before[list(key)] == pd.Series(key)).all(axis=1)]
    accuracies = dict(zip(before["settings"], before["held_out_accuracy"], strict=True))
    trials = {one.described(settings): settings for settings in one.tried(rule)}
    rows: list[dict[str, Any]] = []
    for described, settings in trials.items():
        if described not in accuracies:
            accuracies[described] = _held_out_accuracy(one, rule, settings, data)
            of = "of held-out training images"
            say(f"  {rule} with {settings}: {accuracies[described]:.2%} {of} after {epochs} epochs")
        rows.append({**key, "settings": described, "held_out_accuracy": accuracies[described]})
        write_text(out / "runs" / one.name / rule / "search.csv", pd.DataFrame(rows).to_csv(index=False))
    return trials[max(trials, key=accuracies.__getitem__)]


def _held_out_accuracy(one: Experiment, rule: str, settings: dict[str, Any], data: Data) -> float:
    tried_as = "dfa" if rule == "memdfa" else rule  # the same updates, with one forward pass less
    try:
        few = data.holdout(SEARCH_ON).subset(train=one.search_images)
        table = _fit(one, tried_as, settings, few, one.search_epochs)
    except FloatingPointError:
        return 0.0  # it diverged
    return float(table["test_accuracy"].iloc[-1])


def _fit(
    one: Experiment, rule: str, chosen: dict[str, Any], data: Data, epochs: int, seed: int = 0, **how: Any
) -> pd.DataFrame:
    options = one.options(chosen)
    learner = experiments.make_rule(rule, one.network, data, seed=seed, **options)
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs) if one.schedule == "cosine" else None
    how |= {"augment": flip_and_crop() if options.get("augment") else None, "drop_last": bool(options.get("drop_last"))}
    return fit(learner, data, epochs, one.batch, seed=seed, scheduler=cosine, **how).table


def train(one: Experiment, rule: str, seed: int, chosen: dict[str, Any], data: Data, out: str | Path) -> pd.DataFrame:
    """Train with the chosen settings, or continue, and return the history; of a finished run, read it from its file."""
    settings = one.described(chosen)
    name = f"seed{seed}-{one.epochs}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    folder = Path(out) / "runs" / one.name / rule / name
    checkpoint, file = folder / "checkpoint.pt", folder / "history.csv"
    if file.exists():
        return read_csv(file)
    angles = partial(_angles, data) if one.angles and rule != "bp" else None
    table = _fit(one, rule, chosen, data, one.epochs, seed, checkpoint=checkpoint, on_epoch=angles)
    columns: dict[str, Any] = {"experiment": one.name, "network": one.network, "dataset": one.dataset}
    columns |= {"rule": rule, "seed": seed, "epochs": one.epochs, "settings": settings}
    table = table.assign(**columns)
    table = table[[*columns, *(name for name in table if name not in columns)]]
    write_text(file, table.to_csv(index=False))
    checkpoint.unlink()  # as large as the network, or larger
    return table


def _angles(data: Data, rule: Rule, epoch: int) -> dict[str, float]:
    like = next(rule.blocks.parameters())
    x, y = data.x_train[:PROBE].to(like), data.y_train[:PROBE].to(like.device)
    return {f"angle_{block}_deg": angle for block, angle in enumerate(alignment.angles(rule, x, y), 1)}


def read(out: str | Path, name: str) -> pd.DataFrame:
    """Return one of TABLES: the rows of OUT/NAME.csv and of runs finished since; without files, no rows."""
    pattern, key = TABLES[name]
    files = [file for file in (Path(out) / f"{name}.csv",) if file.exists()]
    files += sorted((Path(out) / "runs").glob(pattern))
    if not files:
        return pd.DataFrame(columns=[*key, "held_out_accuracy"] if name == "choices" else key)
    table = pd.concat([read_csv(file) for file in files], ignore_index=True)
    table = table.drop_duplicates(key, keep="last")
    orders = {"experiment": [one.name for one in plan.experiments()], "rule": list(ALL_RULES)}

    def order(column: "pd.Series[Any]") -> "pd.Series[Any]":
        places = {name: place for place, name in enumerate(orders.get(str(column.name), []))}
        return column.map(places) if places else column

    return table.sort_values(key, key=order, ignore_index=True)


def collect(out: str | Path) -> None:
    """Write the tables of all runs so far: OUT/histories.csv (one row per epoch), OUT/choices.csv (one per trial).

    Rows that exist already are kept, even if the folders of their runs are gone.
    """
    for name in TABLES:
        table = read(out, name)
        if len(table):
            write_text(Path(out) / f"{name}.csv", table.to_csv(index=False))
