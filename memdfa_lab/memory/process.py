"""What the system saw of a step: torch's allocator, CUDA's allocator, and the resident set of a process of its own.

The ledger counts what operations hand to each other. The system also sees what they take and give back inside
themselves, and it deals in pages. `compare` puts the numbers side by side, and says what the difference is.
"""

import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memdfa_lab.lab.files import written_whole
from memdfa_lab.memory.allocator import allocator_trace
from memdfa_lab.memory.ledger import as_callable, measure

if TYPE_CHECKING:
    import pandas as pd


def cuda_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the most bytes that CUDA's caching allocator gives out in a step, above what it has before.

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
    torch.cuda.memory._record_memory_history()
    try:
        run(*batch)
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    with written_whole(path) as file:
        pickle.dump(snapshot, file)


def compare(step: Any, *batch: Tensor, resident_bytes: int | None = None) -> "pd.DataFrame":
    """Return the peak above rest as the ledger, torch's allocators and the system see it; takes four to six steps.

    A row each: what, bytes, difference_bytes and difference_percent to the ledger, and why they differ.
    `resident_bytes` is what `resident_peak` gave for the same rule, network and batch.
    """
    import pandas as pd

    counted = measure(step, *batch, warm_up=1).peak_bytes
    rows = [("ledger", counted, "each storage that operations hand on to each other")]
    if any(tensor.is_cuda for tensor in batch):
        seen = cuda_peak(step, *batch)
        rows.append(("CUDA allocator", seen, "blocks are multiples of 512 bytes; cuBLAS and cuDNN take workspace"))
    else:
        trace = allocator_trace(step, *batch)
        seen = trace.peak_bytes
        rows.append(("allocator without scratch", trace.handed_on_bytes, "the same storages, counted by torch itself"))
        scratch = ", ".join(f"{size:,} bytes of scratch in {name}" for name, size in trace.scratch_at_peak.items())
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
        raise RuntimeError("there is no CUDA device here: use allocator_peak or resident_peak, which see the CPU")
    return as_callable(step)
