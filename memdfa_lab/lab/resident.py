"""The resident set: by how much a step raises the memory of its process, as counted by the system."""

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from memdfa_lab.lab.example import example_step

# With these, glibc's malloc returns freed memory to the system: a block of 64 KiB or more has pages of its own.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def resident_peak(
    rule: str, network: str | Sequence[int], batch_size: int, optimizer: str = "sgd", feedback: str = "regenerated"
) -> int:
    """Return by how many bytes a step raises the resident set of a fresh process with one thread: a median of 3 steps.

    `network`: a name of `ml.models`, or the widths of a ReLU MLP, [784, 800, 10]. In that process glibc's malloc
    returns freed memory to the system, and Linux records the peak (VmHWM, reset before each step). Two steps come
    before, so that libraries and optimizers have made their first allocations. Raises RuntimeError except on Linux with
    glibc, ValueError for unknown names.
    """
    if platform.libc_ver()[0] != "glibc" or not os.access("/proc/self/clear_refs", os.W_OK):
        raise RuntimeError("the resident set is measured on Linux with glibc only: use measure or allocator_peak here")
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    environment |= {**MALLOC, **ONE_THREAD}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    names = (rule, network if isinstance(network, str) else list(network), batch_size, optimizer, feedback)
    call = [sys.executable, "-c", "from memdfa_lab.lab import resident; resident.measure_here()", json.dumps(names)]
    ran = subprocess.run(call, env=environment, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip() or f"the process that was measured ended with {ran.returncode}").splitlines()[-1]
        raise (ValueError if last.startswith("ValueError: ") else RuntimeError)(last.removeprefix("ValueError: "))
    return int(ran.stdout.splitlines()[-1])


def measure_here() -> None:
    """Print by how many bytes a step raises the resident set of this process; argv[1] has the arguments."""
    libc, peaks = ctypes.CDLL(None), []
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page is 4 KiB, never 2 MiB
    rule, x, y = example_step(*json.loads(sys.argv[1]))
    for _ in range(5):
        gc.collect()
        libc.malloc_trim(0)
        rest = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        rule.step(x, y)
        peaks.append(_status("VmHWM") - rest)
    print(statistics.median(peaks[2:]))


def _status(name: str) -> int:
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    return 1024 * int(kib)
