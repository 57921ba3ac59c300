"""Run one notebook through papermill without a browser, and keep track of the kernels that run.

In a run without a browser, nbclient answers the messages of Output widgets, and sometimes waits for ever (nbclient
issue 312). Our notebooks draw into images, so the engine ignores the messages of widgets. Progress bars in cells are
switched off: in a file they are noise. The kernel is reached through a socket of this user, not through an open port.
The time limit holds for the whole notebook; papermill's own holds for each cell.
"""

import os
import signal
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_core.utils import ensure_event_loop, run_sync
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

ENGINE = "memdfa_headless"
GRACE_S = 10.0  # after Ctrl-C, a kernel that still runs is killed


class Interrupted(Exception):
    """A notebook was stopped between two cells."""


class Kernels:
    """The kernels that this process runs in its threads, so that all can be ended together."""

    def __init__(self) -> None:
        self.running: set[Any] = set()
        self.ending = False

    def before_cell(self, manager: Any) -> None:
        """Register a kernel. Raises Interrupted if the kernels are being ended."""
        if self.ending:
            raise Interrupted
        self.running.add(manager)

    def end(self) -> None:
        """Interrupt the kernels, so that training saves a checkpoint; after GRACE_S kill those that still run."""
        self.ending = True
        self._send(signal.SIGINT)
        later = threading.Timer(GRACE_S, self._send, [signal.SIGKILL if os.name == "posix" else signal.SIGTERM])
        later.daemon = True
        later.start()

    def _send(self, number: int) -> None:
        for manager in list(self.running):
            with suppress(RuntimeError, ProcessLookupError):  # it has already ended
                run_sync(manager.signal_kernel)(number)


class HeadlessEngine(NBClientEngine):
    """papermill's own engine, but it ignores the messages of widgets."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        """Run the cells. Options: notebook_timeout and start_timeout (s), kernels, folder, environment."""
        end = time.monotonic() + options.get("notebook_timeout", 3600)
        kernels = options.get("kernels", Kernels())
        with tempfile.TemporaryDirectory(prefix="memdfa-", ignore_cleanup_errors=True) as place:
            socket = {"transport": "ipc", "ip": f"{place}/kernel"}  # by default it is in the working directory
            client: Any = PapermillNotebookClient(
                nb_man,
                timeout_func=lambda cell: max(1.0, end - time.monotonic()),
                iopub_timeout=60,  # nbclient's 4 s are too few on a busy machine
                startup_timeout=options.get("start_timeout", 60),
                kernel_name=kernel_name,
                log_output=False,
                extra_arguments=["--log-level=50"],  # otherwise the kernel repeats the notebook's output on stderr
                config=Config({"KernelManager": socket} if os.name == "posix" else {}),
                on_cell_start=lambda **_: kernels.before_cell(client.km),
            )
            client.comm_open_handlers = {}
            try:
                env = {**os.environ, **options.get("environment", {}), "TQDM_DISABLE": "1"}
                return client.execute(cwd=options.get("folder"), env=env)
            finally:
                if threading.current_thread() is not threading.main_thread():
                    ensure_event_loop().close()  # nbclient made it for this thread


papermill_engines.register(ENGINE, HeadlessEngine)


def execute(
    notebook: Path, out: Path, parameters: dict[str, Any], timeout_s: float, bar: Any = False, **options: Any
) -> str | None:
    """Run one notebook, and write the executed copy and the notebook's files into a folder.

    Args:
        notebook: The notebook; its kernel runs in the notebook's folder.
        out: The folder; the notebook gets it as its parameter `out`.
        parameters: Values of other parameters; paths among them are absolute.
        timeout_s: Seconds that the whole notebook may take.
        bar: Options of tqdm for a progress bar over the cells; False: no bar.
        options: Passed to the engine: kernels (`Kernels`) and environment.

    Returns:
        One line that says in which cell the notebook failed, and why; None if all cells ran.
    """
    error, running = "", out.resolve() / f".{notebook.name}"
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            parameters={"out": _seen_from(notebook.parent, out), **parameters},
            engine_name=ENGINE,
            kernel_name="python3",
            progress_bar=bar,
            notebook_timeout=timeout_s,
            folder=str(notebook.parent),  # papermill's own `cwd` is for this whole process, with all its threads
            **options,
        )
    except papermill.PapermillExecutionError as problem:
        error = f"{problem.ename}: {problem.evalue}"
    except CellTimeoutError:
        error = f"the time limit of {timeout_s:g} s is reached"
    except DeadKernelError:
        error = "the kernel died, which often means that memory ran out"
    except Interrupted:
        error = "interrupted"
    except Exception as problem:  # a notebook that cannot run must not stop the others
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    finally:
        begun = _keep(running, out / notebook.name)
    return f"cell {begun}: {error.splitlines()[0]}" if error else None


def _seen_from(folder: Path, path: Path) -> str:
    """Return the path relative to the folder; on Windows, an absolute path if it is on another drive."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return str(path.absolute())


def _keep(running: Path, executed: Path) -> int:
    """Rename the executed copy, remove this machine's paths from it, and return how many code cells were started."""
    if not running.exists():
        return 0
    notebook = nbformat.read(running, as_version=4)
    notebook.metadata.papermill |= dict.fromkeys(("input_path", "output_path"), executed.name)
    nbformat.write(notebook, running)
    os.replace(running, executed)
    return sum(c.cell_type == "code" and c.metadata.papermill.start_time is not None for c in notebook.cells)
