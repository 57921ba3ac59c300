"""Each event of torch's CPU allocator in a step, from torch.profiler; what operations take inside themselves, too."""

import contextlib
import functools
import gc
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from memdfa_lab.memory.ledger import as_callable

if TYPE_CHECKING:
    import pandas as pd

REST = "memdfa_lab at rest"
OUTSIDE = "no operation (a number that becomes a tensor, the state of a random generator)"
NOISE = re.compile(rb"(ActivityProfiler\w*|Cupti\w*|DeviceProperties|CPUAllocator)\.(cpp|h):\d+")


@dataclass
class Block:
    """What the allocator gave out, to which operation (its number, 0 for none).

    It is scratch if the same operation gave it back, or there was none: a ledger of operations sees no such block.
    """

    operation: str
    number: int
    size_bytes: int
    scratch: bool = False


@dataclass
class AllocatorTrace:
    """What torch's CPU allocator gave out and took back in a step, in order; bytes are above what rested."""

    changes: list[tuple[float, int, Block]]  # time_s, bytes (negative when freed), the block

    @functools.cached_property
    def timeline(self) -> "pd.DataFrame":
        """A row an event: time_s, operation (that took the block), scratch, bytes, total_bytes (alive after it)."""
        import pandas as pd

        rows = [(time, block.operation, block.scratch, size) for time, size, block in self.changes]
        table = pd.DataFrame(rows, columns=["time_s", "operation", "scratch", "bytes"])
        return table.assign(total_bytes=table["bytes"].cumsum())

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once."""
        return max(accumulate((size for _, size, _ in self.changes), initial=0))

    @property
    def handed_on_bytes(self) -> int:
        """The same without scratch: what operations hand on to each other, and the ledger counts."""
        return max(accumulate((size for _, size, block in self.changes if not block.scratch), initial=0))

    @property
    def scratch_at_peak(self) -> dict[str, int]:
        """Bytes of scratch at the peak, by operation, the largest first."""
        totals = list(accumulate(size for _, size, _ in self.changes))
        found: Counter[str] = Counter()
        for _, size, block in self.changes[: totals.index(max(totals)) + 1] if totals else ():
            found[block.operation] += size if block.scratch else 0
        return {name: size for name, size in found.most_common() if size}


def allocator_trace(step: Any, *batch: Tensor, warm_up: int = 1) -> AllocatorTrace:
    """Run a step under torch.profiler and return every event of torch's CPU allocator.

    `step` is anything with a method `step`, or a callable. `warm_up` steps run before it, watched too, so that a block
    that one of them left and the step frees is known; freeing a block from before them counts nothing, since torch
    does not say how large it was. What other threads take is not seen.
    """
    run = as_callable(step)
    gc.collect()
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(warm_up):
            run(*batch)
        with record_function(REST):
            pass
        run(*batch)
    assert profiler.profiler is not None
    return _read(profiler.profiler.kineto_results.experimental_event_tree())


def allocator_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the most bytes that torch's CPU allocator had given out at once in a step, above what rested before it."""
    return allocator_trace(step, *batch, warm_up=warm_up).peak_bytes


def _read(roots: Sequence[Any]) -> AllocatorTrace:
    entries: list[tuple[int, Any, str, int]] = []  # time in ns, what the allocator did, in which operation
    at_rest, todo = 0, [(node, "", 0) for node in roots]
    while todo:
        node, name, number = todo.pop()
        if node.tag == _EventType.Allocation and node.extra_fields.device.type == "cpu":
            entries.append((node.start_time_ns, node.extra_fields, name, number))
        elif node.name == REST:
            at_rest = node.start_time_ns
        elif not number and _is_dispatched(node.name):
            name, number = node.name, node.id
        todo += [(child, name, number) for child in node.children]
    alive: dict[int, Block] = {}
    changes = []
    for time, entry, name, number in sorted(entries, key=lambda entry: entry[0]):
        size = entry.alloc_size
        if size > 0:
            block = alive[entry.ptr] = Block(name or OUTSIDE, number, size, scratch=not number)
        elif entry.ptr in alive:
            block = alive.pop(entry.ptr)
            block.scratch, size = block.scratch or number == block.number, -block.size_bytes
        else:
            continue
        if time >= at_rest:
            changes.append(((time - at_rest) / 1e9, size, block))
    return AllocatorTrace(changes)


@functools.cache
def _is_dispatched(name: str) -> bool:
    """Whether this is an operation as a TorchDispatchMode sees it, not one that is written as several others."""
    schemas = torch._C._jit_get_schemas_for_operator(name) if re.fullmatch(r"\w+::\w+", name) else []
    for schema in schemas:
        if not schema.overload_name.endswith("out"):  # of aten::empty this one alone is made of others
            with contextlib.suppress(RuntimeError):  # some are TorchScript's own, and unknown to the dispatcher
                full = name + "." * bool(schema.overload_name) + schema.overload_name
                if torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
                    return False
    return bool(schemas)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the profiler's C++ writes to standard error; what others write there comes at the end."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            os.write(2, b"".join(line for line in file if not NOISE.search(line)))
