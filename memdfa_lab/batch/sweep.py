"""Many runs: one notebook or one training, a run for each combination of parameters, here or on a Dask cluster.

Each run has a folder named by a hash of its parameters and is a process of its own (`batch/sweep_run.py`), started by a
thread of this process or by a Dask worker. What is finished is in its folder and not run again.
"""

import argparse
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdfa_lab.batch.reproduce import from_here
from memdfa_lab.batch.sweep_file import Sweep, read
from memdfa_lab.batch.sweep_run import LOCK, Processes, dismiss, is_done, is_held, work
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import locked, write_text, write_whole

if TYPE_CHECKING:
    import pandas as pd

Submit = Callable[[dict[str, Any]], "Future[str | None]"]
STATE = "sweep.json"


class RunsFailed(RuntimeError):
    """One run or more did not come to its end; the others did, and are in the table."""


def place(file: str | Path) -> Path:
    """Return the folder of a sweep file's runs where none is given."""
    return Path("reports/runs") / Path(file).stem


def run(
    file: str | Path,
    out: str | Path | None = None,
    scheduler: str | None = None,
    jobs: int | None = None,
) -> Path:
    """Run what a sweep file asks for and is not done yet; return the folder, reports/runs/NAME if not given.

    `jobs` runs at a time on this machine, cores / threads if not given; or on a Dask cluster's workers, by the address
    of its scheduler, where each thread of a worker takes a run at a time: they must see the same folder. The folder
    gets runs/HASH/ for each run and, of all that are done, results.csv (and .parquet, with pyarrow) and a figure.

    Raises ValueError, before anything runs, for a file, folder or scheduler that will not do, and if another sweep is
    at work in the folder; RuntimeError if the scheduler is lost; RunsFailed at the end, if a run failed each time.
    """
    sweep, out = read(file), Path(out or place(file)).resolve()
    if jobs is not None and (jobs < 1 or scheduler):
        raise ValueError("jobs must be 1 or more; a Dask cluster has as many as its workers have threads")
    if out.exists() and not (out / STATE).exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} holds other files and no sweep: choose another folder with --out")
    tasks = {name: _task(sweep, name, out) for name in sweep.runs}
    todo = [name for name, task in tasks.items() if not is_done(Path(task["folder"]), sweep.code)]
    if sweep.run == "train":  # fetched once, not by all runs at a time
        for given in {tuple(tasks[name]["given"].get(key) for key in ("network", "dataset", "root")) for name in todo}:
            experiments.load_for(given[0] or "fc_relu", given[1] or "mnist5k", given[2])
    with ExitStack() as stack:
        submit = stack.enter_context(_cluster(scheduler) if scheduler else _this_machine(jobs, sweep.threads))
        stack.enter_context(locked(out / STATE))
        (out / "runs").mkdir(exist_ok=True)
        write_text(out / STATE, json.dumps(asdict(sweep), indent=1))
        try:
            failed = _follow({submit(tasks[name]): name for name in todo}, sweep, out)
        finally:
            collect(out)
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(sweep.runs)} runs failed: {'; '.join(failed)}; see {out}")
    return out


def _task(sweep: Sweep, name: str, out: Path) -> dict[str, Any]:
    """Return what `work` takes; a relative path among the parameters is meant from here, wherever the worker is."""
    parameters = sweep.runs[name]
    given = {key: from_here(value) for key, value in parameters.items()}
    rest = {key: value for key, value in asdict(sweep).items() if key != "runs"}
    return {"folder": str(out / "runs" / name), "parameters": parameters, "given": given, **rest}


@contextmanager
def _this_machine(jobs: int | None, threads: int) -> Iterator[Submit]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool, processes = ThreadPoolExecutor(jobs or max(1, cores // threads)), Processes()
    try:
        yield lambda task: pool.submit(work, task, processes)
    finally:
        processes.interrupt()
        pool.shutdown(cancel_futures=True)
        processes.dismiss()


@contextmanager
def _cluster(scheduler: str) -> Iterator[Submit]:
    try:
        from distributed import Client
    except ImportError as problem:
        raise ValueError("--scheduler needs Dask: pip install 'memdfa_lab[sweep]'") from problem
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # we say in a line that a scheduler is gone
    try:
        client = Client(scheduler, timeout=10, set_as_default=False)
    except (OSError, ValueError) as problem:
        raise ValueError(f"no Dask scheduler at {scheduler}: {problem}") from problem
    with client:
        threads = client.nthreads().values()
        print(f"{len(threads)} workers, {sum(threads)} threads; dashboard: {client.dashboard_link}", flush=True)
        yield partial(client.get_executor(pure=False).submit, work)
        client.run(dismiss, on_error="ignore")


def _follow(waiting: dict["Future[str | None]", str], sweep: Sweep, out: Path) -> list[str]:
    """Show what comes to its end, and return what failed, a line a run."""
    from tqdm import tqdm

    total, failed = len(sweep.runs), []
    with tqdm(total=total, initial=total - len(waiting), desc=out.name, unit="run", disable=None) as bar:
        for number, future in enumerate(as_completed(waiting), total - len(waiting) + 1):
            if future.cancelled():
                raise RuntimeError("the Dask scheduler is gone: what was finished is kept, the same command goes on")
            name, problem = waiting[future], future.exception()
            error = " ".join(f"{type(problem).__name__}: {problem}".split()) if problem else future.result()
            text = f"{name} ({sweep.label(name)})"
            if error:
                failed.append(f"{text}, {error}")
                bar.set_postfix(failed=len(failed))
            bar.update()
            if error or bar.disable:
                said = f"failed, {error}" if error else "done"
                bar.write(f"{time.strftime('%H:%M:%S')} [{number}/{total}] {text}: {said}")
    return failed


def collect(out: str | Path) -> "pd.DataFrame":
    """Put the results of all finished runs into one table, with a figure, in the folder; return it.

    The table has the columns run, parameters, and those of the runs' results; no run is no table.
    """
    import pandas as pd

    from memdfa_lab import figures

    out = Path(out)
    sweep = _state(out)
    folders = [out / "runs" / name for name in sweep.runs]
    tables = [pd.read_csv(f / "results.csv", dtype={"run": str}) for f in folders if is_done(f, sweep.code)]
    if not tables:
        return pd.DataFrame()
    text = pd.concat(tables).to_csv(index=False)
    write_text(out / "results.csv", text)
    table = pd.read_csv(io.StringIO(text), dtype={"run": str}, low_memory=False)  # a column has one type
    if find_spec("pyarrow"):
        write_whole(
            out / "results.parquet", lambda temporary: table.to_parquet(temporary, engine="pyarrow", index=False)
        )
    figure = figures.sweep_summary(table, sweep.varied)
    if figure is not None:
        figures.save(figure, out / "results")
    return table


def status(where: str | Path, out: str | Path | None = None) -> "pd.DataFrame":
    """Return a row a run of a sweep's folder or file: run, status, error and parameters.

    The status is done, failed, running or waiting. Raises ValueError for a folder that has no sweep.
    """
    import pandas as pd

    sweep, out = (_state(where), Path(where)) if Path(where).is_dir() else (read(where), Path(out or place(where)))
    rows = []
    for name, parameters in sweep.runs.items():
        folder = out / "runs" / name
        failed = folder / "failed.json"
        error = json.loads(failed.read_text(encoding="utf-8"))["error"] if failed.exists() else ""
        held = is_held(folder / LOCK)  # asked first: a run that ends in between is done
        now = "done" if is_done(folder, sweep.code) else "running" if held else "failed" if error else "waiting"
        error = error if now == "failed" else ""
        rows.append({"run": name, "status": now, "error": error, **parameters})
    return pd.DataFrame(rows)


def _state(out: str | Path) -> Sweep:
    file = Path(out) / STATE
    if not file.exists():
        raise ValueError(f"no sweep in {out}: it has no {STATE}")
    return Sweep(**json.loads(file.read_text(encoding="utf-8")))


def command(options: argparse.Namespace) -> None:
    """Run a sweep or tell how far it is, for the command line."""
    if options.status:
        table = status(options.file, options.out)
        counts = table["status"].value_counts()
        print(f"{len(table)} runs:", ", ".join(f"{number} {name}" for name, number in counts.items()))
        for row in table[table["status"] == "failed"].to_dict("records"):
            print(f"  {row['run']}: {row['error']}")
        return
    out = run(options.file, options.out, options.scheduler, options.jobs)
    print(f"the table of all runs is {out / 'results.csv'}, a figure beside it; each run is in {out / 'runs'}")
