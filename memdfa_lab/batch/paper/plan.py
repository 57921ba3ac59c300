"""The paper's comparison as a list: which network, data, rules, seeds and settings, and what fits into a time.

`plan.toml` beside this file is the list, in order of value.
"""

import argparse
import itertools
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdfa_lab.lab import models

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 1 / 4  # of an experiment's epochs, to fit a budget; with less it is left out
OF_FEEDBACK = ("distribution", "scale")  # settings that BP does not have, and are not searched for it


@dataclass(frozen=True)
class Experiment:
    """One network on one data set, trained by several rules.

    `seeds`: for each rule, in order of value. `settings` go to `ml.experiments.make_rule`, those of `by_rule` for one
    rule alone; the rest is the network's own. `search`: for each name of a setting the values tried on held-out
    training images, for `search_epochs`. `images`: how many of the training images are used, the first ones; all if
    none is named. `epoch_s`: how long an epoch takes, roughly, for a budget to reckon with. `angles`: the angle to BP
    of each block is taken after each epoch. `goal`: the test error aimed at, in percent.
    """

    name: str
    network: str
    dataset: str
    seeds: dict[str, list[int]]
    epochs: int
    epoch_s: float
    why: str
    batch_size: int | None = None
    images: int | None = None
    schedule: str = "constant"
    settings: dict[str, Any] = field(default_factory=dict)
    by_rule: dict[str, dict[str, Any]] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    search_epochs: int = 0
    angles: bool = False
    goal: dict[str, float] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Examples a step: its own batch size, or the network's."""
        return models.get(self.network).batch_size if self.batch_size is None else self.batch_size

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Rule and seed of each training run: the first seed of every rule, then the second."""
        nth = itertools.zip_longest(*([(rule, seed) for seed in seeds] for rule, seeds in self.seeds.items()))
        return [run for run in itertools.chain.from_iterable(nth) if run is not None]

    @property
    def seconds(self) -> float:
        """How long all of it takes, roughly."""
        trials = sum(len(self.tried(rule)) for rule in {searched_as(rule) for rule in self.seeds})
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
        rest: dict[str, Any] = {"batch_size": self.batch, "schedule": self.schedule}
        if self.images is not None:
            rest["images"] = self.images
        return json.dumps({**self.options(rule, chosen), **rest})


@cache
def experiments() -> tuple[Experiment, ...]:
    """Return the experiments, the most valuable first."""
    with Path(__file__).with_name("plan.toml").open("rb") as file:
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


def searched_as(rule: str) -> str:
    """Return the rule whose search a rule's settings come from: DFA's updates are MEM-DFA's."""
    return "memdfa" if rule == "dfa" else rule
