"""The memory explorer: controls, and the figures and tables that follow from them, drawn at once.

What is shown is computed by `explore`, a function of a setting that knows no browser; `MemoryExplorer` is ipywidgets
around it. Nothing is trained and nothing is fitted: the numbers are those of `memory.predict`, to the byte.
"""

import asyncio
import base64
import html
import io
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab import figures, memory, models
from memdfa_lab.architectures import ACTIVATIONS
from memdfa_lab.baselines import BASELINES
from memdfa_lab.experiments import OPTIMIZERS
from memdfa_lab.feedback import KINDS, SMALL_BYTES
from memdfa_lab.memory.deep import Chain, Step
from memdfa_lab.memory.trace import CATEGORIES, Trace, readable
from memdfa_lab.names import known
from memdfa_lab.rules import RULES

ALL_RULES = {rule: figures.STYLES[rule][0] for rule in (*RULES, *BASELINES)}
CURVE = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000)
WIDTHS = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 400, 512, 800, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1000, 1024, 2048, 4096, 8192, 16_384, 32_768)
SHAPES = {"MNIST: 784 pixels": (784, 10), "CIFAR-10: 3,072 pixels": (3072, 10), "CIFAR-100: 3,072 pixels": (3072, 100)}
OF_A_CHAIN = ("inputs", "width", "classes", "activation", "batch_norm", "optimizer", "feedback")
MOST_LAYERS = 10_000  # that are tried against the budget
MOMENTS = 500  # drawn of a step; of more, the fullest of each stretch
LIMITS = {"depth": 1000, "width": 16_384, "batch": 1_000_000, "inputs": 1_000_000, "classes": 100_000}


@dataclass(frozen=True)
class Setting:
    """What is chosen: an MLP of `depth` equal hidden layers, a batch, a budget, and the rules to compare.

    Raises ValueError, one line, for what cannot be.
    """

    depth: int = 32
    width: int = 800
    batch: int = 128
    inputs: int = 784
    classes: int = 10
    activation: str = "relu"
    batch_norm: bool = False
    optimizer: str = "sgd"
    feedback: str = "regenerated"
    rules: tuple[str, ...] = tuple(RULES)
    budget: str = "8 GiB"
    count_rest: bool = False  # draw what rests, too, and not only what a step adds to it

    def __post_init__(self) -> None:
        for name, largest in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise ValueError(f"{name} must be a whole number from 1 to {largest:,}, got {value!r}")
        known("activation", self.activation, ACTIVATIONS)
        known("optimizer", self.optimizer, OPTIMIZERS)
        known("feedback", self.feedback, KINDS)
        object.__setattr__(self, "rules", tuple(dict.fromkeys(self.rules)))
        for rule in self.rules:
            known("rule", rule, ALL_RULES)
        if not self.rules:
            raise ValueError("no rule is chosen: tick one or more")
        if self.batch_norm and self.batch == 1:
            raise ValueError("BatchNorm needs two examples or more to train: choose a larger batch, or leave it out")
        bytes_of(self.budget)

    @property
    def title(self) -> str:
        norm = ", BatchNorm" if self.batch_norm else ""
        net = f"{self.inputs}-[{self.width}]x{self.depth}-{self.classes}, {self.activation}{norm}"
        return f"{net}, batch {self.batch:,}, {self.optimizer}, B {self.feedback}"

    @property
    def code(self) -> str:
        """One line of Python that predicts the same peaks, all of the network at once."""
        net = f"ml.models.mlp({self.inputs}, [{self.width}] * {self.depth}, {self.classes}, {self.activation!r}"
        net += ", batch_norm=True)" if self.batch_norm else ")"
        optimizer = f"ml.experiments.OPTIMIZERS[{self.optimizer!r}]"
        feedback = f"ml.feedback.KINDS[{self.feedback!r}]()"
        call = f"ml.memory.predict(rule, lambda: {net}, ({self.batch}, {self.inputs}), {optimizer}, {feedback})"
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
            f"{_table(['rule', *names.values()], held)}"
            f"<p><b>What fits into {html.escape(setting.budget)}</b>, peak and rest together; one more does not</p>"
            f"{_table(['rule', batch, depth], fits)}</div>"
        )


def explore(setting: Setting | None = None, **changes: Any) -> Explored:
    """Return what a setting holds in memory: `explore(depth=100, optimizer="adam")`, or that of an explorer.

    Raises ValueError, one line, for a setting that cannot be.
    """
    setting = replace(setting or Setting(), **changes)
    budget, rows, curve, steps = bytes_of(setting.budget), [], [], {}
    for rule in setting.rules:
        chain = _chain(rule, *(getattr(setting, name) for name in OF_A_CHAIN))
        step = chain.step(setting.depth + 1, setting.batch)
        rows.append(
            {
                "rule": rule,
                "peak_bytes": step.peak_bytes,
                **step.peak_by_category,
                "resting_bytes": step.resting_bytes,
                **{f"resting {name}": value for name, value in step.resting_by_category.items()},
                "held_bytes": step.peak_bytes + step.resting_bytes,
                "largest_batch": chain.largest_batch(budget, setting.depth + 1),
                "deepest": _deepest(chain, budget, setting.batch),
            }
        )
        for depth in sorted({*CURVE, setting.depth}):
            held = _held(chain, depth, setting.batch, setting.count_rest)
            curve.append({"rule": rule, "depth": depth, "bytes": held})
        steps[ALL_RULES[rule]] = _moments(step, setting.count_rest)
    table = pd.DataFrame(rows)
    every = ["peak_bytes", *CATEGORIES, "resting_bytes", *(f"resting {name}" for name in CATEGORIES), "held_bytes"]
    table = table[["rule", *(name for name in every if name in table), "largest_batch", "deepest"]]
    return Explored(
        setting, table.fillna(0).astype(dict.fromkeys(table.columns.drop("rule"), int)), pd.DataFrame(curve), steps
    )


def bytes_of(text: str) -> int:
    """Return how many bytes "8 GiB" or "500 MB" are; ValueError if it is not a size."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ") if found else 0
    if size < 1:
        raise ValueError(f"the budget must be a size such as 8 GiB, 500 MB or 640 KiB, got {text!r}")
    return int(size)


@lru_cache(maxsize=256)
def _chain(rule: str, inputs: int, width: int, classes: int, how: str, norm: bool, optimizer: str, kept: str) -> Chain:
    """Return the steps of a rule in MLPs of this kind, at any depth and batch."""

    def predicted(blocks: int, batch: int, segments: int | None) -> Trace:
        options: dict[str, Any] = {} if segments is None else {"segments": segments}
        return memory.predict(
            rule,
            lambda: models.mlp(inputs, [width] * (blocks - 1), classes, activation=how, batch_norm=norm),
            (batch, inputs),
            OPTIMIZERS[optimizer],
            KINDS[kept](),
            **options,
        )

    # A signal e B_i is formed in quarters, but never in pieces smaller than SMALL_BYTES: from then on it is linear.
    linear_from = math.ceil(SMALL_BYTES / width) if rule in ("dfa", "memdfa") else 1
    return Chain(predicted, linear_from, segmented=rule.startswith("checkpoint"), least_batch=2 if norm else 1)


@lru_cache(maxsize=10_000)
def _held(chain: Chain, depth: int, batch: int, count_rest: bool) -> int:
    return (chain.held_bytes if count_rest else chain.peak_bytes)(depth + 1, batch)


@lru_cache(maxsize=1000)
def _deepest(chain: Chain, budget_bytes: int, batch: int) -> int:
    return max(0, chain.deepest(budget_bytes, batch, MOST_LAYERS + 1) - 1)


def _moments(step: Step, count_rest: bool) -> pd.DataFrame:
    """Return what is held at up to MOMENTS moments of a step, a column a category; of each stretch, the fullest."""
    totals = step.changes.cumsum()
    edges = np.unique(np.linspace(0, len(totals), min(MOMENTS, len(totals)) + 1, dtype=int))
    at = np.array([start + totals[start:stop].argmax() for start, stop in pairwise(edges)])
    held = {}
    for place, name in enumerate(CATEGORIES):
        alive = np.where(step.categories == place, step.changes, 0).cumsum()[at]
        rest = step.resting_by_category.get(name, 0) if count_rest else 0
        if alive.any() or rest:
            held[name] = alive + rest
    # The fullest moment is in the same phase for every block; these go through all of them.
    anywhere = [start + i % (stop - start) for i, (start, stop) in enumerate(pairwise(edges))]
    return pd.DataFrame({"phase": step.phases[anywhere], **held})


def _size(value: int) -> str:
    return f"<span title='{value:,} bytes'>{readable(value)}</span>"


def _depth(row: Any) -> str:
    found = row["deepest"]
    return f"{found:,} or more" if found == MOST_LAYERS else f"{found:,}" if found else "none"


def _table(names: list[str], rows: list[list[str]]) -> str:
    # No colours of its own: it is read in light and dark themes.
    look = "padding:2px 8px;text-align:right;border-bottom:1px solid rgba(128,128,128,0.4)"
    head = "".join(f"<th scope='col' style='{look}'>{html.escape(name)}</th>" for name in names)
    cell = f"style='{look};white-space:nowrap'"
    body = "".join(
        f"<tr><th scope='row' {cell}>{row[0]}</th>{''.join(f'<td {cell}>{value}</td>' for value in row[1:])}</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div style='overflow-x:auto'>{table}</div>"


# --------------------------------------------------------------------------------------------------- the widget


def memory_explorer(setting: Setting | None = None, **changes: Any) -> "MemoryExplorer":
    """Return the memory explorer, to be the last line of a cell; it starts where `explore` would.

    Raises ValueError, one line, for a setting that cannot be.
    """
    return MemoryExplorer(replace(setting or Setting(), **changes))


class MemoryExplorer(ipywidgets.VBox):
    """Controls, and what follows from them."""

    def __init__(self, setting: Setting):
        self.controls = _controls(setting)
        self.ticks = {rule: _tick(rule in setting.rules, label) for rule, label in ALL_RULES.items()}
        self.message, self.depths, self.profiles, self.numbers, self.code = (ipywidgets.HTML() for _ in range(5))
        self._due: asyncio.TimerHandle | None = None
        self.show()
        for control in (*self.controls.values(), *self.ticks.values()):
            control.observe(lambda change: self._changed(), "value")
        super().__init__(_arranged(self))

    def __repr__(self) -> str:
        """What is seen where widgets are not, on GitHub and in print; ipywidgets cuts it at 110 characters."""
        return "The memory explorer: run this cell to use it."

    @property
    def setting(self) -> Setting:
        """What the controls say. Raises ValueError for what cannot be."""
        chosen = {name: control.value for name, control in self.controls.items()}
        inputs, classes = chosen.pop("data")
        rules = tuple(rule for rule, tick in self.ticks.items() if tick.value)
        return Setting(**chosen, inputs=inputs, classes=classes, rules=rules)

    @property
    def explored(self) -> Explored:
        """What is shown: the last setting that can be."""
        if self._due is not None:
            self.show()
        return self._explored

    def show(self) -> None:
        """Draw what the controls say; what cannot be is said in a line, and what was drawn stays."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        try:
            self._explored = explored = explore(self.setting)
            alt = explored.summary()
            self.depths.value = _image(explored.depth_figure(), f"Bytes against depth. {alt}")
            self.profiles.value = _image(explored.steps_figure(), f"One step of each rule. {alt}")
            self.numbers.value, self.code.value = explored.html(), _code(explored.setting.code)
            self.message.value = ""
        except Exception as problem:  # a traceback has no place to go to, and would be no help here
            text = " ".join(str(problem).split()) or type(problem).__name__
            self.message.value = f"<p role='alert'><b>{html.escape(text)}</b>; below is what was shown before.</p>"

    def _changed(self) -> None:
        """Draw at once, or in a kernel a little later: a drag sends more changes than there is time to draw."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.show()
        else:
            self._due = self._due or loop.call_later(0.02, self.show)


def _tick(value: bool, name: str) -> Any:
    return ipywidgets.Checkbox(value, description=name, indent=False, layout={"width": "auto"})


def _controls(setting: Setting) -> dict[str, Any]:
    look: Any = {"style": {"description_width": "7.5em"}, "layout": {"width": "auto"}}
    shape = (setting.inputs, setting.classes)
    shapes = SHAPES if shape in SHAPES.values() else {f"{shape[0]:,} inputs, {shape[1]:,} classes": shape, **SHAPES}

    def steps(values: tuple[int, ...], value: int, name: str) -> Any:
        options = [(f"{option:,}", option) for option in sorted({*values, value})]
        return ipywidgets.SelectionSlider(options=options, value=value, description=name, **look)

    def menu(options: Any, value: Any, name: str) -> Any:
        return ipywidgets.Dropdown(options=options, value=value, description=name, **look)

    return {
        "data": menu(shapes, shape, "data"),
        "depth": ipywidgets.IntSlider(setting.depth, 1, LIMITS["depth"], description="hidden layers", **look),
        "width": steps(WIDTHS, setting.width, "units a layer"),
        "activation": menu(list(ACTIVATIONS), setting.activation, "activation"),
        "batch_norm": _tick(setting.batch_norm, "BatchNorm in each hidden layer"),
        "batch": steps(BATCHES, setting.batch, "batch"),
        "optimizer": menu(list(OPTIMIZERS), setting.optimizer, "optimizer"),
        "feedback": menu(list(KINDS), setting.feedback, "matrices B"),
        "count_rest": _tick(setting.count_rest, "draw what rests, too (weights, ...)"),
        "budget": ipywidgets.Text(setting.budget, description="memory", continuous_update=False, **look),
    }


def _arranged(explorer: MemoryExplorer) -> list[Any]:
    """Return the controls beside the pictures, or above them where there is no room, and the numbers below."""
    c = explorer.controls
    columns = {"grid_template_columns": "repeat(auto-fill, minmax(12em, 1fr))"}
    groups: dict[str, list[Any]] = {
        "Network": [c["data"], c["depth"], c["width"], c["activation"], c["batch_norm"]],
        "Training": [c["batch"], c["optimizer"], c["feedback"]],
        "Rules and baselines": [ipywidgets.GridBox(list(explorer.ticks.values()), layout=columns), c["count_rest"]],
        "Budget": [c["budget"]],
    }
    boxes = [
        ipywidgets.VBox([ipywidgets.HTML(f"<b>{name}</b>"), *group], layout={"flex": flex, "min_width": "0"})
        for (name, group), flex in zip(
            groups.items(), ("1 1 270px", "1 1 270px", "2 1 340px", "1 1 250px"), strict=True
        )
    ]
    wrapped = {"flex_flow": "row wrap", "align_content": "flex-start"}
    left = ipywidgets.HBox(boxes, layout={"flex": "1 1 280px", **wrapped})
    pictures = [explorer.message, explorer.depths, explorer.profiles]
    right = ipywidgets.VBox(pictures, layout={"flex": "3 1 480px", "min_width": "0"})
    row = ipywidgets.HBox([left, right], layout={"width": "100%", **wrapped})
    return [row, explorer.numbers, explorer.code]


def _image(figure: Figure, alt: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"<img src='{source}' alt='{html.escape(alt)}' style='width:100%;max-width:900px;background:white'>"


def _code(code: str) -> str:
    return (
        "<div style='line-height:1.4'><p><b>The peaks in Python</b> (click and copy), after "
        "<code>import memdfa_lab as ml</code></p>"
        f"<pre tabindex='0' style='user-select:all;white-space:pre-wrap'>{html.escape(code)}</pre></div>"
    )
