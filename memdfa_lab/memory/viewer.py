"""A step's record in the format of CUDA's memory snapshots, which torch's memory viewer opens."""

from collections.abc import Iterable, Mapping
from typing import Any

from memdfa_lab.memory.events import Event

Frames = list[dict[str, Any]]
Block = tuple[int, int, Frames]  # address, bytes, frames


def snapshot(events: Iterable[Event], resting_by_category: Mapping[str, int]) -> dict[str, Any]:
    """Return a snapshot of a step in the form that torch.cuda.memory._snapshot returns on a GPU.

    What rests is allocated from the start, one block for each category. The frames of a tensor name its operation,
    phase, block, category and shape. Each tensor has an address of its own, after all earlier ones. A tensor that is
    resized is freed and allocated again.
    """
    end, alive, entries = 0, dict[Any, Block](), list[dict[str, Any]]()

    def take(key: Any, size: int, frames: Frames) -> None:
        nonlocal end
        alive[key], end = (end, size, frames), end + size

    def note(action: str, key: Any, event: Event) -> None:
        address, size, _ = alive[key]
        about = {"stream": 0, "time_us": int(1e6 * event.time_s), "frames": _frames(event)}
        entries.append({"action": action, "addr": address, "size": size, **about})

    for name, size in resting_by_category.items():
        take(name, size, [_frame(name, "at rest")])
    for event in events:
        key, size = id(event.storage), event.change_bytes
        if key in alive:
            for action in ("free_requested", "free_completed"):
                note(action, key, event)
            size += alive.pop(key)[1]
        if size > 0:
            take(key, size, _frames(event))
            note("alloc", key, event)
    return {"segments": [_segment(alive.values(), end)], "device_traces": [entries], "external_annotations": []}


def _frames(event: Event) -> Frames:
    """Return the frames of an event, the innermost first, as in a call stack."""
    storage = event.storage
    what = f"{storage.category} {'x'.join(map(str, storage.shape))} {storage.dtype}"
    where = "" if event.block is None else f"block {event.block}"
    return [_frame(event.name, what, event.operation), _frame(event.phase or "between phases", where)]


def _frame(name: str, filename: str, line: int = 0) -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": line}


def _segment(alive: Iterable[Block], end: int) -> dict[str, Any]:
    """Return all memory as one segment: what is allocated at the end, and the gaps between."""
    blocks, at = list[dict[str, Any]](), 0
    for start, size, frames in [*alive, (end, 0, [])]:
        gap = {"state": "inactive", "requested_size": 0, "frames": []}
        used = {"state": "active_allocated", "requested_size": size, "frames": frames}
        for length, about in ((start - at, gap), (size, used)):
            if length:
                blocks.append({"address": at, "size": length, **about})
                at += length
    names = ("allocated_size", "active_size", "requested_size")
    sizes = dict.fromkeys(names, sum(block["requested_size"] for block in blocks))
    where = {"device": 0, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False}
    return {"address": 0, "total_size": end, **sizes, **where, "frames": [], "blocks": blocks}
