"""A step's account in the form of CUDA's memory snapshots, which torch's memory viewer opens."""

from collections.abc import Iterable, Mapping
from typing import Any

from memdfa_lab.memory.events import Event

START = 2**20  # the first address
Frames = list[dict[str, Any]]


class _Addresses:
    """Addresses for what is in memory, so that no two overlap: each tensor gets the first gap that it fits into."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int, Frames]] = []  # address, bytes, frames; in order
        self.end = START  # of all that was ever taken

    def take(self, size: int, frames: Frames) -> int:
        place, address = 0, START
        for place, (start, length, _) in enumerate([*self.taken, (self.end + size, 0, [])]):  # noqa: B007, used below
            if start - address >= size:
                break
            address = start + length
        self.taken.insert(place, (address, size, frames))
        self.end = max(self.end, address + size)
        return address

    def free(self, address: int) -> None:
        self.taken = [block for block in self.taken if block[0] != address]


def snapshot(events: Iterable[Event], resting_by_category: Mapping[str, int]) -> dict[str, Any]:
    """Return what torch.cuda.memory._snapshot returns of a step on a GPU.

    What rests is there from the start, a block a category. A tensor's frames are its operation, phase and block, and
    category and shape. One that is resized is freed and taken again.
    """
    addresses, alive, entries = _Addresses(), dict[int, tuple[int, int]](), list[dict[str, Any]]()

    def note(action: str, address: int, size: int, event: Event, frames: Frames) -> None:
        about = {"stream": 0, "time_us": int(1e6 * event.time_s), "frames": frames}
        entries.append({"action": action, "addr": address, "size": size, **about})

    for name, size in resting_by_category.items():
        addresses.take(size, [_frame(name, "at rest")])
    for event in events:
        key, frames = id(event.storage), _frames(event)
        address, size = alive.pop(key, (0, 0))
        if size:
            addresses.free(address)
            for action in ("free_requested", "free_completed"):
                note(action, address, size, event, frames)
        size += event.change_bytes
        if size > 0:
            alive[key] = addresses.take(size, frames), size
            note("alloc", *alive[key], event, frames)
    return {"segments": [_segment(addresses)], "device_traces": [entries], "external_annotations": []}


def _frames(event: Event) -> Frames:
    """Return the innermost first, as a stack of calls has them."""
    storage = event.storage
    what = f"{storage.category} {'x'.join(map(str, storage.shape))} {storage.dtype}"
    where = "" if event.block is None else f"block {event.block}"
    return [_frame(event.name, what, event.operation), _frame(event.phase or "between phases", where)]


def _frame(name: str, filename: str, line: int = 0) -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": line}


def _segment(addresses: _Addresses) -> dict[str, Any]:
    """Return all memory as one segment, with what is there at the end and the gaps between."""
    blocks, at = [], START
    for start, size, frames in [*addresses.taken, (addresses.end, 0, [])]:
        for length, state in ((start - at, "inactive"), (size, "active_allocated")):
            if length:
                used = {"requested_size": length, "frames": frames} if state == "active_allocated" else {"frames": []}
                blocks.append({"address": at, "size": length, "state": state, "requested_size": 0, **used})
                at += length
    used_bytes, about = sum(block[1] for block in addresses.taken), {"device": 0, "stream": 0, "segment_type": "large"}
    sizes = dict.fromkeys(("allocated_size", "active_size", "requested_size"), used_bytes)
    pool = {"segment_pool_id": (0, 0), "is_expandable": False, "frames": []}
    return {"address": START, "total_size": at - START, **sizes, **about, **pool, "blocks": blocks}
