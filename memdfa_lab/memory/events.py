"""What a trace is made of: storages, and the events of their lives."""

from dataclasses import dataclass


@dataclass(slots=True)
class Storage:
    """One piece of memory; `category` may become known only after its birth."""

    category: str
    size_bytes: int
    shape: tuple[int, ...]  # of the first tensor seen on it
    dtype: str
    kind: str  # "born" in the step, "resting" before it, or from "outside", which is not counted


@dataclass(slots=True)
class Event:
    """A storage is born, grows, shrinks or is freed."""

    time_s: float
    operation: int  # the number of operations that had run by then
    name: str  # of the last of them
    phase: str
    block: int | None
    change_bytes: int
    storage: Storage
