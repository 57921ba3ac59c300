"""The resident set: by how much a step raises the memory of a process of its own, as the system counts it."""

import ctypes
import functools
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
from typing import Any

import torch

from memdfa_lab.core.checks import lookup

# glibc's malloc gives back what is freed: a block of 64 KiB or more has its own pages, the others one trimmed heap.
GIVING_BACK = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"), "0") | {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


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
    code = "from memdfa_lab.lab import resident; resident._child()"
    call = [sys.executable, "-c", code, json.dumps(names)]
    ran = subprocess.run(call, env=environment, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip() or f"the process that was measured ended with {ran.returncode}").splitlines()[-1]
        raise (ValueError if last.startswith("ValueError: ") else RuntimeError)(last.removeprefix("ValueError: "))
    return int(ran.stdout.splitlines()[-1])


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
    from memdfa_lab.core.feedback import KINDS
    from memdfa_lab.core.rules import RULES
    from memdfa_lab.lab import models  # here alone: nothing else in this module knows a rule
    from memdfa_lab.lab.losses import LOSSES
    from memdfa_lab.lab.settings import OPTIMIZERS
    from memdfa_lab.rivals import BASELINES

    if isinstance(network, str):
        setting = models.get(network)
        model, loss, x = models.build(network), setting.loss, torch.rand(1, *setting.input_shape)
    else:
        model, loss, x = models.mlp(network[0], network[1:-1], network[-1]), "cross_entropy", torch.rand(1, network[0])
    make = functools.partial(lookup("optimizer", optimizer, OPTIMIZERS), lr=1e-3)
    made = lookup("rule", rule, {**RULES, **BASELINES})(
        model, make, LOSSES[loss], lookup("feedback", feedback, KINDS)()
    )
    return made, x.repeat(batch_size, *[1] * (x.dim() - 1)), torch.zeros(batch_size, dtype=torch.long)
