"""The numbered notebooks in one command: each through papermill into one folder, where a run that was cut goes on."""

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdfa_lab.batch.report import versions
from memdfa_lab.core.checks import lookup
from memdfa_lab.lab.files import locked, write_text

STATE = "run.json"


class NotebooksFailed(RuntimeError):
    """One notebook or more did not run to its end; the others did, and all are in the run folder."""


def notebooks_folder() -> Path:
    """Return where the numbered notebooks are: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "notebooks", here / "_notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the notebooks are not installed: install memdfa_lab from its repository or its wheel")


def reproduce(
    out: str | Path | None = None,
    only: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    timeout_s: float = 900,
) -> Path:
    """Run the notebooks in order through papermill and return the run folder, reports/runs/<time> if not given.

    The folder gets each executed notebook, its figures (svg, png) and tables (csv), index.html that shows them, and
    run.json, from which a run that was cut goes on: what is done, with the source the notebook has now, is not done
    again. `only` picks notebooks by number or name, `parameters` go to those that take them; where one is not given,
    a run goes on as it was started. `overwrite` starts anew what is asked for. `timeout_s` is for one notebook.

    Raises ValueError, before anything runs, for a notebook or parameter that is not there, and for a folder with a
    finished run (unless `overwrite`), a run with other parameters, or other files; NotebooksFailed at the end.
    """
    from memdfa_lab.batch.page import write_page

    out = Path("reports/runs") / time.strftime("%Y%m%d-%H%M%S") if out is None else Path(out)
    run = _read(out)
    as_before: dict[str, Any] = {"parameters": {}, "notebooks": {}} if overwrite else run
    chosen = _choose(sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb")), only or list(as_before["notebooks"]))
    parameters = as_before["parameters"] if parameters is None else json.loads(json.dumps(parameters))
    takes = _taken(chosen, parameters)
    _refuse(out, run, set(takes), parameters, overwrite)

    waiting = {name: {"status": "waiting"} for name in takes}
    records = run["notebooks"] | waiting if overwrite else waiting | run["notebooks"]
    run |= {"parameters": parameters, "versions": versions(), "notebooks": dict(sorted(records.items()))}

    def keep(name: str, **record: Any) -> None:
        run["notebooks"][name] = record
        write_text(out / STATE, json.dumps(run, indent=1))
        write_page(out, run)

    failed = []
    with locked(out / STATE):
        for number, notebook in enumerate(chosen, 1):
            name, source, before = notebook.stem, source_of(notebook), run["notebooks"][notebook.stem]
            label = f"[{number}/{len(chosen)}] {name}"
            if before["status"] == "done" and before["source"] == source:
                print(f"{label}: done before, skipped", flush=True)
                continue
            if before.get("source") != source:
                _clear(out, name)  # else training goes on from the checkpoints there
            keep(name, status="running", source=source)
            started = time.perf_counter()
            try:
                error = execute(notebook, out, takes[name], timeout_s, label)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
                keep(name, status="interrupted", source=source)
                goes_on = f"memdfa reproduce --out {shlex.quote(str(out))}"
                raise KeyboardInterrupt(
                    f"interrupted in {name}: what was finished is kept, {goes_on} goes on"
                ) from None
            record = {"source": source, "seconds": round(time.perf_counter() - started, 1)}
            if error:
                failed.append(f"{name}, {error}")
                keep(name, status="failed", error=error, **record)
            else:
                keep(name, status="done", **record)
    if failed:
        raise NotebooksFailed(f"{len(failed)} of {len(chosen)} notebooks failed: {'; '.join(failed)}; see {out}")
    return out


def _read(out: Path) -> dict[str, Any]:
    if (out / STATE).exists():
        run: dict[str, Any] = json.loads((out / STATE).read_text(encoding="utf-8"))
        return run
    if out.exists() and not all(file.name.startswith(".") for file in out.iterdir()):
        raise ValueError(f"{out} holds other files and no run to go on with: choose another folder with --out")
    return {"parameters": {}, "notebooks": {}}


def _choose(notebooks: list[Path], only: Sequence[str]) -> list[Path]:
    chosen = set()
    for name in only:
        found = [path for path in notebooks if name in (path.name[:2], path.stem, path.name)]
        if not found:
            raise ValueError(f"no notebook {name!r}: there are {', '.join(path.stem for path in notebooks)}")
        chosen.update(found)
    return sorted(chosen) or notebooks


def _taken(notebooks: list[Path], parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each notebook, those of the parameters that it has. `out` is not for the user to give."""
    import papermill

    has = {path.stem: set(papermill.inspect_notebook(str(path))) - {"out"} for path in notebooks}
    for name in parameters:
        lookup("parameter", name, dict.fromkeys(sorted(set[str]().union(*has.values()))))
    return {path: {name: value for name, value in parameters.items() if name in names} for path, names in has.items()}


def _refuse(out: Path, run: dict[str, Any], names: set[str], parameters: dict[str, Any], overwrite: bool) -> None:
    """Raise ValueError if the run in the folder is not to be gone on with as asked."""
    records = run["notebooks"]
    if records and run["parameters"] != parameters and not (overwrite and names >= set(records)):
        raise ValueError(
            f"{out} holds a run with other parameters ({run['parameters'] or 'none given'}): choose another folder "
            "with --out, or start all its notebooks anew with --overwrite"
        )
    if not overwrite and all(records.get(name, {}).get("status") == "done" for name in names):
        raise ValueError(
            f"{out} holds a finished run: choose another folder with --out, or start anew with --overwrite"
        )


def source_of(notebook: Path) -> str:
    """Return a hash of what the notebook says, whatever it last put out."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    said = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _clear(out: Path, name: str) -> None:
    """Remove what a notebook wrote into the folder."""
    shutil.rmtree(out / name, ignore_errors=True)
    for file in (out / f"{name}.ipynb", *out.glob(f"{name}-*")):
        file.unlink(missing_ok=True)


def execute(notebook: Path, out: Path, parameters: dict[str, Any], timeout_s: float, label: str) -> str | None:
    """Run one notebook into the folder; return which cell failed and why, in one line, or None.

    In a terminal there is a bar of cells; else one line, begun at the start and ended with the time it took.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from memdfa_lab.batch.headless import ENGINE

    terminal = sys.stderr.isatty()
    if not terminal:
        print(f"{time.strftime('%H:%M:%S')} {label}: ", end="", flush=True)
    started, error, running = time.perf_counter(), "", out.resolve() / f".{notebook.name}"
    # Notebooks run where they lie, as in JupyterLab, but a relative path was meant from here.
    given = {"out": os.path.relpath(out, notebook.parent), **{k: from_here(v) for k, v in parameters.items()}}
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            parameters=given,
            cwd=notebook.parent,
            engine_name=ENGINE,
            kernel_name="python3",
            notebook_timeout=timeout_s,
            progress_bar={"desc": label} if terminal else False,
        )
    except papermill.PapermillExecutionError as problem:
        error = f"{problem.ename}: {problem.evalue}"
    except CellTimeoutError:
        error = f"the time limit of {timeout_s:g} s is reached"
    except DeadKernelError:
        error = "the kernel died, which often means that memory ran out"
    except Exception as problem:  # whatever keeps one notebook from running, the others run
        error = f"{type(problem).__name__}: {problem}"
    finally:
        begun = 0
        if running.exists():
            nb = nbformat.read(running, as_version=4)
            begun = sum(c.cell_type == "code" and c.metadata.papermill.start_time is not None for c in nb.cells)
            for path in ("input_path", "output_path"):  # not those of this machine
                nb.metadata.papermill[path] = notebook.name
            nbformat.write(nb, running)
            os.replace(running, out / notebook.name)
    if error:
        error = f"cell {begun}: {error.splitlines()[0]}"
    took = f"{time.perf_counter() - started:.0f} s"
    if error or not terminal:
        print(f"{label}: " * terminal + (f"failed after {took}, {error}" if error else f"done in {took}"), flush=True)
    return error or None


def from_here(value: Any) -> Any:
    is_path = isinstance(value, str) and bool(value) and not value.isidentifier() and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value
