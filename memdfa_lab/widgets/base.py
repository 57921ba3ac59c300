"""What the explorers have in common: controls, pictures, messages, and the one thread that each may have.

Pictures are HTML, never Output widgets, on which runs without a browser hang (nbclient issue 312). Whatever cannot be
is said in a line above the picture, which stays as it was: a traceback has no place to go to, and would be no help.
"""

import asyncio
import base64
import html
import io
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ipywidgets
from matplotlib.figure import Figure

from memdfa_lab.core import checks
from memdfa_lab.memory.predict import without_collection
from memdfa_lab.widgets.background import BUSY

T = TypeVar("T")
WIDE: Any = {"style": {"description_width": "8.5em"}, "layout": {"width": "auto"}}
# Left, bottom, right, top in inches, between panels in parts of one: the same for each picture, so that nothing jumps,
# and matplotlib's constrained layout would draw everything twice.
Margins = tuple[float, float, float, float]


class Explorer(ipywidgets.VBox):
    """Controls by name, and what follows from them; a subclass says what, and puts it on the screen."""

    def __init__(self, controls: dict[str, Any]):
        super().__init__(layout={"width": "100%", "min_width": "0"})
        self.add_class("memdfa-explorer")
        self.controls = controls
        self.message = ipywidgets.HTML()
        self._due: asyncio.TimerHandle | None = None
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    @abstractmethod
    def draw(self) -> None:
        """Put what the controls say on the screen; what it raises is said in a line."""

    def watch(self, controls: Iterable[Any]) -> None:
        """Draw once now, and again whenever one of these controls is changed."""
        self.show()
        for control in controls:
            control.observe(lambda change: self.changed(), "value")

    def show(self) -> None:
        """Draw; what cannot be is said in a line, and what was drawn stays."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        with BUSY, without_collection():  # a kernel's many objects can take longer than the answer
            try:
                self.draw()
                self.say("")
            except Exception as problem:
                self.say(f"{' '.join(str(problem).split()) or type(problem).__name__}; below is what was shown before.")

    def say(self, text: str) -> None:
        """Show a line above the picture, or none."""
        self.message.value = f"<p role='alert'><b>{html.escape(text)}</b></p>" if text else ""

    def changed(self) -> None:
        """Draw at once, or in a kernel a little later: a drag sends more changes than there is time to draw."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.show()
        else:
            self._due = self._due or loop.call_later(0.02, self.show)

    def soon(self, call: Any) -> None:
        """Call from the kernel's own thread, once it has time; without a kernel, nobody is there to see it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def __repr__(self) -> str:
        """What is seen where widgets are not, on GitHub and in print; ipywidgets cuts it at 110 characters."""
        return f"The {self.__doc__.partition(':')[0].lower()}: run this cell to use it."  # type: ignore[union-attr]


def changed(what: str, start: T | None, kind: Any, changes: Mapping[str, Any]) -> T:
    """Return start, or the kind's own, with what is changed. Raises TypeError or ValueError for what is none."""
    start = kind() if start is None else start
    checks.check_type(what, start, kind, f"an ml.widgets.{kind.__name__}")
    for name in changes:
        checks.lookup(what, name, vars(start))
    return replace(start, **changes)  # type: ignore[type-var]


def chosen(rules: Any, table: Mapping[str, T]) -> dict[str, T]:
    """Return the table's part of these rules, in their order. Raises TypeError or ValueError for what is no list."""
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(f"rules must be a list of names, such as ['bp', 'memdfa'], got {rules!r}")
    found = {rule: checks.lookup("rule", rule, table) for rule in rules}
    if not found:
        raise ValueError("no rule is chosen: tick one or more")
    return found


def tick(value: bool, name: str) -> Any:
    return ipywidgets.Checkbox(
        value, description=name, indent=False, layout={"width": "auto", "margin": "2px 1.2em 2px 0"}
    )


def menu(options: Any, value: Any, name: str) -> Any:
    return ipywidgets.Dropdown(options=options, value=value, description=name, **WIDE)


def seed(value: int) -> Any:
    return whole(value, 0, max(20, checks.check_int("seed", value, 0)), "seed")


def whole(value: int, least: int, most: int, name: str, **options: Any) -> Any:
    checks.check_int(name, value, least, most)
    return ipywidgets.IntSlider(value, least, most, description=name, **options, **WIDE)


def steps(values: Iterable[float], value: float, name: str) -> Any:
    """Return a slider over some numbers; a value that is not among them is put there."""
    options = [(f"{option:,g}" if option < 1 else f"{option:,}", option) for option in sorted({*values, value})]
    return ipywidgets.SelectionSlider(options=options, value=value, description=name, **WIDE)


def button(name: str, tooltip: str, call: Any) -> Any:
    made = ipywidgets.Button(description=name, tooltip=tooltip, layout={"width": "7em"})
    made.on_click(lambda button: call())
    return made


def group(name: str, controls: Sequence[Any], flex: str) -> Any:
    """Return controls below one another, under a name."""
    return ipywidgets.VBox([ipywidgets.HTML(f"<b>{name}</b>"), *controls], layout={"flex": flex, "min_width": "0"})


def row(ticks: Iterable[Any]) -> Any:
    """Return ticks beside one another, in as many lines as it takes."""
    return ipywidgets.HBox(list(ticks), layout={"flex_flow": "row wrap"})


def beside(controls: Sequence[Any], pictures: Sequence[Any]) -> Any:
    """Return controls beside the pictures, or above them where there is no room."""
    wrapped = {"flex_flow": "row wrap", "align_content": "flex-start"}
    left = ipywidgets.HBox(controls, layout={"flex": "1 1 280px", "min_width": "0", **wrapped})
    right = ipywidgets.VBox(pictures, layout={"flex": "3 1 480px", "min_width": "0"})
    return ipywidgets.HBox([left, right], layout={"width": "100%", **wrapped})


def image(figure: Figure, alt: str, margins: Margins | None = None, between: tuple[float, float] = (0.08, 0.45)) -> str:
    """Return a figure as an image with a text in place of it; with margins, its layout is not worked out anew."""
    if margins is not None:
        width, height = figure.get_size_inches()
        left, bottom, right, top = margins
        figure.set_layout_engine(None)
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, *between)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, pil_kwargs={"compress_level": 1})
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"<img src='{source}' alt='{html.escape(alt)}' style='width:100%;max-width:900px;background:white'>"


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows as HTML, the first of each its name; no colours of its own: it is read in light and dark themes."""
    look = "padding:2px 8px;text-align:right;border-bottom:1px solid rgba(128,128,128,0.4)"
    head = "".join(f"<th scope='col' style='{look}'>{html.escape(name)}</th>" for name in names)
    cell = f"style='{look};white-space:nowrap'"
    body = "".join(
        f"<tr><th scope='row' {cell}>{row[0]}</th>{''.join(f'<td {cell}>{value}</td>' for value in row[1:])}</tr>"
        for row in rows
    )
    shown = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div style='overflow-x:auto;line-height:1.4'>{shown}</div>"
