"""A step's memory as torch's allocators saw it, beside the ledger's account.

The ledger counts what operations hand to each other. The allocators also see what operations take and give back inside
themselves. `compare` puts the numbers side by side and explains the differences.
"""

import functools
import gc
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from memdfa_lab.core.compat import ALLOCATION, OVERLOADS_TOO, cuda_history, is_composite
from memdfa_lab.memory.events import Event, Storage
from memdfa_lab.memory.files import write_whole
from memdfa_lab.memory.ledger import as_function, measure
from memdfa_lab.memory.trace import Trace

REST = "memdfa_lab at rest"
OUTSIDE = "no operation (a number that becomes a tensor, the state of a random generator)"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to standard error when it starts and stops


def allocator_trace(step: Any, *batch: Tensor, warm_up: int = 1) -> Trace:
    """Run a step under torch.profiler and return what torch's CPU allocator gave out and took back, in order.

    An event's name is the operation that took the memory. Its category is "scratch" if that operation gave it back, or
    if there was none: a ledger of operations does not see it. All other memory is "handed on".

    `step` is anything with a method `step`, or a function; it is called with the batch. `warm_up` steps before are
    recorded too, so that memory which one of them left and the step frees is known; freeing older memory counts
    nothing, since torch does not say how large it was. What other threads allocate is not seen.
    """
    run = as_function(step)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, experimental_config=OVERLOADS_TOO) as profiler:
        for _ in range(warm_up):
            run(*batch)
        with record_function(REST):
            pass
        run(*batch)
    assert profiler.profiler is not None
    return _read(profiler.profiler.kineto_results)


def allocator_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the most bytes that torch's CPU allocator had given out at once in a step, above those before it."""
    return allocator_trace(step, *batch, warm_up=warm_up).peak_bytes


def handed_on_bytes(trace: Trace) -> int:
    """Return the most bytes of an allocator's trace without scratch: what operations hand on, as the ledger counts."""
    return Trace([event for event in trace.events if event.storage.category != "scratch"], {}).peak_bytes


def scratch_at_peak(trace: Trace) -> dict[str, int]:
    """Return the bytes of scratch at the peak of an allocator's trace, by operation, the largest first."""
    sizes: Counter[str] = Counter()
    for event in trace.events[: int(trace.totals.argmax())]:
        if event.storage.category == "scratch":
            sizes[event.name] += event.change_bytes
    return {name: size for name, size in sizes.most_common() if size}


def cuda_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the most bytes that CUDA's caching allocator gives out at once in a step, above those before it.

    Raises RuntimeError where there is no GPU.
    """
    run = _on_gpu(step)
    for _ in range(warm_up):
        run(*batch)
    gc.collect()
    torch.cuda.synchronize()
    rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - rest


def cuda_snapshot(path: str | Path, step: Any, *batch: Tensor) -> None:
    """Write a step's CUDA memory history, for pytorch.org/memory_viz. Raises RuntimeError where there is no GPU."""
    run = _on_gpu(step)
    snapshot = cuda_history(lambda: run(*batch))
    write_whole(path, lambda temporary: temporary.write_bytes(pickle.dumps(snapshot)))


def compare(step: Any, *batch: Tensor, resident_bytes: int | None = None) -> pd.DataFrame:
    """Return a step's peak as the ledger, torch's allocators and the system see it; this runs four to six steps.

    A row each: what, bytes, difference_bytes and difference_percent to the ledger, and explanation. `resident_bytes` is
    what `ml.experiments.resident_peak` returned for the same rule, network and batch.
    """
    counted = measure(step, *batch, warm_up=1).peak_bytes
    rows = [("ledger", counted, "each storage that operations hand on to each other")]
    if any(tensor.is_cuda for tensor in batch):
        seen = cuda_peak(step, *batch)
        rows.append(("CUDA allocator", seen, "blocks are multiples of 512 bytes; cuBLAS and cuDNN take workspace"))
    else:
        trace = allocator_trace(step, *batch)
        seen = trace.peak_bytes
        handed_on = handed_on_bytes(trace)
        rows.append(("allocator without scratch", handed_on, "the same storages, counted by torch itself"))
        scratch = ", ".join(f"{size:,} bytes of scratch in {name}" for name, size in scratch_at_peak(trace).items())
        if torch.backends.mkldnn.enabled and "aten::convolution" in scratch:
            scratch += " (oneDNN copies images and weights into its own layout, channels padded to a vector's width)"
        rows.append(("allocator", seen, f"at its peak: {scratch or 'no scratch'}"))
    if resident_bytes is not None:
        cpus = os.cpu_count() or 1
        precision = max(32, 2 * cpus) * cpus * os.sysconf("SC_PAGE_SIZE")
        why = f"blocks are whole pages, small ones leave holes in the heap, Linux's peak is good to {precision:,} bytes"
        rows.append(("resident set", resident_bytes, f"{resident_bytes - seen:+,} bytes to the allocator: {why}"))
    table = pd.DataFrame(rows, columns=["what", "bytes", "explanation"])
    table.insert(2, "difference_bytes", table["bytes"] - counted)
    table.insert(3, "difference_percent", 100 * table["difference_bytes"] / max(counted, 1))
    return table


def _on_gpu(step: Any) -> Callable[..., Any]:
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here: use allocator_peak, which sees the CPU")
    return as_function(step)


def _read(results: Any) -> Trace:
    """Return the allocator's events in the profiler's tree of operations, in which overloads have no names."""
    overloads = {(event.name(), event.start_ns()): event.overload_name() for event in results.events()}
    entries: list[tuple[int, Any, str, int]] = []  # time in ns, what the allocator did, in which operation
    at_rest, todo = 0, [(node, "", 0) for node in results.experimental_event_tree()]
    while todo:
        node, name, number = todo.pop()
        if node.tag == ALLOCATION and node.extra_fields.device.type == "cpu":
            entries.append((node.start_time_ns, node.extra_fields, name, number))
        elif node.name == REST:
            at_rest = node.start_time_ns
        elif not number and _is_dispatched(node.name, overloads.get((node.name, node.start_time_ns))):
            name, number = node.name, node.id
        todo += [(child, name, number) for child in node.children]
    alive: dict[int, tuple[Storage, str, int]] = {}  # by address, with the operation that took it
    events: list[Event] = []
    for time, entry, name, number in sorted(entries, key=lambda entry: entry[0]):
        if entry.alloc_size > 0:
            storage = Storage("handed on" if number else "scratch", entry.alloc_size, (), "", "born")
            name, change = name or OUTSIDE, entry.alloc_size
            alive[entry.ptr] = storage, name, number
        elif entry.ptr in alive:
            storage, name, taker = alive.pop(entry.ptr)
            change = -storage.size_bytes
            if number == taker:
                storage.category = "scratch"
        else:
            continue
        if time >= at_rest:
            events.append(Event((time - at_rest) / 1e9, 0, name, "", None, change, storage))
    return Trace(events, {})


@functools.cache
def _is_dispatched(name: str, overload: str | None) -> bool:
    """Tell whether this is an operation as the ledger sees it, and not one that is several others."""
    try:
        return re.fullmatch(r"\w+::\w+", name) is not None and not is_composite(f"{name}.{overload}".rstrip("."))
    except RuntimeError:  # some are TorchScript's own, and unknown to the dispatcher
        return False
