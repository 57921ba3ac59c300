"""The experiments of the paper's comparison, and which of them fit into a time budget.

They are listed in `plan.toml` beside this file, the most valuable first.
"""

import itertools
import json
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

import pandas as pd
from pydantic import Field, model_validator

from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import models
from memdfa_lab.lab.datasets import SIZES
from memdfa_lab.lab.settings import Checked, Count, NameOf, Network, Positive, RuleName, RunSettings

FEWEST = 1 / 4  # least part of an experiment's epochs; if fewer fit into a budget, it is left out
# settings that only some rules have; they are searched for these rules alone
TAUGHT_BY_B = [name for name, rule in ALL_RULES.items() if rule.uses_feedback]
SEARCHED_FOR = {
    "distribution": TAUGHT_BY_B,
    "scale": TAUGHT_BY_B,
    "initialisation": TAUGHT_BY_B,
    "feedback_lr": [name for name, rule in ALL_RULES.items() if rule.teaches_feedback],
    "readout_similarity": ["local_readout"],
}
SCHEDULES = ("constant", "cosine")
ScheduleName = Annotated[str, NameOf("schedule", dict.fromkeys(SCHEDULES))]
Settings = dict[str, Any]


class Experiment(Checked):
    """Setting: the settings of an experiment, which is one network on one data set, trained by several rules."""

    name: str
    network: Network
    dataset: str
    seeds: dict[RuleName, list[int]] = Field(description="for each rule, in order of value")
    epochs: Count
    epoch_s: Positive = Field(description="about how many seconds an epoch takes; a time budget counts with it")
    why: str
    batch_size: Count | None = Field(None, description="None: the network's own")
    images: Count | None = Field(None, description="how many training images are used, the first ones; None: all")
    schedule: ScheduleName = "constant"
    settings: Settings = Field({}, description="options of `ml.experiments.make_rule`; others are the network's own")
    search: dict[str, list[Any]] = Field({}, description="setting -> values that are tried on held-out training images")
    search_epochs: int = Field(0, ge=0)
    search_images: Count | None = Field(None, description="training images of a trial; None: all that are not held out")
    angles: bool = Field(False, description="whether the angle to BP of each block is measured after each epoch")
    goal: dict[RuleName, float] = Field({}, description="the test error aimed at, in percent")

    @model_validator(mode="after")
    def _settings_are_known(self) -> Self:
        if self.search_images is not None and self.images is None and self.dataset not in SIZES:
            raise ValueError(f"search_images needs images for {self.dataset}, whose size is not known: set images, too")
        for rule in self.seeds:
            for chosen in self.tried(rule):
                self.complete(rule, self.options(chosen))
        return self

    @property
    def batch(self) -> int:
        """Examples a step: its own batch size, or the network's."""
        return self.batch_size or models.get(self.network).batch_size

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Rule and seed of each training run: the first seed of every rule, then the second."""
        nth = itertools.zip_longest(*([(rule, seed) for seed in seeds] for rule, seeds in self.seeds.items()))
        return [run for run in itertools.chain.from_iterable(nth) if run is not None]

    @property
    def seconds(self) -> float:
        """About how many seconds the whole experiment takes."""
        trials = sum(len(self.tried(rule)) for rule in {searched_as(rule) for rule in self.seeds})
        part = 1.0 if self.search_images is None else self.search_images / (self.images or SIZES[self.dataset][0][0])
        return self.epoch_s * (trials * self.search_epochs * part + len(self.runs) * self.epochs)

    def tried(self, rule: str) -> list[Settings]:
        """Return all settings that are tried for a rule; one empty dict if nothing is searched."""
        searched = {name: values for name, values in self.search.items() if rule in SEARCHED_FOR.get(name, (rule,))}
        return [dict(zip(searched, values, strict=True)) for values in itertools.product(*searched.values())]

    def options(self, chosen: Settings) -> Settings:
        """Return the settings of a run, as `make_rule` takes them."""
        return {**self.settings, **chosen}

    def described(self, chosen: Settings) -> str:
        """Return all that the plan sets in a run, as text for a table."""
        rest: Settings = {"batch_size": self.batch, "schedule": self.schedule}
        if self.images is not None:
            rest["images"] = self.images
        return json.dumps({**self.options(chosen), **rest})

    def complete(self, rule: str, stated: Settings) -> Settings:
        """Return all settings of a run: the stated ones, and the network's own for the rest."""
        rest = {"schedule": stated.get("schedule", "constant"), "images": stated.get("images")}
        run = run_of(rule, self.network, self.dataset, stated)
        return run.model_dump(exclude={"epochs"}) | rest

    def has(self, rule: str, described: str) -> bool:
        """Tell whether a run with these settings is one of the experiment, with any of the settings that it tries."""
        stated = (json.loads(self.described(chosen)) for chosen in self.tried(rule))
        found = self.complete(rule, json.loads(described))
        return any(self.complete(rule, settings) == found for settings in stated)


def run_of(rule: str, network: str, dataset: str, stated: Settings) -> RunSettings:
    """Return all settings of a run from those that a table states, except schedule and images."""
    ours = {name: stated[name] for name in stated if name not in ("schedule", "images")}
    return RunSettings(rule=rule, network=network, dataset=dataset, **ours).completed()


@cache
def experiments() -> tuple[Experiment, ...]:
    """Return the experiments, the most valuable first."""
    with Path(__file__).with_name("plan.toml").open("rb") as file:
        return tuple(Experiment(**entry) for entry in tomllib.load(file)["experiment"])


def within(wanted: Sequence[Experiment], budget_s: float) -> tuple[list[Experiment], list[str]]:
    """Return the experiments that fit into a time, and one line for each that was shortened or left out.

    In order of value, each experiment gets all its epochs if they fit, or fewer (at least a quarter), or is left out.
    """
    chosen: list[Experiment] = []
    lines = []
    for one in wanted:
        left = budget_s - sum(other.seconds for other in chosen)
        of_epochs = one.epoch_s * len(one.runs) * one.epochs
        fitting = min(one.epochs, int((left - (one.seconds - of_epochs)) / of_epochs * one.epochs + 1e-9))
        if fitting < max(1, one.epochs * FEWEST):
            lines.append(f"left out: {one.name} (about {one.seconds / 60:.0f} min)")
        else:
            chosen.append(one.changed(epochs=fitting))
            if fitting < one.epochs:
                lines.append(f"shortened: {one.name}, {fitting} epochs of {one.epochs}")
    return chosen, lines


def current(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of runs that have the plan's settings, and of experiments that are not in the plan."""
    plan = {one.name: one for one in experiments()}
    runs = table[["experiment", "rule", "settings"]].drop_duplicates()
    kept = [name not in plan or plan[name].has(rule, text) for name, rule, text in runs.itertuples(index=False)]
    return table.merge(runs.loc[kept])


def unfinished(wanted: Sequence[Experiment], histories: pd.DataFrame) -> list[Experiment]:
    """Return the unfinished experiments, each with only those seeds that have not been run for all epochs.

    A run counts only if it has the plan's current settings: one with another batch size is to be run again.
    """
    ended = histories[histories["epoch"] == histories["epochs"]]
    left = []
    for one in wanted:
        rows = ended[(ended["experiment"] == one.name) & (ended["epochs"] >= one.epochs)]
        done = {(row.rule, row.seed) for row in rows.itertuples() if one.has(str(row.rule), str(row.settings))}
        seeds = {rule: [seed for seed in seeds if (rule, seed) not in done] for rule, seeds in one.seeds.items()}
        left.append(one.changed(seeds={rule: some for rule, some in seeds.items() if some}))
    return [one for one in left if one.seeds]


def searched_as(rule: str) -> str:
    """Return the rule whose search gives a rule's settings: MEM-DFA for DFA, since their updates are the same."""
    return "memdfa" if rule == "dfa" else rule
