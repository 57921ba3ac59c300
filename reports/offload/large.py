"""A network that does not fit: its weights rest on the disk, and the process has less memory than they take.

`python reports/offload/large.py FOLDER --gib 8 --limit-gib 1` trains 8 GiB of weights in a memory cgroup of 1 GiB, for
which it must be run as root. Without --limit-gib the machine's own memory is the limit. A line a batch is printed and
appended to large.csv beside this file. The network is an MLP with ReLU, batch 64, SGD, B drawn again, commits off; one
sweep reads and writes each weight once a batch. FOLDER is deleted at the end.
"""

import argparse
import csv
import os
import shutil
import time
from functools import partial
from pathlib import Path

BATCH, COLUMNS = 64, ("weights_gib", "limit_gib", "width", "layers", "batch", "step", "seconds", "loss", "read_gib",
                      "written_gib", "peak_resident_mib", "peak_anonymous_mib", "disk_read_gib_s", "disk_write_gib_s")
TABLE = Path(__file__).with_name("large.csv")


def in_cgroup(limit: int) -> None:
    """Move this process into a memory cgroup of its own."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"large_{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def status(path: str, name: str) -> int:
    return int(next(line.split()[1] for line in Path(path).read_text().splitlines() if line.startswith(name + ":")))


def disk_speed(folder: Path, size: int = 2**30, piece: int = 2**24) -> tuple[float, float]:
    """Return the bytes a second that the disk reads and writes, without the system's cache."""
    path, data = folder / "speed", memoryview(bytearray(piece))
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    began = time.perf_counter()
    for _ in range(size // piece):
        os.write(file, data)
    os.fsync(file)
    wrote = time.perf_counter()
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(file, 0, os.SEEK_SET)
    middle = time.perf_counter()
    while os.readv(file, [data]):
        pass
    read = time.perf_counter()
    os.close(file)
    path.unlink()
    return size / (read - middle), size / (wrote - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made, and deleted at the end")
    parser.add_argument("--gib", type=float, default=8, help="of weights")
    parser.add_argument("--limit-gib", type=float, help="of memory")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    layers = round(options.gib * 2**30 / (4 * options.width * (options.width + 1)))
    options.folder.mkdir()
    weights = layers * options.width * (options.width + 1) * 4
    if shutil.disk_usage(options.folder).free < weights * 1.1:
        raise SystemExit(f"{weights:,} bytes of weights, and a tenth, do not fit on the disk of {options.folder}")
    if options.limit_gib:
        in_cgroup(int(options.limit_gib * 2**30))
    memory = options.limit_gib or status("/proc/meminfo", "MemTotal") / 2**20

    import torch

    import memdfa_lab as ml

    speeds = disk_speed(options.folder)
    make = partial(ml.models.mlp, options.width, [options.width] * (layers - 1), 10)
    began = time.perf_counter()
    with ml.offload.Disk(options.folder / "network", commit_every=None) as store:
        blocks = store.build(make)
        print(f"built in {time.perf_counter() - began:.0f} s: {weights / 2**30:.2f} GiB in {layers} layers", flush=True)
        rule = ml.MemDFA(blocks, partial(torch.optim.SGD, lr=1e-6), feedback=ml.feedback.Regenerated(), offload=store)
        torch.manual_seed(0)
        x, y = torch.randn(BATCH, options.width), torch.arange(BATCH) % 10
        moved, now, anonymous = io(), time.perf_counter(), 0
        for step, loss in enumerate(rule.sweep((x, y) for _ in range(options.steps)), 1):
            before, began, moved, now = moved, now, io(), time.perf_counter()
            anonymous = max(anonymous, status("/proc/self/status", "RssAnon"))
            numbers = [now - began, loss.item(), *((b - a) / 2**30 for a, b in zip(before, moved, strict=True))]
            numbers += [status("/proc/self/status", "VmHWM") / 2**10, anonymous / 2**10, *(s / 2**30 for s in speeds)]
            row = [f"{weights / 2**30:.2f}", f"{memory:.2f}", options.width, layers, BATCH, step]
            row += [f"{number:.3f}" for number in numbers]
            print(*row, flush=True)
            new = not TABLE.exists()
            with TABLE.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])
    shutil.rmtree(options.folder)


def io() -> tuple[int, int]:
    return status("/proc/self/io", "rchar"), status("/proc/self/io", "wchar")


if __name__ == "__main__":
    main()
