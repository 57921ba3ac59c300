"""The time of a step whose weights rest on the disk over that in memory, against the batch.

`python reports/offload/speed.py FOLDER` writes speed.csv beside this file; FOLDER is on the disk in question. The
network is an MLP of 2 GiB, trained by sweeps with plain SGD in a memory cgroup of 1 GiB (so it must be run as root):
the system's cache cannot hold the weights, and each is read from the disk and written to it once a step. Each row has
the disk's speed of that moment, and the time that reading and writing alone would take at that speed.
"""

import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from large import disk_speed, in_cgroup

WIDTH, LAYERS, STEPS, BATCHES = 2048, 128, 4, (16, 64, 256, 512)
COLUMNS = ("batch", "threads", "in_memory_s", "in_memory_sweep_s", "offloaded_s", "committed_each_step_s", "disk_read_gib_s",
           "disk_write_gib_s", "disk_alone_s", "offloaded_over_memory", "offloaded_over_larger")


def one(kind: str, batch: int, folder: str) -> None:
    if not kind.startswith("memory"):
        in_cgroup(2**30)
    import torch

    import memdfa_lab as ml

    make, factory = partial(ml.models.mlp, WIDTH, [WIDTH] * (LAYERS - 1), 10), partial(torch.optim.SGD, lr=1e-6)
    how, B = {}, ml.feedback.Regenerated()
    if kind.startswith("memory"):
        model = make()
    else:
        how["offload"] = ml.offload.Disk(folder, commit_every=1 if kind == "committed" else None)
        model = how["offload"].build(make)
    rule = ml.MemDFA(model, factory, feedback=B, **how)
    x, y, times, now = torch.randn(batch, WIDTH), torch.arange(batch) % 10, [], time.perf_counter()
    sweeps = kind != "memory"
    for _ in rule.sweep((x, y) for _ in range(STEPS)) if sweeps else (rule.step(x, y) for _ in range(STEPS)):
        times.append(time.perf_counter() - now)
        now = time.perf_counter()
    print(statistics.median(times[1:-1] if sweeps else times[1:]))  # in the last one no batch follows


def main(folder: Path) -> None:
    rows, threads = [], os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    for batch in BATCHES:
        folder.mkdir()
        reads, writes = disk_speed(folder)
        seconds = []
        for kind in ("memory", "memory sweep", "offloaded", "committed"):
            call = [sys.executable, __file__, kind, str(batch), str(folder / kind)]
            ran = subprocess.run(call, capture_output=True, text=True, check=True)
            seconds.append(float(ran.stdout))
            shutil.rmtree(folder / kind, ignore_errors=True)
        shutil.rmtree(folder)
        weights = 4 * WIDTH * (WIDTH + 1) * LAYERS
        disk = weights / reads + weights / writes
        ratios = seconds[2] / seconds[0], seconds[2] / max(disk, seconds[0])
        numbers = *seconds, reads / 2**30, writes / 2**30, disk, *ratios
        rows.append([batch, threads, *(f"{number:.3f}" for number in numbers)])
        print(*rows[-1], flush=True)
        with Path(__file__).with_name("speed.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        one(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main(Path(sys.argv[1]))
