"""One run of a sweep: `work` starts a process and waits for it, `main` is what that process does.

The process holds a lock in its folder, so that only one process writes there. Its stdin is a pipe, and it ends when
that pipe is closed: when the sweep is interrupted, or when the process that started it has ended for any reason. The
kernel of its notebook ends with it. `done.json` is written last: a folder without it counts as unfinished.
"""

import _thread
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from memdfa_lab.batch.sweep_file import Sweep
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import write_text
from memdfa_lab.lab.settings import RunSettings

STATE, LOCK, LOG, DONE, FAILED = "sweep.json", ".lock", "log.txt", "done.json", "failed.json"
INTERRUPTED = 130
KILLED = -getattr(signal, "SIGKILL", 9)  # the status of a process that the system killed; Windows has no such signal
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class CellFailed(Exception):
    """A notebook failed; the text says in which cell, and why."""


def load(out: Path) -> Sweep:
    """Return the sweep whose runs are in a folder. Raises ValueError if there is none."""
    content = read_json(out / STATE)
    if content is None:
        raise ValueError(f"no sweep in {out}: it has no {STATE}")
    return Sweep(**content)


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if there is no such file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def is_done(folder: Path, code: str) -> bool:
    """Tell whether the run is finished, with the current code."""
    about = read_json(folder / "parameters.json")
    return about is not None and about["code"] == code and (folder / DONE).exists()


def is_running(folder: Path) -> bool:
    """Tell whether a living process holds the lock of a run."""
    if not (folder / LOCK).exists():  # FileLock would create it, and its folder
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


@cache
def lifeline() -> int:
    """Return the read end of a pipe that is closed when this process ends; nothing is ever written into it."""
    return os.pipe()[0]


def work(out: str, name: str, retries: int, stdin: int | None = None) -> str | None:
    """Do a run in a process of its own, and repeat it if it fails.

    Args:
        out: The folder of the sweep, with sweep.json.
        name: The run's name in the sweep.
        retries: How often a failed run is repeated.
        stdin: The read end of a pipe; the run is interrupted when it is closed. Default: one that this process holds.

    Returns:
        The last attempt's error, in one line; None if the run is finished.
    """
    folder = Path(out, "runs", name)
    if not folder.parent.is_dir():
        return f"{socket.gethostname()} does not see {folder.parent}: all workers must share the sweep's folder"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "memdfa_lab.batch.sweep_run", out, name]
    for _ in range(1 + retries):
        (folder / FAILED).unlink(missing_ok=True)
        with (folder / LOG).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdin=lifeline() if stdin is None else stdin,
                stdout=log,
                stderr=log,
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TQDM_DISABLE": "1"},
                start_new_session=True,  # Ctrl-C goes to the sweep alone, which then ends its runs
            )
        status = process.wait()
        if status in (0, INTERRUPTED):
            return "interrupted" if status else None
    failed = read_json(folder / FAILED)
    if failed is None:
        memory = ", which often means that memory ran out" if status == KILLED else ""
        failed = {"error": f"its process ended with status {status}{memory}"}
        write_text(folder / FAILED, json.dumps(failed))
    return str(failed["error"])


def main(out: str, name: str) -> int:
    """Do a run in this process; return 0, 1 if it failed, or 130 if it was interrupted."""
    folder = Path(out, "runs", name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        sweep = load(Path(out))
        os.environ |= dict.fromkeys(THREADS, str(sweep.threads))  # for the kernel of a notebook
        torch.set_num_threads(sweep.threads)
        with FileLock(folder / LOCK):  # another process has it if Dask lost sight of a worker that still runs
            if not is_done(folder, sweep.code):
                _prepare(folder, {"run": sweep.run, "parameters": sweep.runs[name], "code": sweep.code})
                started = time.perf_counter()
                (_train if sweep.run == "train" else _notebook)(sweep, name, folder)
                seconds = round(time.perf_counter() - started, 1)
                write_text(folder / DONE, json.dumps({"seconds": seconds, "host": socket.gethostname()}))
                (folder / "checkpoint.pt").unlink(missing_ok=True)  # as large as the network, or larger
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as problem:
        traceback.print_exc()
        text = " ".join(str(problem).split())
        error = text if isinstance(problem, CellFailed) else f"{type(problem).__name__}: {text}"
        write_text(folder / FAILED, json.dumps({"error": error}))
        return 1


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    if os.name == "posix":
        os.kill(os.getpid(), signal.SIGINT)  # training saves a checkpoint, a kernel is shut down
    else:
        _thread.interrupt_main()
    time.sleep(10)
    os._exit(INTERRUPTED)


def _prepare(folder: Path, about: dict[str, Any]) -> None:
    """Write what is run into the folder; remove files of other code, from which training would continue."""
    if read_json(folder / "parameters.json") == about:
        return
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name not in (LOCK, LOG):
            left.unlink()
    write_text(folder / "parameters.json", json.dumps(about, indent=1))


def _train(sweep: Sweep, name: str, folder: Path) -> None:
    settings = RunSettings(**sweep.given(name)).model_dump()
    data = experiments.load_for(settings["network"], settings.pop("dataset"), settings.pop("root"))
    experiments.train(data=data, folder=folder, progress=False, **settings)


def _notebook(sweep: Sweep, name: str, folder: Path) -> None:
    from memdfa_lab.batch.headless import execute

    error = execute(Path(sweep.run), folder, sweep.given(name), sweep.timeout_s)
    if error:
        raise CellFailed(error)
    if not (folder / sweep.result).exists():
        raise FileNotFoundError(f"the notebook has not written {sweep.result}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
