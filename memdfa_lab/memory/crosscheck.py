"""A step's memory as torch's allocators saw it, beside the ledger's account.

The ledger counts the storages that operations pass to each other. The allocators also see memory that an operation
allocates and frees internally. `compare` puts the numbers side by side and explains the differences.
"""

import functools
import gc
import mmap
import os
import re
from collections import Counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from memdfa_lab.core.compat import ALLOCATION, OVERLOADS_TOO, is_composite, overload_name
from memdfa_lab.core.devices import CPU, accelerator, module_of
from memdfa_lab.memory.events import Event, Storage
from memdfa_lab.memory.ledger import as_function, measure
from memdfa_lab.memory.trace import Trace

REST = "memdfa_lab at rest"
OUTSIDE = "no operation (a number that becomes a tensor, the state of a random generator)"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to standard error when it starts and stops


def allocator_trace(step: Any, *batch: Tensor, warm_up: int = 1) -> Trace:
    """Run a step under torch.profiler; return the allocations and frees of torch's allocator, in order, as a Trace.

    The allocator is that of the batch's device, or the CPU's without a batch. CUDA's allocates blocks in multiples of
    512 bytes, and an event has the size of the block.

    An event's name is the operation that allocated the memory. Its category is "scratch" if the same operation freed
    it, or if no operation was running: the ledger does not see such memory. All other memory is "handed on".

    `step` is anything with a method `step`, or a function; it is called with the batch. The `warm_up` steps before it
    are recorded too, so that the size of memory that they leave and the step frees is known. Freeing older memory
    counts as nothing, since torch does not report its size. Allocations in other threads are not seen.
    """
    run, device = as_function(step), next((tensor.device.type for tensor in batch), CPU)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, experimental_config=OVERLOADS_TOO) as profiler:
        for _ in range(warm_up):
            run(*batch)
        with record_function(REST):
            pass
        run(*batch)
    assert profiler.profiler is not None
    return _read(profiler.profiler.kineto_results, device)


def allocator_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the peak of torch's allocator in a step, in bytes above those allocated before the step."""
    return allocator_trace(step, *batch, warm_up=warm_up).peak_bytes


def handed_on_bytes(trace: Trace) -> int:
    """Return the peak of an allocator's trace without scratch, in bytes: the memory that the ledger counts."""
    return Trace([event for event in trace.events if event.storage.category != "scratch"], {}).peak_bytes


def scratch_at_peak(trace: Trace) -> dict[str, int]:
    """Return the bytes of scratch at the peak of an allocator's trace, by operation, largest first."""
    sizes: Counter[str] = Counter()
    for event in trace.events[: int(trace.totals.argmax())]:
        if event.storage.category == "scratch":
            sizes[event.name] += event.change_bytes
    return {name: size for name, size in sizes.most_common() if size}


def accelerator_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the peak of the accelerator's allocator in a step, in bytes above those allocated before the step.

    Raises RuntimeError without an accelerator, or for one whose allocator records no peak, such as MPS.
    """
    kind = accelerator()
    module: Any = kind and module_of(kind)
    if not hasattr(module, "max_memory_allocated"):
        why = f"the allocator of {kind} keeps no peak" if kind else "there is no accelerator"
        raise RuntimeError(f"{why}: use allocator_peak, which sees the CPU")
    run = as_function(step)
    for _ in range(warm_up):
        run(*batch)
    gc.collect()
    module.synchronize()
    rest = module.memory_allocated()
    module.reset_peak_memory_stats()
    run(*batch)
    module.synchronize()
    return int(module.max_memory_allocated() - rest)


def compare(step: Any, *batch: Tensor, resident_bytes: int | None = None) -> pd.DataFrame:
    """Return a step's peak as the ledger, torch's allocators and the system see it; this runs four steps.

    Columns: what, bytes, difference_bytes and difference_percent (to the ledger), explanation. `resident_bytes`: what
    `ml.experiments.resident_peak` returned for the same rule, network and batch; None leaves that row out.
    """
    counted = measure(step, *batch, warm_up=1).peak_bytes
    rows = [("ledger", counted, "each storage that operations hand on to each other")]
    if any(tensor.device.type != CPU for tensor in batch):
        seen = accelerator_peak(step, *batch)
        rows.append(("allocator", seen, "blocks are multiples of 512 bytes; cuBLAS and cuDNN take workspace"))
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
        precision = max(32, 2 * cpus) * cpus * mmap.PAGESIZE
        why = f"blocks are whole pages, small ones leave holes in the heap, Linux's peak is good to {precision:,} bytes"
        rows.append(("resident set", resident_bytes, f"{resident_bytes - seen:+,} bytes to the allocator: {why}"))
    table = pd.DataFrame(rows, columns=["what", "bytes", "explanation"])
    table.insert(2, "difference_bytes", table["bytes"] - counted)
    table.insert(3, "difference_percent", 100 * table["difference_bytes"] / max(counted, 1))
    return table


def _read(results: Any, device: str = CPU) -> Trace:
    """Return the allocator's events, from the profiler's tree of operations and its list of their overloads."""
    overloads = {(event.name(), event.start_ns()): overload_name(event) for event in results.events()}
    entries: list[tuple[int, Any, str, int]] = []  # time in ns, record, operation, its number
    at_rest, todo = 0, [(node, "", 0) for node in results.experimental_event_tree()]
    while todo:
        node, name, number = todo.pop()
        if node.tag == ALLOCATION and node.extra_fields.device.type == device:
            entries.append((node.start_time_ns, node.extra_fields, name, number))
        elif node.name == REST:
            at_rest = node.start_time_ns
        elif not number and _is_dispatched(node.name, overloads.get((node.name, node.start_time_ns))):
            name, number = node.name, node.id
        todo += [(child, name, number) for child in node.children]
    alive: dict[int, tuple[Storage, str, int]] = {}  # by address, with the operation that allocated it
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
    """Tell whether the ledger sees this operation as one, and not as several others."""
    try:
        return re.fullmatch(r"\w+::\w+", name) is not None and not is_composite(f"{name}.{overload}".rstrip("."))
    except RuntimeError:  # some are TorchScript's own, and unknown to the dispatcher
        return False
