"""The paper's comparison: experiments as a list, run in order of value, cut or resumed at will, and their tables.

`paper.toml` beside this file is the list. Each experiment first chooses a learning rate (and what else its `search`
names) for each rule on a part of the training images, the same small search for every rule; then it trains on all of
them, from each seed, and looks at the test images. What was finished is never run again.
"""

import argparse
import itertools
import json
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memdfa_lab import alignment, experiments, models
from memdfa_lab.files import write_text
from memdfa_lab.fit import fit
from memdfa_lab.names import known
from memdfa_lab.rules import RULES, Rule

if TYPE_CHECKING:
    import pandas as pd

    from memdfa_lab.datasets import Data

SEARCH_ON = 1 / 6  # of the training images, held out: 10,000 of MNIST, 8,333 of CIFAR-10
FEWEST = 1 / 4  # of an experiment's epochs, to fit a budget; with less it is left out
OF_FEEDBACK = ("distribution", "scale")  # settings that BP does not have, and are not searched for it
PROBE = 500  # training images, the first ones, on which angles are taken
SCHEDULES: dict[str, Callable[[int], Any]] = {
    "constant": lambda epochs: None,
    "cosine": lambda epochs: partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
}
# table -> the files of which it is made, in OUT/runs, and the columns that tell its rows apart
TABLES = {
    "histories": ("*/*/seed*/history.csv", ["experiment", "rule", "seed", "epochs", "epoch"]),
    "choices": ("*/*/search.csv", ["experiment", "rule", "settings", "epochs"]),
}


@dataclass(frozen=True)
class Experiment:
    """One network on one data set, trained by several rules.

    `seeds`: for each rule, in order of value. `settings` go to `ml.experiments.make_rule`, those of `by_rule` for one
    rule alone; the rest is the network's own. `search`: for each name of a setting the values tried on held-out
    training images, for `search_epochs`. `epoch_s`: how long an epoch takes, roughly, for a budget to reckon with.
    `angles`: the angle to BP of each block is taken after each epoch. `goal`: the test error aimed at, in percent.
    """

    name: str
    network: str
    dataset: str
    seeds: dict[str, list[int]]
    epochs: int
    epoch_s: float
    why: str
    batch_size: int | None = None
    schedule: str = "constant"
    settings: dict[str, Any] = field(default_factory=dict)
    by_rule: dict[str, dict[str, Any]] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    search_epochs: int = 0
    angles: bool = False
    goal: dict[str, float] = field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Rule and seed of each training run: the first seed of every rule, then the second."""
        nth = itertools.zip_longest(*([(rule, seed) for seed in seeds] for rule, seeds in self.seeds.items()))
        return [run for run in itertools.chain.from_iterable(nth) if run is not None]

    @property
    def seconds(self) -> float:
        """How long all of it takes, roughly."""
        trials = sum(len(self.tried(rule)) for rule in {_searched_as(rule) for rule in self.seeds})
        return self.epoch_s * (trials * self.search_epochs + len(self.runs) * self.epochs)

    def tried(self, rule: str) -> list[dict[str, Any]]:
        """Return what is tried for a rule, each as settings; where nothing is searched, one empty choice."""
        searched = {name: values for name, values in self.search.items() if rule != "bp" or name not in OF_FEEDBACK}
        return [dict(zip(searched, values, strict=True)) for values in itertools.product(*searched.values())]

    def options(self, rule: str, chosen: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a run, as they go to `make_rule`."""
        return {**self.settings, **self.by_rule.get(rule, {}), **chosen}

    def described(self, rule: str, chosen: dict[str, Any]) -> str:
        """Return all that a run is set to, as text for a table."""
        rest = {"batch_size": _batch_size(self), "schedule": self.schedule}
        return json.dumps({**self.options(rule, chosen), **rest})


@cache
def plan() -> tuple[Experiment, ...]:
    """Return the experiments, the most valuable first."""
    with Path(__file__).with_name("paper.toml").open("rb") as file:
        return tuple(Experiment(**entry) for entry in tomllib.load(file)["experiment"])


def seconds(text: str) -> float:
    """Return a time such as 2h, 90m, 1h30m or 45s in seconds. Raises ArgumentTypeError, for the command line."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", text.strip())
    if not text.strip() or parts is None:
        raise argparse.ArgumentTypeError(f"a time is given as 2h, 90m or 1h30m, got {text!r}")
    return sum(float(value or 0) * unit for value, unit in zip(parts.groups(), (3600, 60, 1), strict=True))


def within(wanted: Sequence[Experiment], budget_s: float) -> tuple[list[Experiment], list[str]]:
    """Return what fits into a time, and a line for each experiment that was shortened or left out.

    In order of value: each whole if it fits, else with fewer epochs (a quarter at least), else not at all.
    """
    chosen: list[Experiment] = []
    said = []
    for one in wanted:
        left = budget_s - sum(other.seconds for other in chosen)
        of_epochs = one.epoch_s * len(one.runs) * one.epochs
        fitting = min(one.epochs, int((left - (one.seconds - of_epochs)) / of_epochs * one.epochs + 1e-9))
        if fitting < max(1, one.epochs * FEWEST):
            said.append(f"left out: {one.name} (about {one.seconds / 60:.0f} min)")
        else:
            chosen.append(replace(one, epochs=fitting))
            if fitting < one.epochs:
                said.append(f"shortened: {one.name}, {fitting} epochs of {one.epochs}")
    return chosen, said


def unfinished(wanted: Sequence[Experiment], histories: "pd.DataFrame") -> list[Experiment]:
    """Return the experiments with the seeds that have not been run for all epochs; those without any are left out."""
    rows = histories[histories["epoch"] == histories["epochs"]]
    ended: dict[Any, int] = rows.groupby(["experiment", "rule", "seed"])["epochs"].max().to_dict()
    left = []
    for one in wanted:
        seeds = {
            rule: [seed for seed in seeds if ended.get((one.name, rule, seed), 0) < one.epochs]
            for rule, seeds in one.seeds.items()
        }
        left.append(replace(one, seeds={rule: some for rule, some in seeds.items() if some}))
    return [one for one in left if one.seeds]


def run(
    out: str | Path,
    only: Sequence[str] = (),
    budget_s: float | None = None,
    root: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Experiment]:
    """Run the experiments that are not done yet, keep the tables up to date, and return what was to be run.

    `only`: experiments by name. OUT/histories.csv and OUT/choices.csv tell what is done; a run has a folder,
    OUT/runs/NAME/RULE/seedS-EPOCHS, with a checkpoint from which it goes on if it was cut. The times are for a machine
    that nobody else uses; when the budget is used up, no other run is begun.
    Raises ValueError for an unknown name or a budget below a minute.
    """
    started, out = time.monotonic(), Path(out)
    every = {one.name: one for one in plan()}
    wanted = [known("experiment", name, every) for name in only] or list(every.values())
    if budget_s is not None and budget_s < 60:
        raise ValueError(f"the budget must be a minute or more, got {budget_s:g} s")
    todo = unfinished(wanted, read(out, "histories"))
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} experiments are in {out / 'histories.csv'} already")
    if budget_s is not None:
        todo, said = within(todo, budget_s)
        for line in said:
            say(line)
    done_s, left_s = 0.0, sum(one.seconds for one in todo)
    for one in todo:
        pace = (time.monotonic() - started) / done_s if done_s else 1.0  # of this machine, against the plan
        data = experiments.load_for(one.network, one.dataset, root)
        say(f"{one.name}: {one.network} on {data.name}, {one.epochs} epochs; about {left_s * pace / 60:.0f} min left")
        for rule, seed in one.runs:
            if budget_s is not None and time.monotonic() - started > budget_s:
                say(f"the time is up in {one.name}, before {rule}, seed {seed}: the same command goes on from there")
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
    one: Experiment, rule: str, data: "Data", out: str | Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Return the settings with which the rule does best on held-out training images; looked up if it was done before.

    DFA's choice is MEM-DFA's: their updates are the same.
    """
    if not one.search:
        return {}
    import pandas as pd

    rule, out = _searched_as(rule), Path(out)
    before = read(out, "choices")
    before = before[(before["experiment"] == one.name) & (before["rule"] == rule)]
    before = before[before["epochs"] == one.search_epochs]
    known_already = dict(zip(before["settings"], before["held_out_accuracy"], strict=True))
    trials = {one.described(rule, settings): settings for settings in one.tried(rule)}
    rows: list[dict[str, Any]] = []
    for described, settings in trials.items():
        if described in known_already:
            accuracy = float(known_already[described])
        else:
            accuracy = _held_out_accuracy(one, rule, settings, data)
            of, epochs = "of held-out training images", one.search_epochs
            say(f"  {rule} with {settings}: {accuracy:.2%} {of} after {epochs} epochs")
        columns = {"experiment": one.name, "rule": rule, "settings": described, "epochs": one.search_epochs}
        rows.append({**columns, "held_out_accuracy": accuracy})
        write_text(out / "runs" / one.name / rule / "search.csv", pd.DataFrame(rows).to_csv(index=False))
    return trials[max(rows, key=lambda row: row["held_out_accuracy"])["settings"]]


def _held_out_accuracy(one: Experiment, rule: str, settings: dict[str, Any], data: "Data") -> float:
    made = experiments.make_rule(rule, one.network, data, **one.options(rule, settings))
    scheduler = known("schedule", one.schedule, SCHEDULES)(one.search_epochs)
    held_out = data.holdout(SEARCH_ON)
    try:
        history = fit(made, held_out, one.search_epochs, _batch_size(one), scheduler=scheduler)
    except FloatingPointError:
        return 0.0  # it ran away
    return float(history.table["test_accuracy"].iloc[-1])


def train(
    one: Experiment, rule: str, seed: int, chosen: dict[str, Any], data: "Data", out: str | Path
) -> "pd.DataFrame":
    """Train, or go on training, with what was chosen; return the history, read from its file if it was done before."""
    import pandas as pd

    folder = Path(out) / "runs" / one.name / rule / f"seed{seed}-{one.epochs}"
    checkpoint, file = folder / "checkpoint.pt", folder / "history.csv"
    if file.exists():
        return pd.read_csv(file)
    made = experiments.make_rule(rule, one.network, data, seed=seed, **one.options(rule, chosen))
    history = fit(
        made,
        data,
        one.epochs,
        _batch_size(one),
        seed=seed,
        scheduler=known("schedule", one.schedule, SCHEDULES)(one.epochs),
        checkpoint=checkpoint,
        on_epoch=partial(_angles, data) if one.angles and rule != "bp" else None,
    )
    columns: dict[str, Any] = {
        "experiment": one.name,
        "network": one.network,
        "dataset": one.dataset,
        "rule": rule,
        "seed": seed,
    }
    columns |= {"epochs": one.epochs, "settings": one.described(rule, chosen)}
    table = history.table.assign(**columns)
    table = table[[*columns, *(name for name in table if name not in columns)]]
    write_text(file, table.to_csv(index=False))
    checkpoint.unlink()  # as large as the network, or larger
    return table


def _angles(data: "Data", rule: Rule, epoch: int) -> dict[str, float]:
    like = next(rule.blocks.parameters())
    x, y = data.x_train[:PROBE].to(like), data.y_train[:PROBE].to(like.device)
    return {f"angle_{block}_deg": angle for block, angle in enumerate(alignment.angles(rule, x, y), 1)}


def read(out: str | Path, name: str) -> "pd.DataFrame":
    """Return one of TABLES: what stands in OUT/NAME.csv, and what runs finished since; no file is no row."""
    import pandas as pd

    pattern, key = TABLES[name]
    files = [file for file in (Path(out) / f"{name}.csv",) if file.exists()]
    files += sorted((Path(out) / "runs").glob(pattern))
    if not files:
        return pd.DataFrame(columns=[*key, "held_out_accuracy"] if name == "choices" else key)
    table = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    table = table.drop_duplicates(key, keep="last")
    orders = {"experiment": [one.name for one in plan()], "rule": list(RULES)}

    def order(column: "pd.Series[Any]") -> "pd.Series[Any]":
        places = {name: place for place, name in enumerate(orders.get(str(column.name), []))}
        return column.map(places) if places else column

    return table.sort_values(key, key=order, ignore_index=True)


def collect(out: str | Path) -> None:
    """Write the tables of all runs so far: OUT/histories.csv (a row an epoch) and OUT/choices.csv (a row a trial).

    Rows that are there already stay, whether or not their runs' folders are still there.
    """
    for name in TABLES:
        table = read(out, name)
        if len(table):
            write_text(Path(out) / f"{name}.csv", table.to_csv(index=False))


def _searched_as(rule: str) -> str:
    return "memdfa" if rule == "dfa" else rule


def _batch_size(one: Experiment) -> int:
    return models.get(one.network).batch_size if one.batch_size is None else one.batch_size
