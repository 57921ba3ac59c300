"""The most memory that a fresh process has resident, against depth: BP, MEM-DFA in memory, MEM-DFA with offload.

`python reports/offload/resident.py` writes resident.csv beside this file. A network of DEPTH layers of 1024 x 1024 makes
three steps on a batch of 64. Linux counts the pages: VmHWM is the most that was resident, of which RssAnon (sampled each
millisecond) is memory of the process's own, and the rest pages of files, such as torch's libraries.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH, BATCH, STEPS, DEPTHS = 1024, 64, 3, (4, 16, 64, 128)
KINDS, OPTIMIZERS = ("bp", "memdfa", "offloaded"), ("sgd", "adam")
COLUMNS = ("kind", "optimizer", "depth", "weights_mib", "peak_resident_mib", "peak_anonymous_mib", "read_mib_a_step",
           "written_mib_a_step")


def status(path: str, name: str) -> int:
    return int(next(line.split()[1] for line in Path(path).read_text().splitlines() if line.startswith(name + ":")))


def one(kind: str, optimizer: str, depth: int, folder: str) -> None:
    import threading
    import time
    from functools import partial

    import torch

    import memdfa_lab as ml

    torch.set_num_threads(1)
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], status("/proc/self/status", "RssAnon"))
            time.sleep(0.001)

    sampling = threading.Thread(target=sample)
    sampling.start()
    make = partial(ml.models.mlp, WIDTH, [WIDTH] * (depth - 1), 10)
    factory = partial({"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer], lr=1e-3)
    if kind == "offloaded":
        store = ml.offload.Disk(folder)
        rule = ml.MemDFA(store.build(make), factory, feedback=ml.feedback.Regenerated(), offload=store)
    else:
        rule = {"bp": ml.BP, "memdfa": ml.MemDFA}[kind](make(), factory, feedback=ml.feedback.Regenerated())
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % 10
    for step in range(STEPS):
        before = status("/proc/self/io", "rchar"), status("/proc/self/io", "wchar")
        rule.step(x, y)
    if kind == "offloaded":
        store.commit()
    moved = status("/proc/self/io", "rchar") - before[0], status("/proc/self/io", "wchar") - before[1]
    ended.set()
    sampling.join()
    weights = sum(p.numel() for p in rule.blocks.parameters()) * 4
    resident = status("/proc/self/status", "VmHWM")
    numbers = weights / 2**20, resident / 2**10, peak[0] / 2**10, moved[0] / 2**20, moved[1] / 2**20
    print(kind, optimizer, depth, *(f"{number:.1f}" for number in numbers), sep=",", flush=True)


def main() -> None:
    rows = []
    for kind in KINDS:
        for optimizer in OPTIMIZERS:
            for depth in DEPTHS:
                with tempfile.TemporaryDirectory() as folder:
                    call = [sys.executable, __file__, kind, optimizer, str(depth), folder]
                    ran = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                rows.append(ran.stdout.strip().splitlines()[-1].split(","))
                print(*rows[-1])
                with Path(__file__).with_name("resident.csv").open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
