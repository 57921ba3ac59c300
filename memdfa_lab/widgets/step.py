"""The step player: one step of each rule as a film over the layers, drawn from predicted events.

Each picture shows a moment: a column for each block, and in it a bar for each kind of tensor that exists then. The
height of a bar is proportional to the square root of its bytes. The events are those of `memory.predict`, which are
those of a real step.
"""

import html
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import ipywidgets

from memdfa_lab import figures
from memdfa_lab.memory.trace import Trace, readable
from memdfa_lab.widgets import base
from memdfa_lab.widgets.pictures import sparkline
from memdfa_lab.widgets.setting import EQUAL, Setting

SHOWN = {  # category -> its letter, and its name in the legend
    "activations": ("h", "activations"),
    "error": ("s", "signal, error"),
    "gradients": ("g", "gradients"),
    "feedback": ("B", "feedback"),
    "workspace": ("w", "workspace"),
}
SCALAR_BYTES = 8  # single numbers, such as the loss, are too small to be seen
DOING = {"begin": "check the batch", "local gradient": "gradient of the block", "": "free what is no longer needed"}


FILM = base.start_from(Setting, None, {"depth": 5, "width": 200, "batch": 512, "feedback": "stored"})


class Moment(NamedTuple):
    """What exists after an operation: bytes by (block, category), where block is None for tensors of the loss."""

    operation: str
    phase: str
    block: int | None
    held: dict[tuple[int | None, str], int]

    @property
    def total_bytes(self) -> int:
        return sum(self.held.values())


def moments(trace: Trace) -> list[Moment]:
    """Return the moments of a step, from its start on, without single numbers.

    An operation gives a moment after its tensors are made, and one after tensors are freed, so the peak is among them.
    A tensor belongs to the block that made it.
    """
    events = [event for event in trace.events if event.storage.size_bytes > SCALAR_BYTES]
    places: dict[int, tuple[int | None, str]] = {}
    held: dict[tuple[int | None, str], int] = {}
    found = [Moment("", "begin", None, {})]
    for _, together in groupby(events, lambda event: (event.operation, event.phase, event.change_bytes > 0)):
        for event in together:
            place = places.setdefault(id(event.storage), (event.block, event.storage.category))
            held[place] = held.get(place, 0) + event.change_bytes
        alive = {place: size for place, size in held.items() if size}
        found.append(Moment(event.name.removeprefix("aten::"), event.phase, event.block, alive))
    return found


def film(rule: str, depth: int = FILM.depth, **changes: Any) -> list[Moment]:
    """Return the moments of one step of a rule: 5 hidden layers of 200 units, MNIST, batch 512, B stored.

    `changes`: other values of a `Setting`. Raises ValueError, one line, for values that are not possible.
    """
    return _film(FILM.changed(rules=(rule,), depth=depth, **changes), rule)


@lru_cache(maxsize=64)
def _film(setting: Setting, rule: str) -> list[Moment]:
    return moments(setting.predict(rule, setting.depth))


class StepPlayer(base.Explorer):
    """Step player: which tensors exist at each moment of a step, block by block. It opens at the first rule's peak.

    Raises ValueError for a model by name: its blocks are not alike.
    """

    def __init__(self, setting: Setting | None = None, **changes: Any):
        start = base.start_from(Setting, FILM if setting is None else setting, changes)
        super().__init__(start)
        if not start.equal_layers:
            raise ValueError(f"the step player needs equal layers: choose the family {' or '.join(EQUAL)}")
        self.time = self.watch(ipywidgets.IntSlider(0, 0, 1, description="moment", **base.WIDE))
        self.time.layout.flex = "1 1 300px"
        self.play = ipywidgets.Play(interval=250, min=0, max=1, show_repeat=True)
        ipywidgets.jslink((self.play, "value"), (self.time, "value"))
        groups: dict[str, Any] = {
            "Network": {
                "family": EQUAL,
                "depth": range(1, 13),
                "width": (50, 100, 200, 400, 800),
                "batch": (16, 32, 64, 128, 256, 512),
                "optimizer": None,
                "feedback": None,
            },
            "Rules": {"rules": None},
        }
        self.lay_out(groups, [base.row([self.play, self.time], width="100%"), self.picture], [])

    @property
    def films(self) -> dict[str, list[Moment]]:
        """The moments of the rules that are shown, by rule. Raises ValueError if no rule is chosen."""
        setting = self.setting
        return {rule: _film(setting, rule) for rule in setting.rules}

    def parts(self) -> base.Parts:
        films = self.films
        self.time.max = self.play.max = max(map(len, films.values())) - 1
        if not self.picture.value:
            totals = [moment.total_bytes for moment in next(iter(films.values()))]
            self.play.value = self.time.value = totals.index(max(totals))
        self.picture.value = picture(films, self.time.value, self.controls["depth"].value + 1)
        yield 0.0


def picture(films: Mapping[str, list[Moment]], at: int, blocks: int) -> str:
    """Return a moment of each film as HTML, readable in light and dark themes.

    `films`: the moments of a step by the rule's name, all drawn on one scale. `at`: the number of the moment; a shorter
    film shows its last one. `blocks`: how many blocks the network has.
    """
    largest = max(max(moment.held.values(), default=1) for each in films.values() for moment in each)
    peak = max(moment.total_bytes for each in films.values() for moment in each)
    rows, told = "", []
    for rule, each in films.items():
        now, totals = min(at, len(each) - 1), [moment.total_bytes for moment in each]
        label, doing = figures.label(rule), "done" if now == len(each) - 1 else _doing(each[now])
        told.append(f"{label}: {doing}, {readable(totals[now])}")
        columns = "".join(_column(each[now], block, largest) for block in [*range(blocks), None])
        rows += (
            f"<div style='display:flex;gap:2%;margin-bottom:8px'><div style='flex:2'><b>{label}</b> · "
            f"{html.escape(doing)}<div style='display:flex;gap:3px'>{columns}</div></div>"
            f"<div style='flex:1;min-width:0'>held {readable(totals[now])} · peak {readable(max(totals))}"
            f"{sparkline(totals, peak, now)}</div></div>"
        )
    legend = "".join(
        f"<span style='margin-right:1.2em;white-space:nowrap'><span style='display:inline-block;width:0.9em;"
        f"height:0.9em;margin-right:0.3em;background:{figures.FILLS[category][0]}'></span>{letter}: {name}</span>"
        for category, (letter, name) in SHOWN.items()
    )
    note = "Above rest. Height: square root of the bytes, one scale for all. Right: all bytes, over time."
    alt, style = html.escape("; ".join(told)), "font:12px sans-serif;max-width:1000px"
    return f"<div role='img' aria-label='{alt}' style='{style}'>{rows}</div><div>{legend}<br>{note}</div>"


def _doing(moment: Moment) -> str:
    where = "" if moment.block is None else f", block {moment.block + 1}"
    operation = f" ({moment.operation})" if moment.operation else ""
    return f"{DOING.get(moment.phase, moment.phase)}{where}{operation}"


def _column(moment: Moment, block: int | None, largest: int) -> str:
    """Draw the tensors of a block, or of the loss if it is None, as bars in a frame, thick where the step works."""
    bars = ""
    for category, (letter, _) in SHOWN.items():
        held = moment.held.get((block, category), 0)
        height = max(2, 50 * (held / largest) ** 0.5)  # in pixels; there is room for a letter above it
        bar = f"{letter}<div style='height:{height:.1f}px;background:{figures.FILLS[category][0]}'></div>"
        title = f" title='{category}: {held:,} bytes'" if held else ""
        bars += f"<div{title} style='flex:1;overflow:hidden;font-size:9px;line-height:11px'>{bar if held else ''}</div>"
    at_work = moment.block == block and (block is not None or moment.phase == "error")
    line = "2px solid" if at_work else "1px solid rgba(128,128,128,0.6);padding:1px"
    frame = f"height:64px;display:flex;align-items:flex-end;border:{line}"
    name = "loss, e" if block is None else block + 1
    return f"<div style='flex:1;text-align:center;font-size:10px'><div style='{frame}'>{bars}</div>{name}</div>"


step_player = StepPlayer  # as the last line of a cell
