"""The memory explorer: what a setting needs in memory, as tables and figures, and the controls around them.

Nothing is trained and nothing is fitted: the numbers are those of `ml.memory.predict`, to the byte.
"""

import html
from functools import cached_property
from itertools import pairwise
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab import figures
from memdfa_lab.memory.deep import deep_trace, scheduled_trace
from memdfa_lab.memory.sizing import DEEPEST, largest
from memdfa_lab.memory.trace import CATEGORIES, Trace, bytes_of, readable
from memdfa_lab.rivals.binomial import default_schedule
from memdfa_lab.widgets import base
from memdfa_lab.widgets.pictures import image, table
from memdfa_lab.widgets.setting import ALL_RULES, Setting

CURVE = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000)
MOMENTS = 500  # drawn of a step; of more, the fullest in each stretch
# Stops of a logarithmic slider: each is about a fifth above the last.
DEPTHS = (1, 2, 3, *(k * 2**n for n in range(8) for k in (4, 5, 6, 7)), 1000)
WIDTHS = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 400, 512, 800, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1000, 1024, 2048, 4096, 8192, 16_384, 32_768)
OF_LAYERS = ("inputs", "classes", "depth", "width", "activation", "batch_norm")  # not for a model by name
INPUTS = {784: "784 (MNIST)", 3072: "3,072 (CIFAR)", 150_528: "150,528 (ImageNet)"}
CODE = """<div style='line-height:1.4'>
<p><b>The peaks in Python</b> (click and copy), after <code>import memdfa_lab as ml</code></p>
<pre tabindex='0' style='user-select:all;white-space:pre-wrap'>{}</pre></div>"""


class Explored:
    """What a setting needs in memory. The peaks are computed at once, the rest when it is first used."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.traces = {rule: step_of(rule, setting, setting.depth) for rule in setting.rules}
        self.fitting: dict[str, tuple[int, ...]] = {}  # rule -> what `fits` has returned

    @cached_property
    def peaks(self) -> pd.DataFrame:
        """One row per rule, in bytes: the peak above rest, what rests between steps, and their sum."""
        rows = [
            {"peak_bytes": trace.peak_bytes, **trace.peak_by_category, "resting_bytes": trace.resting_bytes}
            | {f"resting {name}": size for name, size in trace.resting_by_category.items()}
            | {"held_bytes": trace.held_bytes}
            for trace in self.traces.values()
        ]
        at_rest = ["resting_bytes", *(f"resting {name}" for name in CATEGORIES)]
        sizes = pd.DataFrame(rows, self.setting.rules, ["peak_bytes", *CATEGORIES, *at_rest, "held_bytes"])
        return sizes.dropna(axis="columns", how="all").fillna(0).astype(int).rename_axis("rule").reset_index()

    @property
    def table(self) -> pd.DataFrame:
        """The peaks, and the columns largest_batch and deepest with what `fits` returns."""
        found = [self.fits(rule) for rule in self.traces]
        columns = dict(zip(("largest_batch", "deepest"), zip(*found, strict=True), strict=False))
        return self.peaks.assign(**columns)

    def fits(self, rule: str) -> tuple[int, ...]:
        """Return the largest batch and the most hidden layers (up to 10,000) that fit the budget; 0 if nothing does.

        One example or one layer more does not fit. For a model by name, only the batch is returned.
        """
        setting, budget = self.setting, bytes_of(self.setting.budget)
        if rule not in self.fitting:
            least = 1 if setting.equal_layers and not setting.batch_norm else 2  # BatchNorm takes no single example
            found = [largest(lambda n: step_of(rule, setting, setting.depth, n).held_bytes, budget, least)]
            if setting.equal_layers:
                found.append(largest(lambda n: step_of(rule, setting, n).held_bytes, budget, most=DEEPEST))
            self.fitting[rule] = tuple(found)
        return self.fitting[rule]

    @cached_property
    def curve(self) -> pd.DataFrame:
        """Bytes against depth: columns rule, depth and bytes."""
        depths, size = sorted({*CURVE, self.setting.depth}), "held_bytes" if self.setting.count_rest else "peak_bytes"
        rows = [(rule, n, getattr(step_of(rule, self.setting, n), size)) for rule in self.traces for n in depths]
        return pd.DataFrame(rows, columns=["rule", "depth", "bytes"])

    @cached_property
    def steps(self) -> dict[str, pd.DataFrame]:
        """Label of a rule -> up to 500 moments of its step, in order: columns phase, and bytes by category."""
        return {ALL_RULES[rule]: self._moments(trace) for rule, trace in self.traces.items()}

    def _moments(self, trace: Trace) -> pd.DataFrame:
        totals = trace.totals[1:]
        edges = np.unique(np.linspace(0, len(totals), min(MOMENTS, len(totals)) + 1, dtype=int))
        fullest = [start + totals[start:stop].argmax() for start, stop in pairwise(edges)]
        # The fullest moments may all be in one phase. Phases are those of moments in all of them.
        anywhere = [start + i % (stop - start) for i, (start, stop) in enumerate(pairwise(edges))]
        held = trace.by_category.iloc[fullest].reindex(columns=CATEGORIES, fill_value=0).reset_index(drop=True)
        if self.setting.count_rest:
            held += pd.Series(trace.resting_by_category).reindex(CATEGORIES, fill_value=0)
        held.insert(0, "phase", [trace.events[i].phase for i in anywhere])
        return held.loc[:, held.any()]

    def depth_figure(self) -> Figure:
        """Draw bytes against depth, one line per rule; for a model by name, its peak by category, one bar per rule."""
        rest = self.setting.count_rest
        if not self.setting.equal_layers:
            bars = self.peaks.copy()
            for name in CATEGORIES if rest else ():
                bars[name] = bars.get(name, 0) + bars.get(f"resting {name}", 0)
            return figures.peak_fillings(bars, xlabel="peak + rest (MiB)" if rest else "peak above rest (MiB)")
        what = "peak + rest (MiB)" if rest else "peak above rest (MiB)"
        budget = bytes_of(self.setting.budget) if rest else None
        return figures.peak_at_depth(self.curve, self.setting.depth, what, budget)

    def steps_figure(self) -> Figure:
        """Draw one step of each rule."""
        return figures.step_profiles(self.steps, "held (MiB)" if self.setting.count_rest else "above rest (MiB)")

    def summary(self) -> str:
        """Return the peaks in words, for those who cannot see the figures."""
        peaks = ", ".join(f"{ALL_RULES[rule]} {readable(trace.peak_bytes)}" for rule, trace in self.traces.items())
        return f"Peaks above rest, {self.network}: {peaks}."

    @property
    def network(self) -> str:
        """The network's name in a sentence."""
        return f"{self.setting.depth:,} hidden layers" if self.setting.equal_layers else self.setting.model

    def html(self) -> str:
        """Return the numbers as two tables. What fits the budget is shown for rules whose `fits` has been called."""
        setting, names = self.setting, {"peak_bytes": "peak above rest"}
        names |= {name: f"of which {name}" for name in CATEGORIES if name in self.peaks}
        names |= {"resting_bytes": "at rest", "held_bytes": "peak + rest"}
        peaks = self.peaks.set_index("rule").rename(index=ALL_RULES)[list(names)].rename(columns=names)
        columns = [f"largest batch, {self.network}", f"most hidden layers, at batch {setting.batch:,}"]
        columns = columns if setting.equal_layers else columns[:1]
        fitting = [self.fitting.get(rule, (None,) * len(columns)) for rule in setting.rules]
        found = [[_count(n, most) for n, most in zip(each, (None, DEEPEST), strict=False)] for each in fitting]
        return (
            f"<p><b>One step</b> ({html.escape(setting.title)}; point at a number for its bytes)</p>"
            f"{table(peaks.map(_size))}"
            f"<p><b>What fits into {html.escape(setting.budget)}</b>, peak and rest together</p>"
            f"{table(pd.DataFrame(found, peaks.index, columns))}"
        )


def _size(n: int) -> str:
    return f"<span title='{n:,} bytes'>{readable(n)}</span>"


def _count(n: int | None, most: int | None = None) -> str:
    if n is None:
        return "…"
    return f"{n:,} or more" if n == most else f"{n:,}" if n else "none"


def explore(setting: Setting | None = None, **changes: Any) -> Explored:
    """Return what a setting needs in memory, as in `explore(depth=100, optimizer="adam")`.

    Raises TypeError or ValueError, one line, for a setting that is not possible.
    """
    return Explored(base.start_from(Setting, setting, changes))


def step_of(rule: str, setting: Setting, depth: int, batch: int | None = None) -> Trace:
    """Return the step of a rule in a network of this kind at any depth, and at another batch size if given."""
    own = setting.model_copy(update={"batch": batch or setting.batch})  # not checked, as in `Setting.predict`
    if not setting.equal_layers:
        return own.predict(rule, depth)
    if rule == "binomial":
        return scheduled_trace(lambda blocks: own.predict(rule, blocks - 1), depth + 1, default_schedule)
    return deep_trace(lambda blocks: own.predict(rule, blocks - 1), depth + 1, rule.startswith("checkpoint"))


class MemoryExplorer(base.Explorer):
    """Memory explorer: what one step holds under each rule, at any depth, width and batch."""

    def __init__(self, setting: Setting | None = None, **changes: Any):
        super().__init__(base.start_from(Setting, setting, changes))
        self.profiles, self.code = ipywidgets.HTML(), ipywidgets.HTML()
        groups: dict[str, Any] = {
            "Network": {
                "family": None,
                "model": None,
                "inputs": INPUTS,
                "classes": (10, 100, 1000),
                "depth": DEPTHS,
                "width": WIDTHS,
                "activation": None,
                "batch_norm": None,
            },
            "Training": {"batch": BATCHES, "optimizer": None, "feedback": None, "precision": None},
            "Rules and baselines": {"rules": None, "count_rest": None},
            "Budget": {"budget": None},
        }
        self.lay_out(groups, [self.picture, self.profiles], [self.numbers, self.code])

    @property
    def explored(self) -> Explored:
        """What follows from the controls, or from the last setting that was possible."""
        self.catch_up()
        return self._explored

    def parts(self) -> base.Parts:
        for name, control in self.controls.items():
            if name in OF_LAYERS or name == "model":
                control.disabled = (self.controls["family"].value == "model") == (name != "model")
        self._explored = explored = explore(self.setting)
        self.numbers.value = explored.html()
        self.code.value = CODE.format(html.escape(explored.setting.code))
        names = max(14, *(len(part) for rule in explored.setting.rules for part in ALL_RULES[rule].split(" + ")))
        bars = not explored.setting.equal_layers
        alt = f"Bytes {'of a model' if bars else 'against depth'}. {explored.summary()}"
        margins = (0.4 + 0.08 * names, 1.0, 0.15, 0.1) if bars else (0.9, 0.5, 0.7 + 0.07 * names, 0.25)
        self.picture.value = image(explored.depth_figure(), alt, margins, (0, 0))
        yield 0.0
        alt, margins = f"One step of each rule. {explored.summary()}", (0.9, 0.85, 0.15, 0.3)
        self.profiles.value = image(explored.steps_figure(), alt, margins, (0.08, 0.35))
        yield 0.0
        for rule in explored.setting.rules:
            explored.fits(rule)
            self.numbers.value = explored.html()
            yield 0.0


memory_explorer = MemoryExplorer  # as the last line of a cell
