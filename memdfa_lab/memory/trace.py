"""The record of a step's memory: when each storage was born and freed, its purpose, and what was alive at the peak."""

import html
import math
import pickle
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from memdfa_lab.memory.events import Event
from memdfa_lab.memory.files import write_text, write_whole
from memdfa_lab.memory.viewer import snapshot

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
OFFLOADED = "offloaded"  # tensors that rest in a store, not in memory


class Trace:
    """The memory of a step, event by event. Bytes are above what was in memory before the step, unless said otherwise.

    `offloaded_bytes`: weights, buffers, optimizer state and B that rest in a store (`ml.offload`), not in memory.
    """

    def __init__(self, events: Sequence[Event], resting: dict[str, int]):
        self.events = list(events)
        self.resting_by_category = {name: resting[name] for name in CATEGORIES if resting.get(name)}
        self.offloaded_bytes = resting.get(OFFLOADED, 0)

    @property
    def resting_bytes(self) -> int:
        """The bytes in memory before the step: parameters, buffers, optimizer state, stored feedback, the batch."""
        return sum(self.resting_by_category.values())

    @cached_property
    def changes(self) -> np.ndarray:
        """The bytes of each event, negative where memory is freed; int64."""
        return np.array([event.change_bytes for event in self.events], dtype=np.int64)

    @cached_property
    def totals(self) -> np.ndarray:
        """The bytes alive before the step (0), and after each event; int64."""
        return np.concatenate([[0], self.changes.cumsum()])

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return int(self.totals.max())

    @property
    def held_bytes(self) -> int:
        """The bytes in memory at the step's peak, including those that rest between steps."""
        return self.peak_bytes + self.resting_bytes

    @property
    def end_bytes(self) -> int:
        """The bytes that the step leaves in memory. Only a first step does: optimizer state and stored feedback."""
        return int(self.totals[-1])

    @property
    def peak_by_category(self) -> dict[str, int]:
        """What `peak_bytes` is made of; the values sum to it."""
        sums = dict.fromkeys(CATEGORIES, 0)
        for event in self.events[: int(self.totals.argmax())]:
            sums[event.storage.category] = sums.get(event.storage.category, 0) + event.change_bytes
        return {name: value for name, value in sums.items() if value}

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """A row an event: time_s, operation (a number), name, phase, block, category, bytes, storage, total_bytes, ...

        `bytes` is what the event adds, or frees where negative; `total_bytes` is what is alive after it. `storage`
        numbers the storages in order of birth; `shape` and `dtype` are those of the first tensor on the storage.
        """
        numbers: dict[int, int] = {}
        names = ["time_s", "operation", "name", "phase", "block", "category", "bytes", "storage", "shape", "dtype"]
        rows = []
        for event in self.events:
            storage, place = event.storage, (event.time_s, event.operation, event.name, event.phase, event.block)
            number = numbers.setdefault(id(storage), len(numbers))
            shape = "x".join(map(str, storage.shape))
            rows.append((*place, storage.category, event.change_bytes, number, shape, storage.dtype))
        return pd.DataFrame(rows, columns=names).astype({"block": "Int64"}).assign(total_bytes=self.totals[1:])

    @property
    def by_category(self) -> pd.DataFrame:
        """A row an event, a column a category: the bytes alive after the event. The columns sum to `total_bytes`."""
        of_events = np.array([event.storage.category for event in self.events])
        present = [name for name in CATEGORIES if name in of_events]
        return pd.DataFrame({name: np.where(of_events == name, self.changes, 0).cumsum() for name in present})

    def at_peak(self) -> pd.DataFrame:
        """Return the storages alive at the peak, largest first: bytes, category, shape, dtype, place of birth."""
        table = self.timeline.head(int(self.totals.argmax())).groupby("storage")
        first = table[["category", "shape", "dtype", "name", "phase", "block"]].first()
        alive = table["bytes"].sum().to_frame().join(first)
        return alive[alive["bytes"] > 0].sort_values("bytes", ascending=False, kind="stable").reset_index(drop=True)

    def to_csv(self, path: str | Path) -> None:
        """Write the timeline, completely or not at all. Raises ValueError if the folder cannot be written to."""
        write_text(path, self.timeline.to_csv(index=False))

    def to_memory_viz(self, path: str | Path) -> None:
        """Write the step as a memory snapshot, for pytorch.org/memory_viz or `python -m torch.cuda._memory_viz`.

        The step may be predicted, or have run on the CPU. Raises ValueError if the folder cannot be written to.
        """
        data = pickle.dumps(snapshot(self.events, self.resting_by_category))
        write_whole(path, lambda temporary: temporary.write_bytes(data))

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {readable(value)}" for name, value in self.peak_by_category.items())
        events = f"{len(self.events)} events, {self.events[-1].operation if self.events else 0} operations"
        rest = f"{readable(self.resting_bytes)} at rest"
        rest += f" and {readable(self.offloaded_bytes)} in a store" if self.offloaded_bytes else ""
        return f"Trace(peak {readable(self.peak_bytes)} ({parts}) above {rest}; {events})"

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


def bytes_of(size: int | str) -> int:
    """Return the bytes in a size such as "8 GiB" or "500 MB"; a number is bytes. Raises ValueError for other texts."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    value = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ") if found else 0
    if not 1 <= value < math.inf:
        raise ValueError(f"the budget must be a size such as 8 GiB, 500 MB or 640 KiB, got {size!r}")
    return int(value)
