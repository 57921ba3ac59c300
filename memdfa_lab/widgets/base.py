"""What the explorers have in common: controls, messages, and one asyncio task for each.

An error is shown in a line above the picture, which does not change: a widget has no place for a traceback.
"""

import asyncio
import html
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from inspect import GEN_CLOSED, GEN_CREATED, GEN_SUSPENDED, getgeneratorstate
from typing import Any, ClassVar, TypeVar

import ipywidgets
from IPython import get_ipython

from memdfa_lab.core.checks import check_type
from memdfa_lab.lab import settings
from memdfa_lab.lab.settings import Checked
from memdfa_lab.widgets.setting import ALL_RULES

S = TypeVar("S", bound=Checked)
Parts = Generator[float, None, None]  # work in parts; each yields the seconds to wait before the next
# The choices of a value: a range makes a slider, numbers make a slider over these, number -> label makes a menu. None
# makes a menu of names, a tick box or a text field, as the value's type requires.
Choices = range | tuple[float, ...] | dict[int, str] | None
WIDE: Any = {"style": {"description_width": "8.5em"}, "layout": {"width": "auto"}}
DRAG_S = 0.02  # before a change is shown: dragging sends more changes than can be drawn
PAUSE_S = 0.002  # at least, between two parts: time for the kernel's other work


class Explorer(ipywidgets.VBox):
    """Controls for the values of a setting, and the work that shows their effect, done in parts.

    The parts run in a task of the kernel's event loop, which waits while a cell runs. Without a loop, outside a
    notebook, nothing runs by itself: call `next_part` or `finish`.
    """

    trains: ClassVar[bool] = False  # whether its work stops if a cell is interrupted or makes another one
    at_work: ClassVar[dict[type, "Explorer"]] = {}  # the latest one of each class that trains
    a_cell_runs: ClassVar[bool] = False

    def __init__(self, start: Checked):
        super().__init__(layout={"width": "100%", "min_width": "0"})
        self.add_class("memdfa-explorer")
        self.start_from = start
        self.message, self.picture, self.numbers = (ipywidgets.HTML() for _ in range(3))
        self.controls: dict[str, Any] = {}
        self.ticks: dict[str, Any] = {}
        self._loop, self._parts = _running_loop(), self.parts()
        self._task: asyncio.Task[None] | None = None
        if self.trains:
            if type(self) in self.at_work:
                self.at_work[type(self)].stop()
            self.at_work[type(self)] = self
        shell = get_ipython()
        if shell is not None:  # a function that is registered twice is called once
            shell.events.register("pre_run_cell", _a_cell_begins)
            shell.events.register("post_run_cell", _a_cell_has_ended)

    @abstractmethod
    def parts(self) -> Parts:
        """Show the effect of the controls, in parts. An error that it raises is shown in a line."""

    @property
    def setting(self) -> Any:
        """The setting that the controls show. Raises ValueError if it is not possible."""
        values = {name: control.value for name, control in self.controls.items()}
        if self.ticks:
            values["rules"] = [rule for rule, tick in self.ticks.items() if tick.value]
        return self.start_from.changed(**values)

    def lay_out(self, groups: Mapping[str, Mapping[str, Choices]], right: Sequence[Any], below: Sequence[Any]) -> None:
        """Place the controls beside the results, or above them if there is no room, and do the first part.

        `groups`: title -> the values to control, each with its choices. `right` is placed beside the controls, `below`
        under both, in full width.
        """
        columns = [
            ipywidgets.VBox(
                [ipywidgets.HTML(f"<b>{title}</b>"), *(self._control(*value) for value in values.items())],
                layout={"flex": "2 1 340px" if "rules" in values else "1 1 270px", "min_width": "0"},
            )
            for title, values in groups.items()
        ]
        left = row(columns, flex="1 1 280px", min_width="0", align_content="flex-start")
        shown = ipywidgets.VBox([self.message, *right], layout={"flex": "3 1 480px", "min_width": "0"})
        self.children = [row([left, shown], width="100%", align_content="flex-start"), *below]
        self.begin(self.parts())
        self.next_part()

    def _control(self, name: str, choices: Choices) -> Any:
        """Return a control for one value of the setting; it starts at that value."""
        value = getattr(self.start_from, name)
        if name == "rules":
            self.ticks = {rule: self.watch(tick(rule in value, label)) for rule, label in ALL_RULES.items()}
            return row(self.ticks.values())
        _, names, _, label = settings.setting(type(self.start_from), name)
        look = {"value": value, "description": label or name, **WIDE}
        if isinstance(value, bool):
            control = tick(value, label)
        elif isinstance(choices, range):
            control = ipywidgets.IntSlider(min=choices[0], max=max(value, choices[-1]), **look)
        elif choices is not None:
            labels = choices if isinstance(choices, dict) else {}
            options = [(labels.get(one) or f"{one:,}", one) for one in sorted({*choices, value})]
            control = (ipywidgets.Dropdown if labels else ipywidgets.SelectionSlider)(options=options, **look)
        elif names is not None:
            menu = [(label if isinstance(label, str) else name, name) for name, label in names.items()]
            control = ipywidgets.Dropdown(options=menu, **look)
        else:
            control = ipywidgets.Text(continuous_update=False, **look)
        self.controls[name] = self.watch(control)
        return control

    def watch(self, control: Any) -> Any:
        """Update what is shown whenever this control changes; return the control."""
        control.observe(lambda change: self.in_loop(self.changed), "value")
        return control

    def catch_up(self) -> None:
        """Do the first part now, if it is still to come."""
        if getgeneratorstate(self._parts) == GEN_CREATED:
            self.next_part()

    def changed(self) -> None:
        """Update what is shown, a little later."""
        if getgeneratorstate(self._parts) in (GEN_SUSPENDED, GEN_CLOSED):  # otherwise the first part is still to come
            self.begin(self.parts(), DRAG_S)

    def begin(self, parts: Parts, wait_s: float = 0.0) -> None:
        """Do these parts instead of the remaining ones."""
        self.stop()
        self._parts = parts
        if self._loop is not None:
            self._task = self._loop.create_task(self._go_on(wait_s))

    def stop(self) -> None:
        """Cancel the remaining parts."""
        if self._task is not None:
            self._task.cancel()
        self._parts.close()

    def next_part(self) -> float | None:
        """Do the next part, and return the seconds to wait before the one after it; None if there is none."""
        try:
            wait_s = next(self._parts, None)
        except Exception as problem:
            self.say(f"{' '.join(str(problem).split()) or type(problem).__name__}; below is what was shown before.")
            return None
        if wait_s is not None:
            self.say("")
        return wait_s

    def finish(self) -> None:
        """Do all remaining parts, without waiting."""
        while self.next_part() is not None:
            pass

    async def _go_on(self, wait_s: float | None) -> None:
        while wait_s is not None:
            await asyncio.sleep(max(wait_s, PAUSE_S))
            if not Explorer.a_cell_runs:  # a cell that awaits: its ledger must not count our tensors
                wait_s = self.next_part()

    def in_loop(self, call: Callable[[], None]) -> None:
        """Call in the kernel's loop: JupyterLab sends clicks to another thread, even while a cell runs."""
        if self._loop is None or self._loop is _running_loop():
            call()
        else:
            self._loop.call_soon_threadsafe(call)

    def say(self, text: str) -> None:
        """Show a line above the picture; none if the text is empty."""
        self.message.value = f"<p role='alert'><b>{html.escape(text)}</b></p>" if text else ""

    def __repr__(self) -> str:
        """Return the text that is shown instead of a widget on GitHub and in print; ipywidgets cuts it at 110."""
        return f"The {str(self.__doc__).partition(':')[0].lower()}: run this cell to use it."


def start_from(kind: type[S], start: S | None, changes: dict[str, Any]) -> S:
    """Return `start`, or the kind's default, with some values changed. Raises TypeError if it is of another kind."""
    start = kind() if start is None else start
    check_type(str(kind.__doc__).partition(":")[0].lower(), start, kind, f"an ml.widgets.{kind.__name__}")
    return start.changed(**changes)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _a_cell_begins(info: Any) -> None:
    Explorer.a_cell_runs = True


def _a_cell_has_ended(result: Any) -> None:
    Explorer.a_cell_runs = False
    if result is None or isinstance(result.error_in_exec, KeyboardInterrupt):  # None: interrupted while it awaited
        for explorer in Explorer.at_work.values():
            explorer.stop()


def tick(value: bool, label: str | None) -> Any:
    layout = {"width": "auto", "margin": "2px 1.2em 2px 0"}
    return ipywidgets.Checkbox(value, description=label, indent=False, layout=layout)


def row(controls: Iterable[Any], **layout: str) -> Any:
    """Return controls beside one another, in as many lines as it takes."""
    return ipywidgets.HBox(list(controls), layout={"flex_flow": "row wrap", **layout})
