"""The memory explorer: ipywidgets around `explore`."""

import asyncio
import html
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from time import perf_counter
from typing import Any

import ipywidgets

from memdfa_lab.core.feedback import KINDS
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.lab.experiments import OPTIMIZERS
from memdfa_lab.widgets import base
from memdfa_lab.widgets.background import BUSY
from memdfa_lab.widgets.setting import ALL_RULES, FAMILIES, IMAGES, LIMITS, PRECISIONS, Explored, Setting, explore

WIDTHS = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 400, 512, 800, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1000, 1024, 2048, 4096, 8192, 16_384, 32_768)
SHAPES = {
    "MNIST: 784 pixels": (784, 10),
    "CIFAR-10: 3,072 pixels": (3072, 10),
    "CIFAR-100: 3,072 pixels": (3072, 100),
    "ImageNet: 150,528 pixels": (150_528, 1000),
}
LONG_S = 0.05  # until the numbers that are there are shown, and the other rules' follow
AHEAD_AFTER_S, AHEAD_EVERY_S = 0.5, 0.03  # of rest, before what may be chosen next is predicted, and between


def memory_explorer(setting: Setting | None = None, **changes: Any) -> "MemoryExplorer":
    """Return the memory explorer, to be the last line of a cell; it starts where `explore` would.

    Raises TypeError or ValueError, one line, for a setting that cannot be.
    """
    return MemoryExplorer(setting, **changes)


class MemoryExplorer(base.Explorer):
    """Memory explorer: what one step holds under each rule, at any depth, width and batch."""

    def __init__(self, setting: Setting | None = None, **changes: Any):
        setting = base.changed("setting", setting, Setting, changes)
        super().__init__(_controls(setting))
        self.ticks = {rule: base.tick(rule in setting.rules, label) for rule, label in ALL_RULES.items()}
        self.depths, self.profiles, self.numbers, self.code = (ipywidgets.HTML() for _ in range(4))
        self._later: asyncio.TimerHandle | None = None
        self.watch((*self.controls.values(), *self.ticks.values()))
        row = base.beside(_groups(self), [self.message, self.depths, self.profiles])
        self.children = [row, self.numbers, self.code]

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

    def draw(self) -> None:
        setting, before = self.setting, self.numbers.value
        try:
            self._explored = explored = self._show_numbers(setting)
        except Exception:
            self.numbers.value = before
            raise
        self.code.value = _code(setting.code)
        alt = explored.summary()
        legend = 0.8 + 0.07 * max(len(ALL_RULES[rule]) for rule in explored.setting.rules)
        depths = base.image(explored.depth_figure(), f"Bytes against depth. {alt}", (0.9, 0.5, legend, 0.25))
        self.depths.value = depths  # on the screen while the next is drawn
        margins, between = (0.9, 0.85, 0.15, 0.3), (0.08, 0.35)
        self.profiles.value = base.image(explored.steps_figure(), f"One step of each rule. {alt}", margins, between)
        if self._loop is not None:
            if self._later is not None:
                self._later.cancel()
            self._later = self._loop.call_later(AHEAD_AFTER_S, self._look_ahead, _next_to(explored.setting))

    def _show_numbers(self, setting: Setting) -> Explored:
        """Show and return what follows from a setting; where it has to be predicted first, a rule at a time."""
        shown = perf_counter()
        for count, rule in enumerate(setting.rules[:-1], 1):
            explore(replace(setting, rules=(rule,)))
            if perf_counter() - shown > LONG_S:
                self.numbers.value = explore(replace(setting, rules=setting.rules[:count])).html()
                shown = perf_counter()
        explored = explore(setting)
        self.numbers.value = explored.html()  # pictures take longer
        return explored

    def _look_ahead(self, pairs: Iterator[tuple[str, Setting]]) -> None:
        """Predict what is one choice away while nothing is to be done, one at a time, so that it then shows at once."""
        for rule, setting in pairs:
            with BUSY:
                explore(replace(setting, rules=(rule,)))
            assert self._loop is not None
            self._later = self._loop.call_later(AHEAD_EVERY_S, self._look_ahead, pairs)
            return


def _next_to(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield (rule, setting) for each menu's other choices, but the data's, and the next widths and batches."""

    def near(values: Iterable[int], value: int) -> list[int]:
        at = sorted({*values, value})
        place = at.index(value)
        return at[max(0, place - 1) : place + 2]

    choices: dict[str, Any] = {
        "batch_norm": (False, True),
        "family": FAMILIES if setting.inputs in IMAGES else (),
        "optimizer": OPTIMIZERS,
        "width": near(WIDTHS, setting.width),
        "feedback": KINDS,
        "activation": ACTIVATIONS,
        "precision": PRECISIONS,
        "batch": near(BATCHES, setting.batch),
    }
    for name, values in choices.items():
        for value in values:
            with suppress(ValueError):  # BatchNorm on a batch of one; what cannot be is said when it is chosen
                changed = replace(setting, **{name: value})
                yield from ((rule, changed) for rule in setting.rules)


def _controls(setting: Setting) -> dict[str, Any]:
    shape = (setting.inputs, setting.classes)
    shapes = SHAPES if shape in SHAPES.values() else {f"{shape[0]:,} inputs, {shape[1]:,} classes": shape, **SHAPES}
    return {
        "family": base.menu({label: name for name, label in FAMILIES.items()}, setting.family, "family"),
        "data": base.menu(shapes, shape, "data"),
        "depth": base.whole(setting.depth, 1, LIMITS["depth"], "hidden layers"),
        "width": base.steps(WIDTHS, setting.width, "units, or filters"),
        "activation": base.menu(list(ACTIVATIONS), setting.activation, "activation"),
        "batch_norm": base.tick(setting.batch_norm, "BatchNorm in each hidden layer"),
        "batch": base.steps(BATCHES, setting.batch, "batch size"),
        "optimizer": base.menu(list(OPTIMIZERS), setting.optimizer, "optimizer"),
        "feedback": base.menu(list(KINDS), setting.feedback, "matrices B"),
        "precision": base.menu(list(PRECISIONS), setting.precision, "precision"),
        "count_rest": base.tick(setting.count_rest, "draw what rests, too (weights, ...)"),
        "budget": ipywidgets.Text(setting.budget, description="memory", continuous_update=False, **base.WIDE),
    }


def _groups(explorer: MemoryExplorer) -> list[Any]:
    c = explorer.controls
    rules = base.row(explorer.ticks.values())
    network = [c[name] for name in ("family", "data", "depth", "width", "activation", "batch_norm")]
    training = [c[name] for name in ("batch", "optimizer", "feedback", "precision")]
    return [
        base.group("Network", network, "1 1 270px"),
        base.group("Training", training, "1 1 270px"),
        base.group("Rules and baselines", [rules, c["count_rest"]], "2 1 340px"),
        base.group("Budget", [c["budget"]], "1 1 250px"),
    ]


def _code(code: str) -> str:
    return (
        "<div style='line-height:1.4'><p><b>The peaks in Python</b> (click and copy), after "
        "<code>import memdfa_lab as ml</code></p>"
        f"<pre tabindex='0' style='user-select:all;white-space:pre-wrap'>{html.escape(code)}</pre></div>"
    )
