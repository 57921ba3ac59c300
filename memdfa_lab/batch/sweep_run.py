"""One run of a sweep: a process of its own, and the thread or Dask worker that starts it and looks after it.

The process holds a lock in its folder, so that no two write there, and ends when the pipe from its parent breaks, so
that nothing outlives a worker that was killed; its notebook's kernel ends with it. `done.json` is written last: without
it, nothing in the folder counts.
"""

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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from memdfa_lab.batch.reproduce import execute
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import write_text

if TYPE_CHECKING:
    import pandas as pd

LOCK, LOG, DONE, FAILED = ".lock", "log.txt", "done.json", "failed.json"
INTERRUPTED = 130
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class CellFailed(Exception):
    """A notebook stopped in a cell; the text says in which and why."""


def is_done(folder: Path, code: str) -> bool:
    """Tell whether the run came to its end, with the code there is now."""
    about = _read(folder / "parameters.json")
    return about is not None and about["code"] == code and (folder / DONE).exists()


def is_held(lock: Path) -> bool:
    """Tell whether a living process holds a lock file."""
    if not lock.exists():  # FileLock would make it, and its folder
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


class Processes:
    """Processes that do runs, as many as are asked for at a time; one that waits for its next run has all imported."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[str]] = []
        self._busy: set[subprocess.Popen[str]] = set()
        self._interrupted = False

    def do(self, task: dict[str, Any]) -> int:
        """Do a run and return its exit status, negative for the signal that killed it."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = _start()
        assert process.stdin is not None
        assert process.stdout is not None
        self._busy.add(process)
        with suppress(OSError, ValueError):  # it died, or is closed already
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            if self._interrupted:
                process.stdin.close()
        status = process.stdout.readline()
        self._busy.remove(process)
        if status and not self._interrupted:
            self._idle.append(process)
            return int(status)
        ended = _end(process)
        return int(status) if status else ended

    def dismiss(self) -> None:
        """End the processes that wait."""
        while self._idle:
            _end(self._idle.pop())

    def interrupt(self) -> None:
        """End what is under way, which keeps what it has, with the status 130; so does what is asked for afterwards."""
        self._interrupted = True
        for process in list(self._busy):
            assert process.stdin is not None
            with suppress(OSError):  # it died
                process.stdin.close()


OURS = Processes()  # of a Dask worker


def dismiss() -> None:
    """End the processes of this Dask worker that wait for a run."""
    OURS.dismiss()


def work(task: dict[str, Any], processes: Processes = OURS) -> str | None:
    """Do a run, `retries` times again if it fails; return what went wrong at last, in one line, or None.

    `task`: the folder, the parameters, as they are `given` where the command was, and what `sweep_file.Sweep` has
    besides.
    """
    folder = Path(task["folder"])
    if not folder.parent.is_dir():
        return f"{socket.gethostname()} does not see {folder.parent}: all workers must share the sweep's folder"
    folder.mkdir(exist_ok=True)
    for _ in range(1 + task["retries"]):
        (folder / FAILED).unlink(missing_ok=True)
        status = processes.do(task)
        if status == 0:
            return None
        if status == INTERRUPTED:
            return "interrupted"
    failed = _read(folder / FAILED)
    if failed is None:
        memory = ", which often means that memory ran out" if status == -signal.SIGKILL else ""
        failed = {"error": f"its process ended with status {status}{memory}"}
        write_text(folder / FAILED, json.dumps(failed))
    return str(failed["error"])


def _start() -> "subprocess.Popen[str]":
    threads = dict.fromkeys(THREADS, "1")  # until a run says how many
    return subprocess.Popen(
        [sys.executable, "-m", "memdfa_lab.batch.sweep_run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **threads, "TQDM_DISABLE": "1"},
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which then ends it
    )


def _end(process: "subprocess.Popen[str]") -> int:
    with suppress(OSError), process:  # closes the pipes, by which it ends, and waits; if it died, a task is left in one
        pass
    return process.returncode


def main() -> None:
    """Do the runs that stdin names, a line each, and say the exit status of each on stdout.

    A run is a fork, which has all that is imported here and nothing of the runs before. Where fork is not safe, this
    process does one run itself and ends with its status.
    """
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # torch imports more at the first optimizer
    for line in iter(sys.stdin.readline, ""):
        child = os.fork() if sys.platform == "linux" else 0
        if child == 0:
            status = _run(json.loads(line))
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):  # the parent is gone
            os.write(1, f"{status}\n".encode())
    sys.exit(INTERRUPTED)


def _run(task: dict[str, Any]) -> int:
    """Do a run in this process; return 0, 1 if it failed, or 130 if the parent went away or closed the pipe."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(task["folder"])
    os.dup(1)  # by its end the parent sees that of this process, and kernels do not inherit it
    with (folder / LOG).open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ |= dict.fromkeys(THREADS, str(task["threads"]))  # for a notebook's kernel
    torch.set_num_threads(task["threads"])
    try:
        with FileLock(folder / LOCK):  # held if a worker is thought lost that is not
            if not is_done(folder, task["code"]):
                _prepare(task, folder)
                started = time.perf_counter()
                results = (_train if task["run"] == "train" else _notebook)(task, folder)
                write_text(folder / "results.csv", _tidy(task, results).to_csv(index=False))
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


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)  # training keeps a checkpoint, a kernel is shut down
    time.sleep(10)
    os._exit(INTERRUPTED)


def _read(file: Path) -> dict[str, Any] | None:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _prepare(task: dict[str, Any], folder: Path) -> None:
    """Say in the folder what is run; what another code left there is removed, else training goes on from it."""
    about = {name: task[name] for name in ("run", "parameters", "code")}
    if _read(folder / "parameters.json") == about:
        return
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name not in (LOCK, LOG):
            left.unlink()
    write_text(folder / "parameters.json", json.dumps(about, indent=1))


def _train(task: dict[str, Any], folder: Path) -> "pd.DataFrame":
    given = {"rule": "memdfa", "network": "fc_relu", "dataset": "mnist5k", **task["given"]}
    data = experiments.load_for(given["network"], given.pop("dataset"), given.pop("root", None))
    if "feedback" in given:
        given["feedback_kind"] = given.pop("feedback")
    _, history = experiments.train(data=data, folder=folder, progress=False, **given)
    return history.table


def _notebook(task: dict[str, Any], folder: Path) -> "pd.DataFrame":
    import pandas as pd

    notebook = Path(task["run"])
    error = execute(notebook, folder, task["given"], task["timeout_s"], notebook.stem)
    if error:
        raise CellFailed(error)
    return pd.read_csv(folder / f"{notebook.stem}-{task['table']}.csv")


def _tidy(task: dict[str, Any], results: "pd.DataFrame") -> "pd.DataFrame":
    """Put the run's name and parameters in front; a parameter with the name of a result is parameter_NAME."""
    columns = {"run": Path(task["folder"]).name}
    for name, value in task["parameters"].items():
        plain = json.dumps(value) if isinstance(value, (list, dict)) else value
        columns[f"parameter_{name}" if name in results else name] = plain
    table = results.assign(**columns)
    return table[[*columns, *(name for name in results if name not in columns)]]


if __name__ == "__main__":
    main()
