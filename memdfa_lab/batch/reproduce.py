"""Run the numbered notebooks in one command, as many at a time as there are cores; an interrupted run resumes."""

import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

from tqdm import tqdm

from memdfa_lab.batch.headless import Kernels, execute
from memdfa_lab.batch.notebooks import completed, cores, numbered, parameters_of, resolved, source_of
from memdfa_lab.batch.page import write_index, write_page
from memdfa_lab.batch.report import versions
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.lab.files import locked, write_text

STATE = "run.json"


class NotebooksFailed(RuntimeError):
    """One or more notebooks failed. The others ran to their end, and all are in the run folder."""


def reproduce(
    out: str | Path | None = None,
    only: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    timeout_s: float = 900,
    jobs: int | None = None,
) -> Path:
    """Run the notebooks through papermill, several at a time with one thread each.

    The folder gets each executed notebook, its figures (svg, png) and tables (csv), index.html with a page for each
    notebook, and run.json, with which an interrupted run continues. A finished notebook is run again only if its
    source has changed. Relative paths among the parameters start from the working directory (`notebooks.resolved`).

    Args:
        out: The run folder, a new one or that of a run to continue; default: reports/runs/<time>.
        only: Notebooks by number or name; default: those of the run in the folder, or all if there is none.
        parameters: Values by name, for the notebooks that have them; None: those that the run was started with.
        overwrite: Run the chosen notebooks again from the start.
        timeout_s: Seconds that one notebook may take.
        jobs: How many notebooks run at a time; default: as many as this process has cores.

    Returns:
        The run folder.

    Raises:
        ValueError: Before anything runs, for an unknown notebook or parameter, and for a folder with a finished run
            (unless `overwrite`), a run with other parameters, or other files.
        NotebooksFailed: At the end, if a notebook failed.
    """
    out = Path("reports/runs") / time.strftime("%Y%m%d-%H%M%S") if out is None else Path(out)
    jobs = cores() if jobs is None else check_int("jobs", jobs)
    state = _read(out)
    before: dict[str, Any] = {"parameters": {}, "notebooks": {}} if overwrite else state
    chosen = _choose(only or list(before["notebooks"]))
    parameters = before["parameters"] if parameters is None else json.loads(json.dumps(parameters))
    given = _given(chosen, parameters)
    _refuse(out, state, set(chosen), parameters, overwrite)

    waiting = {name: {"status": "waiting"} for name in chosen}
    records = state["notebooks"] | waiting if overwrite else waiting | state["notebooks"]
    state |= {"parameters": parameters, "versions": versions(), "notebooks": dict(sorted(records.items()))}
    with locked(out / STATE):
        _Run(out, state, list(chosen), timeout_s).run_all(chosen, given, jobs)
    failed = [f"{name}, {record['error']}" for name in chosen if "error" in (record := state["notebooks"][name])]
    if failed:
        raise NotebooksFailed(f"{len(failed)} of {len(chosen)} notebooks failed: {'; '.join(failed)}; see {out}")
    return out


def _read(out: Path) -> dict[str, Any]:
    if (out / STATE).exists():
        state: dict[str, Any] = json.loads((out / STATE).read_text(encoding="utf-8"))
        return state
    if out.exists() and not all(file.name.startswith(".") for file in out.iterdir()):
        raise ValueError(f"{out} has other files and no run: choose another folder with --out")
    return {"parameters": {}, "notebooks": {}}


def _choose(only: Sequence[str]) -> dict[str, Path]:
    notebooks, chosen = numbered(), set()
    for name in only:
        found = [stem for stem in notebooks if name in (stem[:2], stem, f"{stem}.ipynb")]
        if not found:
            raise ValueError(f"no notebook {name!r}: there are {', '.join(notebooks)}")
        chosen.update(found)
    return {name: path for name, path in notebooks.items() if name in chosen or not only}


def _given(notebooks: dict[str, Path], parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each notebook, those of the parameters that it has. The user cannot give `out`."""
    found = {stem: parameters_of(path) for stem, path in notebooks.items()}
    known = {name for has in found.values() for name in has} - {"out"}
    for name in parameters:
        lookup("parameter", name, dict.fromkeys(sorted(known)))
    given = {}
    for stem, has in found.items():
        comments = {name: about["help"] for name, about in has.items()}
        given[stem] = resolved({k: v for k, v in parameters.items() if k in has}, comments, Path.cwd())
    return given


def _refuse(out: Path, state: dict[str, Any], names: set[str], parameters: dict[str, Any], overwrite: bool) -> None:
    """Raise ValueError if the run in the folder cannot be continued with these notebooks and parameters."""
    records = state["notebooks"]
    if records and state["parameters"] != parameters and not (overwrite and names >= set(records)):
        raise ValueError(
            f"{out} has a run with other parameters ({state['parameters'] or 'none given'}): choose another folder "
            "with --out, or start all its notebooks anew with --overwrite"
        )
    if not overwrite and all(records.get(name, {}).get("status") == "done" for name in names):
        raise ValueError(f"{out} has a finished run: choose another folder with --out, or start anew with --overwrite")


class _Run:
    """The notebooks of one run: runs them in threads, and keeps run.json and the pages up to date."""

    def __init__(self, out: Path, state: dict[str, Any], names: list[str], timeout_s: float):
        # absolute: papermill changes the working directory for a moment, while other threads write
        self.out, self.asked = out.absolute(), out
        self.state, self.names, self.timeout_s = state, names, timeout_s
        self.records: dict[str, dict[str, Any]] = state["notebooks"]
        self.writing = threading.Lock()
        self.kernels = Kernels()

    def run_all(self, chosen: dict[str, Path], given: dict[str, dict[str, Any]], jobs: int) -> None:
        """Run the unfinished notebooks in threads; at Ctrl-C end their kernels, and say how to continue."""
        todo = [notebook for name, notebook in chosen.items() if not self.is_done(name, source_of(notebook))]
        with ThreadPoolExecutor(jobs) as pool:
            threads = [pool.submit(self.run_one, notebook, given[notebook.stem]) for notebook in todo]
            try:
                for thread in completed(threads):
                    thread.result()
            except BaseException as problem:
                pool.shutdown(wait=False, cancel_futures=True)
                self.kernels.end()
                pool.shutdown()
                stopped = [name for name in self.names if self.records[name]["status"] == "interrupted"]
                if stopped and isinstance(problem, KeyboardInterrupt):
                    quoted = shlex.quote if os.name == "posix" else lambda path: list2cmdline([path])
                    command = f"memdfa reproduce --out {quoted(str(self.asked))}"
                    text = f"interrupted in {', '.join(stopped)}: finished notebooks are kept; {command} continues"
                    raise KeyboardInterrupt(text) from None
                raise

    def is_done(self, name: str, source: str) -> bool:
        """Tell whether a notebook is done with this source; remove what it wrote with another source."""
        record = self.records[name]
        if record["status"] == "done" and record["source"] == source:
            self.say(name, "done before, skipped")
            return True
        if record.get("source") != source:  # with the same source, training continues from its checkpoints
            _clear(self.out, name)
        return False

    def run_one(self, notebook: Path, given: dict[str, Any]) -> None:
        """Run one notebook, and record the outcome."""
        name, source, started = notebook.stem, source_of(notebook), time.perf_counter()
        self.keep(name, status="running", source=source)
        bar = {"desc": self.label(name), "leave": False} if sys.stderr.isatty() else False
        if not bar:
            self.say(name, "started")
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        error = execute(
            notebook, self.out, given, self.timeout_s, bar=bar, kernels=self.kernels, environment=environment
        )
        if error and self.kernels.ending:
            self.keep(name, status="interrupted", source=source)
            return
        seconds = round(time.perf_counter() - started, 1)
        self.say(name, f"failed after {seconds:.0f} s, {error}" if error else f"done in {seconds:.0f} s")
        if (self.out / notebook.name).exists():  # there is none if the notebook could not be started
            write_page(self.out, name)
        outcome = {"status": "failed", "error": error} if error else {"status": "done"}
        self.keep(name, **outcome, source=source, seconds=seconds)

    def keep(self, name: str, **record: Any) -> None:
        """Write the record of a notebook into run.json, and update index.html."""
        with self.writing:
            self.records[name] = record
            write_text(self.out / STATE, json.dumps(self.state, indent=1))
            write_index(self.out, self.state)

    def label(self, name: str) -> str:
        """Return the name with its number among the chosen notebooks."""
        return f"[{1 + self.names.index(name)}/{len(self.names)}] {name}"

    def say(self, name: str, text: str) -> None:
        """Print a line, above the progress bars if there are any."""
        tqdm.write(f"{time.strftime('%H:%M:%S')} {self.label(name)}: {text}")


def _clear(out: Path, name: str) -> None:
    """Remove what a notebook wrote into the folder."""
    shutil.rmtree(out / name, ignore_errors=True)
    for file in (*out.glob(f"{name}.*"), *out.glob(f"{name}-*")):
        file.unlink(missing_ok=True)
