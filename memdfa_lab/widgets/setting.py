"""What a setting holds in memory, as tables: all that the memory explorer shows, without a browser.

Nothing is trained and nothing is fitted: the numbers are those of `memory.predict`, to the byte.
"""

import html
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from memdfa_lab import figures, memory
from memdfa_lab.core.checks import check_int, check_type, lookup
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import models
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.lab.experiments import OPTIMIZERS
from memdfa_lab.memory.deep import Chain, largest
from memdfa_lab.memory.trace import CATEGORIES, Trace, readable
from memdfa_lab.rivals import BASELINES
from memdfa_lab.widgets.base import changed, chosen
from memdfa_lab.widgets.base import table as html_table

ALL_RULES = {rule: figures.STYLES[rule][0] for rule in (*RULES, *BASELINES)}
CURVE = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000)
IMAGES = {784: (1, 28, 28), 3072: (3, 32, 32), 150_528: (3, 224, 224)}  # (C, H, W) of so many inputs
FAMILIES = {"mlp": "MLP", "convnet": "3x3 convolutions"}  # of equal hidden layers
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OF_A_CHAIN = (
    "family", "inputs", "width", "classes", "activation", "batch_norm", "optimizer", "feedback", "precision"
)  # fmt: skip
MOST_LAYERS = 10_000  # that are tried against the budget
MOMENTS = 500  # drawn of a step; of more, the fullest of each stretch
LIMITS = {"depth": 1000, "width": 16_384, "batch": 100_000, "inputs": 1_000_000, "classes": 100_000}


@dataclass(frozen=True)
class Setting:
    """What is chosen: a network of `depth` equal hidden layers, a batch, a budget, and the rules to compare.

    `width`: units of an MLP's layer, filters of a convnet's. `precision` is that of weights, batch and all the rest.
    Raises TypeError or ValueError, one line, for what cannot be.
    """

    family: str = "mlp"
    depth: int = 32
    width: int = 800
    batch: int = 128
    inputs: int = 784
    classes: int = 10
    activation: str = "relu"
    batch_norm: bool = False
    optimizer: str = "sgd"
    feedback: str = "regenerated"
    precision: str = "float32"
    rules: tuple[str, ...] = tuple(RULES)
    budget: str = "8 GiB"
    count_rest: bool = False  # draw what rests, too, and not only what a step adds to it

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            object.__setattr__(self, name, check_int(name, getattr(self, name), 1, most))
        lookup("activation", self.activation, ACTIVATIONS)
        lookup("optimizer", self.optimizer, OPTIMIZERS)
        lookup("feedback", self.feedback, KINDS)
        lookup("family", self.family, FAMILIES)
        lookup("precision", self.precision, PRECISIONS)
        if self.family == "convnet" and self.inputs not in IMAGES:
            sizes = ", ".join(f"{inputs:,} ({'x'.join(map(str, shape))})" for inputs, shape in IMAGES.items())
            raise ValueError(f"a convnet takes images, of {sizes} inputs, got {self.inputs:,}: choose an mlp")
        object.__setattr__(self, "rules", tuple(chosen(self.rules, ALL_RULES)))
        for name in ("batch_norm", "count_rest"):
            check_type(name, getattr(self, name), bool, "True or False")
        check_type("budget", self.budget, str, "a size with its unit, such as '8 GiB'")
        if self.batch_norm and self.batch == 1:
            raise ValueError("BatchNorm needs two examples or more to train: choose a larger batch, or leave it out")
        bytes_of(self.budget)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The batch's shape."""
        return self.batch, *(IMAGES[self.inputs] if self.family == "convnet" else (self.inputs,))

    @property
    def title(self) -> str:
        """The setting in a line, rules and budget left out."""
        norm = ", BatchNorm" if self.batch_norm else ""
        kind = {"mlp": "", "convnet": "convolutions "}[self.family]
        net = f"{kind}{self.inputs}-[{self.width}]x{self.depth}-{self.classes}, {self.activation}{norm}"
        return f"{net}, batch {self.batch:,}, {self.optimizer}, B {self.feedback}, {self.precision}"

    @property
    def code(self) -> str:
        """One line of Python that predicts the same peaks, all of the network at once."""
        shape = IMAGES[self.inputs] if self.family == "convnet" else self.inputs
        net = f"ml.models.{self.family}({shape}, [{self.width}] * {self.depth}, {self.classes}, {self.activation!r}"
        net += ", batch_norm=True)" if self.batch_norm else ")"
        net += {"float32": "", "bfloat16": ".bfloat16()", "float64": ".double()"}[self.precision]
        optimizer = f"ml.experiments.OPTIMIZERS[{self.optimizer!r}]"
        feedback = f"ml.feedback.KINDS[{self.feedback!r}]()"
        call = f"ml.memory.predict(rule, lambda: {net}, {self.x_shape}, {optimizer}, {feedback})"
        return f"{{rule: {call} for rule in {list(self.rules)}}}"


@dataclass(frozen=True)
class Explored:
    """What follows from a setting; in bytes, but for `largest_batch` (examples) and `deepest` (hidden layers).

    `table`: a row a rule: its peak above rest and what that is made of; what rests, and both together; what fits the
    budget, while one example or one layer more does not (0: nothing fits; MOST_LAYERS: as many, or more).
    `curve`: the columns rule, depth and bytes. `steps`: label -> moments of a step, a column of bytes a category.
    """

    setting: Setting
    table: pd.DataFrame
    curve: pd.DataFrame
    steps: dict[str, pd.DataFrame]

    def depth_figure(self) -> Figure:
        """Draw bytes against depth, a line a rule."""
        rest = self.setting.count_rest
        what = "peak, with what rests (MiB)" if rest else "peak above rest (MiB)"
        budget = bytes_of(self.setting.budget) if rest else None
        return figures.peak_at_depth(self.curve, self.setting.depth, what, budget)

    def steps_figure(self) -> Figure:
        """Draw one step of each rule."""
        return figures.step_profiles(self.steps, "held (MiB)" if self.setting.count_rest else "above rest (MiB)")

    def summary(self) -> str:
        """Say the peaks in words, for those who cannot see the figures."""
        peaks = zip(self.table["rule"], self.table["peak_bytes"], strict=True)
        said = ", ".join(f"{ALL_RULES[rule]} {readable(peak)}" for rule, peak in peaks)
        return f"Peaks above rest, {self.setting.depth:,} hidden layers: {said}."

    def html(self) -> str:
        """Return the numbers as two tables."""
        table, setting = self.table, self.setting
        names = {"peak_bytes": "peak above rest", **{name: f"of it {name}" for name in CATEGORIES if name in table}}
        names |= {"resting_bytes": "at rest", "held_bytes": "peak + rest"}
        held = [[ALL_RULES[row["rule"]], *(_size(row[name]) for name in names)] for _, row in table.iterrows()]
        fits = [
            [ALL_RULES[row["rule"]], f"{row['largest_batch']:,}" if row["largest_batch"] else "none", _depth(row)]
            for _, row in table.iterrows()
        ]
        batch, depth = f"largest batch, at {setting.depth:,} layers", f"most hidden layers, at batch {setting.batch:,}"
        return (
            # In a grid, so that wide tables scroll by themselves.
            "<div style='line-height:1.4;display:grid;grid-template-columns:minmax(0,1fr)'>"
            f"<p><b>One step</b> ({html.escape(setting.title)}; point at a number for its bytes)</p>"
            f"{html_table(['rule', *names.values()], held)}"
            f"<p><b>What fits into {html.escape(setting.budget)}</b>, peak and rest together; one more does not</p>"
            f"{html_table(['rule', batch, depth], fits)}</div>"
        )


def explore(setting: Setting | None = None, **changes: Any) -> Explored:
    """Return what a setting holds in memory: `explore(depth=100, optimizer="adam")`, or that of an explorer.

    Raises TypeError or ValueError, one line, for a setting that cannot be.
    """
    setting = changed("setting", setting, Setting, changes)
    rows, curves, steps = [], [], {}
    for rule in setting.rules:
        row, curve, moments = _of_one_rule(replace(setting, rules=(rule,)))
        rows.append(row)
        curves.append(curve)
        steps[ALL_RULES[rule]] = moments.copy()
    table = pd.DataFrame(rows)
    every = ["peak_bytes", *CATEGORIES, "resting_bytes", *(f"resting {name}" for name in CATEGORIES), "held_bytes"]
    table = table[["rule", *(name for name in every if name in table), "largest_batch", "deepest"]]
    table = table.fillna(0).astype(dict.fromkeys(table.columns.drop("rule"), int))
    return Explored(setting, table, pd.concat(curves, ignore_index=True), steps)


@lru_cache(maxsize=1000)
def _of_one_rule(setting: Setting) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Return a row of the table, a line of the curve and the moments of a step for the setting's only rule."""
    (rule,) = setting.rules
    chain, depth, budget = chain_of(rule, setting), setting.depth, bytes_of(setting.budget)
    trace = chain.trace(depth + 1)
    deepest = largest(chain.held_bytes, budget, 2, MOST_LAYERS + 1)
    row = {
        "rule": rule,
        "peak_bytes": trace.peak_bytes,
        **trace.peak_by_category,
        "resting_bytes": trace.resting_bytes,
        **{f"resting {name}": value for name, value in trace.resting_by_category.items()},
        "held_bytes": trace.peak_bytes + trace.resting_bytes,
        "largest_batch": largest(
            lambda batch: chain_of(rule, setting, batch).held_bytes(depth + 1), budget, 2 if setting.batch_norm else 1
        ),
        "deepest": max(0, deepest - 1),
    }
    depths = sorted({*CURVE, depth})
    counted = chain.held_bytes if setting.count_rest else lambda blocks: chain.trace(blocks).peak_bytes
    curve = pd.DataFrame({"rule": rule, "depth": depths, "bytes": [counted(layers + 1) for layers in depths]})
    return row, curve, _moments(trace, setting.count_rest)


def bytes_of(text: str) -> int:
    """Return how many bytes "8 GiB" or "500 MB" are; ValueError if it is not a size."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ") if found else 0
    if not 1 <= size < math.inf:
        raise ValueError(f"the budget must be a size such as 8 GiB, 500 MB or 640 KiB, got {text!r}")
    return int(size)


def chain_of(rule: str, setting: Setting, batch: int | None = None) -> Chain:
    """Return the steps of a rule in networks of this kind at any depth, at another batch if given."""
    kind = Setting(**{name: getattr(setting, name) for name in OF_A_CHAIN}, batch=2)
    return _chain(rule, kind, setting.batch if batch is None else batch)


@lru_cache(maxsize=1000)
def _chain(rule: str, setting: Setting, batch: int) -> Chain:
    s, image = setting, setting.x_shape[1:]
    size: Any = image if s.family == "convnet" else s.inputs
    make: Any = {"mlp": models.mlp, "convnet": models.convnet}[s.family]

    def predict(blocks: int) -> Trace:
        def network() -> torch.nn.Module:
            net = make(size, [s.width] * (blocks - 1), s.classes, s.activation, s.batch_norm)
            return net.to(PRECISIONS[s.precision])

        return memory.predict(rule, network, (batch, *image), OPTIMIZERS[s.optimizer], KINDS[s.feedback]())

    return Chain(predict, segmented=rule.startswith("checkpoint"))


def _moments(trace: Trace, count_rest: bool) -> pd.DataFrame:
    """Return what is held at up to MOMENTS moments of a step, a column a category; of each stretch, the fullest."""
    totals, categories = trace.totals[1:], np.array([event.storage.category for event in trace.events])
    edges = np.unique(np.linspace(0, len(totals), min(MOMENTS, len(totals)) + 1, dtype=int))
    at = np.array([start + totals[start:stop].argmax() for start, stop in pairwise(edges)])
    held = {}
    for name in CATEGORIES:
        alive = np.where(categories == name, trace.changes, 0).cumsum()[at]
        rest = trace.resting_by_category.get(name, 0) if count_rest else 0
        if alive.any() or rest:
            held[name] = alive + rest
    # The fullest moment is in the same phase for every block; these go through all of them.
    anywhere = [start + i % (stop - start) for i, (start, stop) in enumerate(pairwise(edges))]
    return pd.DataFrame({"phase": [trace.events[i].phase for i in anywhere], **held})


def _size(value: int) -> str:
    return f"<span title='{value:,} bytes'>{readable(value)}</span>"


def _depth(row: Any) -> str:
    found = row["deepest"]
    return f"{found:,} or more" if found == MOST_LAYERS else f"{found:,}" if found else "none"
