"""Wait until other processes leave the processors alone, before something is timed."""

import os
import sys
import time
from pathlib import Path

import numpy as np

IDLE = 0.1  # of one processor: what others may use
COUNTERS = Path("/proc/stat")  # where Linux reports how the processors spend their time


def wait_until_quiet(longest_s: float = 600, sample_s: float = 5) -> bool:
    """Wait until other processes use less than a tenth of one processor; return whether they did in the end.

    Raises ValueError on a system that does not report processor use in /proc/stat.
    """
    if not COUNTERS.exists():
        raise ValueError(f"the load is read from {COUNTERS}, which this system does not have: leave --quiet out")
    for i in range(round(longest_s / sample_s)):
        before = _processor_ticks()
        time.sleep(sample_s)
        spent = _processor_ticks() - before
        used = (os.cpu_count() or 1) * (1 - spent[3:5].sum() / spent.sum())  # columns 4 and 5 are idle time
        if used < IDLE:
            return True
        if i == 0:
            print(
                f"{used:.1f} processors are in use: waiting up to {longest_s:.0f} s until they are idle",
                file=sys.stderr,
            )
    return False


def _processor_ticks() -> np.ndarray:
    return np.array(COUNTERS.read_text("ascii").split()[1:9], float)
