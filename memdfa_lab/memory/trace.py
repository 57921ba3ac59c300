"""The account of a step's memory: when each storage was born and freed, what for, and what was alive at the peak."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memdfa_lab.lab.files import write_text

if TYPE_CHECKING:
    import pandas as pd

CATEGORIES = (
    "parameters",
    "buffers",
    "optimizer state",
    "feedback",
    "input",
    "activations",
    "error",
    "gradients",
    "workspace",
)


@dataclass(slots=True)
class Storage:
    """One piece of memory; `category` may become known only after its birth."""

    category: str
    size_bytes: int
    shape: tuple[int, ...]  # of the first tensor seen on it
    dtype: str
    kind: str  # "born" in the step, "resting" before it, or from "outside": not counted


@dataclass(slots=True)
class Event:
    """A storage is born, grows, shrinks or is freed."""

    time_s: float
    operation: int  # how many operations had run by then
    name: str  # of the last of them
    phase: str
    block: int | None
    change_bytes: int
    storage: Storage


class Trace:
    """What a step held, event by event. Bytes are above what rested before it, unless said otherwise."""

    def __init__(self, events: Sequence[Event], resting: dict[str, int]):
        self.events = list(events)
        self.resting_by_category = {name: resting[name] for name in CATEGORIES if resting.get(name)}

    @property
    def resting_bytes(self) -> int:
        """What was there before the step: parameters, buffers, optimizer state, stored feedback, the batch."""
        return sum(self.resting_by_category.values())

    @cached_property
    def _totals(self) -> np.ndarray:
        return np.cumsum([0, *(event.change_bytes for event in self.events)])

    @property
    def _peak_at(self) -> int:
        """How many events it took to reach the peak."""
        return int(self._totals.argmax())

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once, above what rests."""
        return int(self._totals.max())

    @property
    def end_bytes(self) -> int:
        """What the step left behind: 0, but for a first step, which makes the optimizer's state and stored feedback."""
        return int(self._totals[-1])

    @property
    def peak_by_category(self) -> dict[str, int]:
        """What `peak_bytes` is made of; the values sum to it."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for event in self.events[: self._peak_at]:
            sums[event.storage.category] += event.change_bytes
        return {name: value for name, value in sums.items() if value}

    @cached_property
    def timeline(self) -> "pd.DataFrame":
        """A row an event: time_s, operation (its number), name, phase, block, category, bytes, total_bytes.

        `bytes` is what the event adds (a birth) or takes away; `total_bytes` what is alive after it.
        `storage` numbers the storages in order of birth; `shape` and `dtype` are those of the first tensor on it.
        """
        import pandas as pd

        numbers: dict[int, int] = {}
        rows = [
            (
                event.time_s,
                event.operation,
                event.name,
                event.phase,
                event.block,
                event.storage.category,
                event.change_bytes,
                numbers.setdefault(id(event.storage), len(numbers)),
                "x".join(map(str, event.storage.shape)),
                event.storage.dtype,
            )
            for event in self.events
        ]
        columns = ["time_s", "operation", "name", "phase", "block", "category", "bytes", "storage", "shape", "dtype"]
        table = pd.DataFrame(rows, columns=columns).astype({"block": "Int64"})
        return table.assign(total_bytes=self._totals[1:])

    @property
    def by_category(self) -> "pd.DataFrame":
        """A row an event, a column a category: the bytes alive after it. The columns sum to `total_bytes`."""
        import pandas as pd

        table = self.timeline
        present = [name for name in CATEGORIES if (table["category"] == name).any()]
        changes = {name: table["bytes"].where(table["category"] == name, 0) for name in present}
        return pd.DataFrame(changes, index=table.index).cumsum()

    def at_peak(self) -> "pd.DataFrame":
        """What was alive at the peak, the largest first: bytes, category, shape, dtype, and where it was born."""
        table = self.timeline.head(self._peak_at)
        alive = table.groupby("storage").agg(
            bytes=("bytes", "sum"),
            category=("category", "first"),
            shape=("shape", "first"),
            dtype=("dtype", "first"),
            name=("name", "first"),
            phase=("phase", "first"),
            block=("block", "first"),
        )
        return alive[alive["bytes"] > 0].sort_values("bytes", ascending=False, kind="stable").reset_index(drop=True)

    def to_csv(self, path: str | Path) -> None:
        """Write the timeline, whole or not at all."""
        write_text(path, self.timeline.to_csv(index=False))

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {readable(value)}" for name, value in self.peak_by_category.items())
        events = f"{len(self.events)} events, {self.events[-1].operation if self.events else 0} operations"
        return (
            f"Trace(peak {readable(self.peak_bytes)} ({parts}) above {readable(self.resting_bytes)} at rest; {events})"
        )

    def _repr_html_(self) -> str:
        total = max(self.peak_bytes, 1)
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:right'>{value:,}</td>"
            f"<td style='text-align:left'><div style='background:#0072B2;height:0.8em;"
            f"width:{12 * max(value, 0) / total:.2f}em'></div></td></tr>"
            for name, value in self.peak_by_category.items()
        )
        return (
            f"<p>peak <b>{self.peak_bytes:,} bytes</b> ({readable(self.peak_bytes)}) above {self.resting_bytes:,} "
            f"({readable(self.resting_bytes)}) at rest</p><table><thead><tr>"
            f"<th style='text-align:left'>at the peak</th><th>bytes</th><th></th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )


def readable(size_bytes: float) -> str:
    """Return a size in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
