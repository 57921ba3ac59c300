"""Sweeps: run a notebook or a training once for each combination of parameters, here or on a Dask cluster.

Each run is a process of its own (`batch/sweep_run.py`), started by a thread of this process or by a Dask worker. It has
a folder named by a hash of its settings. A finished run is not repeated.
"""

import io
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from memdfa_lab.batch.notebooks import completed, cores
from memdfa_lab.batch.sweep_file import Sweep, read
from memdfa_lab.batch.sweep_run import FAILED, STATE, is_done, is_running, load, read_json, work
from memdfa_lab.core.checks import of_an_extra
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import locked, read_csv, write_text, write_whole
from memdfa_lab.lab.settings import RunSettings

Submit = Callable[[str, str, int], "Future[str | None]"]


class RunsFailed(RuntimeError):
    """One or more runs failed. The others ran to their end, and are in the table."""


def place(file: str | Path) -> Path:
    """Return the default folder for the runs of a sweep file."""
    return Path("reports/runs") / Path(file).stem


def run(file: str | Path, out: str | Path | None = None, scheduler: str | None = None, jobs: int | None = None) -> Path:
    """Run those runs of a sweep file that are not done yet.

    The folder gets runs/HASH/ for each run. The results of all finished runs are in results.csv (and results.parquet,
    with pyarrow) and in a figure.

    Args:
        file: The sweep file.
        out: The folder of all runs; default: reports/runs/NAME.
        scheduler: The address of a Dask scheduler, each of whose workers' threads does one run at a time. All workers
            must see the same folder. None: this machine.
        jobs: How many runs this machine does at a time; default: its cores / the threads of a run.

    Returns:
        The folder.

    Raises:
        ValueError: Before anything runs, for an unusable file, folder or scheduler, and if another sweep is running in
            the folder.
        RuntimeError: If the connection to the scheduler is lost.
        RunsFailed: At the end, if a run failed in every attempt.
    """
    sweep, out = read(file), Path(out or place(file)).resolve()
    if jobs is not None and (jobs < 1 or scheduler):
        raise ValueError("jobs must be 1 or more, and cannot be given with a scheduler: each worker thread does a run")
    if out.exists() and not (out / STATE).exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} has other files and no sweep: choose another folder with --out")
    todo = [name for name in sweep.runs if not is_done(out / "runs" / name, sweep.code)]
    if sweep.run == "train":  # downloaded once here, not by all runs at a time
        every = (RunSettings(**sweep.given(name)) for name in todo)
        for data in {(settings.network, settings.dataset, settings.root) for settings in every}:
            experiments.load_for(*data)
    with ExitStack() as stack:
        submit = stack.enter_context(_cluster(scheduler) if scheduler else _this_machine(jobs, sweep.threads))
        stack.enter_context(locked(out / STATE))
        (out / "runs").mkdir(exist_ok=True)
        write_text(out / STATE, json.dumps(asdict(sweep), indent=1))
        try:
            failed = _follow({submit(str(out), name, sweep.retries): name for name in todo}, sweep, out)
        finally:
            collect(out)
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(sweep.runs)} runs failed: {'; '.join(failed)}; see {out}")
    return out


@contextmanager
def _this_machine(jobs: int | None, threads: int) -> Iterator[Submit]:
    pool = ThreadPoolExecutor(jobs or max(1, cores() // threads))
    read_end, write_end = os.pipe()
    try:
        yield lambda out, name, retries: pool.submit(work, out, name, retries, read_end)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        os.close(write_end)  # ends the runs that are under way
        pool.shutdown()
        os.close(read_end)


@contextmanager
def _cluster(scheduler: str) -> Iterator[Submit]:
    with of_an_extra():
        from distributed import Client
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a lost scheduler is reported in one line
    try:
        client = Client(scheduler, timeout=10, set_as_default=False)
    except (OSError, ValueError) as problem:
        raise ValueError(f"no Dask scheduler at {scheduler}: {problem}") from problem
    with client:
        threads = client.nthreads().values()
        print(f"{len(threads)} workers, {sum(threads)} threads; dashboard: {client.dashboard_link}", flush=True)
        executor = client.get_executor(pure=False)
        yield lambda out, name, retries: executor.submit(work, out, name, retries)


def _follow(waiting: dict["Future[str | None]", str], sweep: Sweep, out: Path) -> list[str]:
    """Show each run that ends, and return one line for each run that failed."""
    total, failed = len(sweep.runs), []
    with tqdm(total=total, initial=total - len(waiting), desc=out.name, unit="run", disable=None) as bar:
        for number, future in enumerate(completed(waiting), total - len(waiting) + 1):
            if future.cancelled():
                raise RuntimeError("lost the Dask scheduler: finished runs are kept, and the same command continues")
            name, problem = waiting[future], future.exception()
            if problem:
                traceback.print_exception(problem)
                error: str | None = " ".join(f"{type(problem).__name__}: {problem}".split())
            else:
                error = future.result()
            text = f"{name} ({sweep.label(name)})"
            if error:
                failed.append(f"{text}, {error}")
                bar.set_postfix(failed=len(failed))
            bar.update()
            if error or bar.disable:
                outcome = f"failed, {error}" if error else "done"
                bar.write(f"{time.strftime('%H:%M:%S')} [{number}/{total}] {text}: {outcome}")
    return failed


def collect(out: str | Path) -> pd.DataFrame:
    """Write the results of all finished runs into the folder, as one table and a figure; return the table.

    The table has the column run, one for each parameter, and those of the runs' results. Without a finished run it is
    empty, and nothing is written.
    """
    from memdfa_lab import figures

    out = Path(out)
    sweep = load(out)
    tables = [_result(sweep, out, name) for name in sweep.runs if is_done(out / "runs" / name, sweep.code)]
    if not tables:
        return pd.DataFrame()
    text = pd.concat(tables).to_csv(index=False)
    write_text(out / "results.csv", text)
    table = read_csv(io.StringIO(text), dtype={"run": str}, low_memory=False)  # so that each column has one type
    if find_spec("pyarrow"):
        write_whole(out / "results.parquet", lambda path: table.to_parquet(path, engine="pyarrow", index=False))
    figure = figures.sweep_summary(table, sweep.varied)
    if figure is not None:
        figures.save(figure, out / "results")
    return table


def _result(sweep: Sweep, out: Path, name: str) -> pd.DataFrame:
    """Return a run's name, parameters and results as columns; a parameter named like a result is parameter_NAME."""
    results = read_csv(out / "runs" / name / sweep.result)
    columns = {"run": name}
    for key, value in sweep.runs[name].items():
        text = json.dumps(value) if isinstance(value, (list, dict)) else value
        columns[f"parameter_{key}" if key in results else key] = text
    return results.assign(**columns)[[*columns, *(key for key in results if key not in columns)]]


def status(where: str | Path, out: str | Path | None = None) -> pd.DataFrame:
    """Return one row per run of a sweep's folder or file: run, status, error and parameters.

    The status is done, failed, running or waiting. Raises ValueError for a folder that has no sweep.
    """
    is_folder = Path(where).is_dir()
    sweep, out = load(Path(where)) if is_folder else read(where), Path(where if is_folder else out or place(where))
    rows = []
    for name, parameters in sweep.runs.items():
        folder = out / "runs" / name
        error = (read_json(folder / FAILED) or {"error": ""})["error"]
        running = is_running(folder)  # asked first: a run that ends in between counts as done
        now = "done" if is_done(folder, sweep.code) else "running" if running else "failed" if error else "waiting"
        rows.append({"run": name, "status": now, "error": error if now == "failed" else "", **parameters})
    return pd.DataFrame(rows)
