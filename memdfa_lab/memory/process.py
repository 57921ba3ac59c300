"""What the system saw of a step: torch's allocator, CUDA's allocator, and the resident set of a process of its own.

The ledger counts what operations hand to each other. The system also sees what they take and give back inside
themselves, and it deals in pages. `compare` puts the numbers side by side, and says what the difference is.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from memdfa_lab.files import written_whole
from memdfa_lab.names import known

if TYPE_CHECKING:
    import pandas as pd

REST = "memdfa_lab at rest"
OUTSIDE = "no operation (a number that becomes a tensor, the state of a random generator)"
NOISE = re.compile(rb"(ActivityProfiler\w*|Cupti\w*|DeviceProperties|CPUAllocator)\.(cpp|h):\d+")
# glibc's malloc gives back what is freed: a block of 64 KiB or more has its own pages, the others one trimmed heap.
GIVING_BACK = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"), "0") | {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


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
    run = _callable(step)
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


def cuda_peak(step: Any, *batch: Tensor, warm_up: int = 1) -> int:
    """Return the same of CUDA's caching allocator. Raises RuntimeError where there is no GPU."""
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


def resident_peak(
    rule: str, network: str | Sequence[int], batch_size: int, optimizer: str = "sgd", feedback: str = "regenerated"
) -> int:
    """Return by how many bytes a step raises the resident set of a fresh process with one thread: a median of 3 steps.

    `network`: a name of `ml.models`, or the widths of a ReLU MLP, [784, 800, 10]. In that process glibc's malloc gives
    back what is freed, and Linux keeps the peak (VmHWM, set back before each step). What
    libraries and optimizers allocate once is there after 2 steps before. Raises RuntimeError elsewhere than on
    Linux with glibc, ValueError for names that are unknown.
    """
    if platform.libc_ver()[0] != "glibc" or not os.access("/proc/self/clear_refs", os.W_OK):
        raise RuntimeError("the resident set is measured on Linux with glibc only: use measure or allocator_peak here")
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    environment |= GIVING_BACK | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    names = (rule, network if isinstance(network, str) else list(network), batch_size, optimizer, feedback)
    code = "from memdfa_lab.memory import process; process._child()"
    call = [sys.executable, "-c", code, json.dumps(names)]
    ran = subprocess.run(call, env=environment, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip() or f"the process that was measured ended with {ran.returncode}").splitlines()[-1]
        raise (ValueError if last.startswith("ValueError: ") else RuntimeError)(last.removeprefix("ValueError: "))
    return int(ran.stdout.splitlines()[-1])


def compare(step: Any, *batch: Tensor, resident_bytes: int | None = None) -> "pd.DataFrame":
    """Return the peak above rest as the ledger, torch's allocators and the system see it; takes four to six steps.

    A row each: what, bytes, difference_bytes and difference_percent to the ledger, and why they differ.
    `resident_bytes` is what `resident_peak` gave for the same rule, network and batch.
    """
    import pandas as pd

    from memdfa_lab.memory.ledger import measure

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


def _callable(step: Any) -> Callable[..., Any]:
    return step.step if hasattr(step, "step") else step


def _on_gpu(step: Any) -> Callable[..., Any]:
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here: use allocator_peak or resident_peak, which see the CPU")
    return _callable(step)


# ---------------------------------------------------------------------------------------- what the profiler recorded


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


# ------------------------------------------------------------------------------------------- in the process of its own


def _child() -> None:
    libc, peaks = ctypes.CDLL(None), []
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page is 4 KiB, never 2 MiB
    rule, x, y = _from_names(*json.loads(sys.argv[1]))
    for _ in range(5):
        gc.collect()
        libc.malloc_trim(0)
        rest = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        rule.step(x, y)
        peaks.append(_status("VmHWM") - rest)
    print(statistics.median(peaks[2:]))


def _status(name: str) -> int:
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kib)


def _from_names(rule: str, network: str | list[int], batch_size: int, optimizer: str, feedback: str) -> Any:
    from memdfa_lab import models  # here alone: nothing else in this module knows a rule
    from memdfa_lab.baselines import BASELINES
    from memdfa_lab.experiments import OPTIMIZERS
    from memdfa_lab.feedback import KINDS
    from memdfa_lab.losses import LOSSES
    from memdfa_lab.rules import RULES

    if isinstance(network, str):
        model, loss, x = (
            models.build(network),
            models.get(network).loss,
            torch.rand(1, *models.get(network).input_shape),
        )
    else:
        model, loss, x = models.mlp(network[0], network[1:-1], network[-1]), "cross_entropy", torch.rand(1, network[0])
    make = functools.partial(known("optimizer", optimizer, OPTIMIZERS), lr=1e-3)
    made = known("rule", rule, {**RULES, **BASELINES})(model, make, LOSSES[loss], known("feedback", feedback, KINDS)())
    return made, x.repeat(batch_size, *[1] * (x.dim() - 1)), torch.zeros(batch_size, dtype=torch.long)
