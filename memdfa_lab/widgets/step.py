"""The step player: one step of each rule as a film over the layers, drawn from what the ledger says of it.

Each picture shows a moment: a column a block, and in it a bar for each kind of tensor that exists then, as high as its
bytes. The events are those of `memory.predict`, so what is seen is what a real step holds.
"""

import html
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import ipywidgets

from memdfa_lab import figures, memory
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import models
from memdfa_lab.lab.experiments import OPTIMIZERS
from memdfa_lab.memory.trace import Trace, readable
from memdfa_lab.widgets import base
from memdfa_lab.widgets.setting import ALL_RULES, LIMITS

SHOWN = {"activations": "h", "error": "s", "gradients": "g", "feedback": "B", "workspace": "w"}  # and its letter
SCALAR_BYTES = 8  # single numbers, such as the loss, are too small to be seen
DOING = {"begin": "check the batch", "local gradient": "gradient of the block", "": "free what is done with"}
INPUTS, CLASSES = 784, 10
WIDTH, COLUMN, BARS, ROW = 900, 600, 62, 108  # of the picture, of all blocks, of a bar at most, of a rule: in pixels


class Moment(NamedTuple):
    """What exists after an operation: bytes by (block, category), the block None for what the loss makes."""

    operation: str
    phase: str
    block: int | None
    held: dict[tuple[int | None, str], int]

    @property
    def total_bytes(self) -> int:
        return sum(self.held.values())


def moments(trace: Trace) -> list[Moment]:
    """Return the moments of a step, from its start on, single numbers left out.

    One is after what an operation has made, one after what is freed then: so none of them is missed, the peak included.
    A tensor stands with the block that it was born in.
    """
    events = [event for event in trace.events if event.storage.size_bytes > SCALAR_BYTES]
    places: dict[int, tuple[int | None, str]] = {}
    held: dict[tuple[int | None, str], int] = {}
    found = [Moment("", "begin", None, {})]
    for _, together in groupby(events, lambda event: (event.operation, event.phase, event.change_bytes > 0)):
        for event in together:
            place = places.setdefault(id(event.storage), (event.block, event.storage.category))
            held[place] = held.get(place, 0) + event.change_bytes
        alive = {place: value for place, value in held.items() if value}
        found.append(Moment(event.name.removeprefix("aten::"), event.phase, event.block, alive))
    return found


def film(
    rule: str, layers: int = 5, width: int = 200, batch: int = 64, optimizer: str = "sgd", feedback: str = "stored"
) -> list[Moment]:
    """Return the moments of one step of a rule in an MLP for MNIST. Raises ValueError for what cannot be."""
    lookup("rule", rule, ALL_RULES)
    lookup("optimizer", optimizer, OPTIMIZERS)
    lookup("feedback", feedback, KINDS)
    check_int("layers", layers, 1, LIMITS["depth"])
    for name, value in (("width", width), ("batch", batch)):
        check_int(name, value, 1, LIMITS[name])
    return _film(rule, layers, width, batch, optimizer, feedback)


@lru_cache(maxsize=64)
def _film(rule: str, layers: int, width: int, batch: int, optimizer: str, feedback: str) -> list[Moment]:
    hidden, shape = [width] * layers, (batch, INPUTS)
    make, storage = OPTIMIZERS[optimizer], KINDS[feedback]()
    return moments(memory.predict(rule, lambda: models.mlp(INPUTS, hidden, CLASSES), shape, make, storage))


def step_player(**start: Any) -> "StepPlayer":
    """Return the step player, to be the last line of a cell; `start`: a control's value, such as layers=8.

    Raises TypeError or ValueError, one line, for what cannot be.
    """
    return StepPlayer(**start)


class StepPlayer(base.Explorer):
    """Step player: which tensors exist at each moment of a step, block by block."""

    def __init__(
        self,
        layers: int = 5,
        width: int = 200,
        batch: int = 64,
        optimizer: str = "sgd",
        feedback: str = "stored",
        rules: tuple[str, ...] = tuple(RULES),
    ):
        slider = base.whole(layers, 1, 12, "hidden layers")
        shown = base.chosen(rules, ALL_RULES)
        for rule in shown:
            film(rule, layers, width, batch, optimizer, feedback)
        super().__init__(
            {
                "layers": slider,
                "width": base.steps((50, 100, 200, 400, 800), width, "units a layer"),
                "batch": base.steps((16, 32, 64, 128, 256, 512), batch, "batch size"),
                "optimizer": base.menu(list(OPTIMIZERS), optimizer, "optimizer"),
                "feedback": base.menu(list(KINDS), feedback, "matrices B"),
            }
        )
        self.ticks = {rule: base.tick(rule in shown, label) for rule, label in ALL_RULES.items()}
        self.time = base.whole(0, 0, 1, "moment", continuous_update=True)
        self.play = ipywidgets.Play(interval=250, min=0, max=1, show_repeat=True)
        self.picture = ipywidgets.HTML()
        ipywidgets.jslink((self.play, "value"), (self.time, "value"))
        self.watch((self.time, *self.controls.values(), *self.ticks.values()))
        self.time.layout.flex = "1 1 300px"
        speed = ipywidgets.IntSlider(4, 1, 20, description="moments / s", **base.WIDE)
        speed.observe(lambda change: setattr(self.play, "interval", 1000 // change["new"]), "value")
        left = [
            base.group("Network", list(self.controls.values()), "1 1 270px"),
            base.group("Rules", [base.row(self.ticks.values())], "2 1 270px"),
        ]
        bar = ipywidgets.HBox([self.play, self.time], layout={"flex_flow": "row wrap", "width": "100%"})
        self.children = [base.beside(left, [self.message, bar, speed, self.picture])]

    @property
    def films(self) -> dict[str, list[Moment]]:
        """The rules that are shown, and their moments. Raises ValueError if there are none."""
        setting = {name: control.value for name, control in self.controls.items()}
        shown = [rule for rule, tick in self.ticks.items() if tick.value]
        if not shown:
            raise ValueError("no rule is chosen: tick one or more")
        return {rule: film(rule, **setting) for rule in shown}

    def draw(self) -> None:
        films = self.films
        last = max(len(each) for each in films.values()) - 1
        if self.time.max != last:
            self.time.max = self.play.max = last
        self.picture.value = picture(films, self.time.value, self.controls["layers"].value + 1)


def picture(films: Mapping[str, list[Moment]], at: int, blocks: int) -> str:
    """Return what exists at the `at`-th moment of each film as HTML: an SVG, which reads in light and dark themes."""
    largest = max(max(moment.held.values(), default=1) for each in films.values() for moment in each)
    peak = max(moment.total_bytes for each in films.values() for moment in each)
    rows, said = [], []
    for place, (rule, each) in enumerate(films.items()):
        moment = each[min(at, len(each) - 1)]
        label = figures.STYLES[rule][0]
        if at >= len(each) - 1:
            doing = "done"
        else:
            where = "" if moment.block is None else f", block {moment.block + 1}"
            operation = f" ({moment.operation})" if moment.operation else ""
            doing = f"{DOING.get(moment.phase, moment.phase)}{where}{operation}"
        said.append(f"{label}: {doing}, {readable(moment.total_bytes)}")
        row = [_text(0, 12, f"<tspan font-weight='bold'>{label}</tspan> · {html.escape(doing)}")]
        row += [_bar(x, category, held, largest, blocks) for x, category, held in _bars(moment, blocks)]
        row += _frames(moment, blocks)
        row.append(_totals(each, min(at, len(each) - 1), peak))
        rows.append(f"<g transform='translate(0,{place * ROW})'>{''.join(row)}</g>")
    height = len(films) * ROW + 14
    alt = html.escape("; ".join(said))
    style = "width:100%;max-width:1000px;font:12px sans-serif;display:block"
    svg = f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{alt}' style='{style}'>{''.join(rows)}</svg>"
    return svg + _legend()


def _bars(moment: Moment, blocks: int) -> list[tuple[int, str, int]]:
    return [(blocks if block is None else block, category, held) for (block, category), held in moment.held.items()]


def _bar(column: int, category: str, held: int, largest: int, blocks: int) -> str:
    """Draw a bar in its block's column; each kind of tensor has its place, so that a film is calm."""
    wide = COLUMN / (blocks + 1)
    width = wide * 0.9 / len(SHOWN)
    x = column * wide + list(SHOWN).index(category) * width + wide * 0.05
    height = max(2.0, (BARS - 12) * (held / largest) ** 0.5)  # there is room for a letter above it
    top, color = 18 + BARS - height, figures.FILLS[category][0]
    title = f"<title>{category}: {held:,} bytes</title>"
    bar = f"<rect x='{x:.1f}' y='{top:.1f}' width='{width:.1f}' height='{height:.1f}' fill='{color}'>{title}</rect>"
    return bar + (_text(x + width / 2, top - 1.5, SHOWN[category], 9, "middle") if width > 7 else "")


def _frames(moment: Moment, blocks: int) -> list[str]:
    """Draw the columns, that of the block at work with a thick line, and their names."""
    wide, drawn = COLUMN / (blocks + 1), []
    for column in range(blocks + 1):
        works = moment.block == column or (moment.block is None and moment.phase == "error" and column == blocks)
        line = "stroke-width='2.5'" if works else "stroke-width='1' stroke-opacity='0.35'"
        place = f"x='{column * wide + 1:.1f}' y='17' width='{wide - 3:.1f}' height='{BARS + 1}'"
        drawn.append(f"<rect {place} fill='none' stroke='currentColor' {line}/>")
        name = "loss, e" if column == blocks else str(column + 1)
        drawn.append(_text(column * wide + wide / 2, BARS + 30, name, 10, "middle"))
    return drawn


def _totals(each: list[Moment], at: int, peak: int) -> str:
    """Draw all that is held against time, and where we are."""
    left, wide = COLUMN + 20, WIDTH - COLUMN - 30
    xs = [left + wide * k / max(1, len(each) - 1) for k in range(len(each))]
    ys = [18 + BARS * (1 - moment.total_bytes / peak) for moment in each]
    corners = [f"{xs[0]:.1f},{ys[0]:.1f}"]
    corners += [f"{x:.1f},{before:.1f} {x:.1f},{y:.1f}" for x, before, y in zip(xs[1:], ys, ys[1:], strict=False)]
    now = each[at].total_bytes
    line = f"<polyline points='{' '.join(corners)}' fill='none' stroke='currentColor' stroke-width='1.2'/>"
    dot = f"<circle cx='{xs[at]:.1f}' cy='{ys[at]:.1f}' r='4.5' fill='#D55E00' stroke='currentColor'/>"
    axis = f"<path d='M{left} {18 + BARS}h{wide}' stroke='currentColor' stroke-opacity='0.35'/>"
    most = max(moment.total_bytes for moment in each)
    return axis + line + dot + _text(left, 12, f"held {readable(now)} · peak {readable(most)}")


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "start") -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' fill='currentColor'"
    return f"<text {place}>{text}</text>"


def _legend() -> str:
    names = {"activations": "activations", "error": "signal, error", "workspace": "workspace", "feedback": "feedback"}
    box = "display:inline-block;width:0.9em;height:0.9em;margin:0 0.3em 0 0;vertical-align:-0.1em"
    parts = [
        "<span style='margin-right:1.2em;white-space:nowrap'>"
        f"<span style='{box};background:{figures.FILLS[category][0]}'></span>"
        f"{letter}: {names.get(category, category)}</span>"
        for category, letter in SHOWN.items()
    ]
    note = "Above what rests. Height: root of the bytes, one scale for all. Right: all that is held, against time."
    return f"<div style='line-height:1.5'>{''.join(parts)}<br>{note}</div>"
