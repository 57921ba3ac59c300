"""Sweep files: what is run, with which parameters. All that could not be run is refused here, before anything is."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdfa_lab import __version__
from memdfa_lab.batch.report import check_parameters
from memdfa_lab.batch.reproduce import notebooks_folder, source_of
from memdfa_lab.core.checks import lookup
from memdfa_lab.core.feedback import DISTRIBUTIONS, KINDS
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import experiments, models
from memdfa_lab.lab.losses import LOSSES
from memdfa_lab.lab.models import INITIALISATIONS
from memdfa_lab.rivals import BASELINES

COUNT, NUMBER = (None, range(1, 10**9)), (None, (0, 10**9))
# setting of `memdfa train` -> what it must be; one that is not given is what it is for `memdfa train`
TRAIN: dict[str, Any] = {
    "rule": {*RULES, *BASELINES},
    "network": str,
    "dataset": str,
    "root": (None, str),
    "epochs": COUNT,
    "batch_size": COUNT,
    "lr": NUMBER,
    "optimizer": (None, set(experiments.OPTIMIZERS)),
    "weight_decay": NUMBER,
    "loss": (None, set(LOSSES)),
    "feedback": set(KINDS),
    "distribution": (None, set(DISTRIBUTIONS)),
    "initialisation": (None, set(INITIALISATIONS)),
    "scale": (1e-9, 10**9),
    "clip_norm": NUMBER,
    "seed": range(2**32),
    "device": str,
}
# what papermill says of a notebook's annotated parameter -> what it must be
TYPES = {"str": str, "int": int, "float": (-float("inf"), float("inf")), "bool": bool, "list": list, "dict": dict}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says: `run` is train or a notebook's path, `runs` the parameters by the run's name.

    `code` is what the results depend on besides: with another version or another text of the notebook, all runs anew.
    `table`: the table of the notebook that is its result. `timeout_s` is for one notebook.
    """

    run: str
    runs: dict[str, dict[str, Any]]
    code: str
    retries: int
    threads: int
    timeout_s: float
    table: str | None

    @property
    def varied(self) -> list[str]:
        """The names of the parameters that are not the same in all runs."""
        names = dict.fromkeys(name for parameters in self.runs.values() for name in parameters)
        return [name for name in names if len({json.dumps(one.get(name)) for one in self.runs.values()}) > 1]

    def label(self, name: str) -> str:
        """Return those parameters of a run that tell it from the others."""
        return ", ".join(f"{key}={self.runs[name][key]}" for key in self.varied if key in self.runs[name])


def read(file: str | Path) -> Sweep:
    """Read a sweep file. Raises ValueError, one line, for whatever in it could not be run."""
    try:
        return _read(Path(file))
    except (ValueError, OSError) as problem:
        raise ValueError(f"{file}: {' '.join(str(problem).split())}") from problem


def _read(file: Path) -> Sweep:
    said: dict[str, Any] = {
        "run": None,
        "parameters": {},
        "grid": None,
        "list": None,
        "retries": 1,
        "threads": 1,
        "timeout_s": 3600,
    }
    said |= {"table": None, **_yaml(file)}
    forms: dict[str, Any] = {"grid": (None, dict), "list": (None, [dict]), "table": (None, str), "timeout_s": (1, 1e7)}
    forms |= {"run": str, "parameters": dict, "retries": range(101), "threads": range(1, 1025)}
    _check(said, forms)
    notebook = None if said["run"] == "train" else _notebook(file.parent, said["run"])
    expected = _expected(notebook, said["table"])
    runs: dict[str, dict[str, Any]] = {}
    for one in (said["parameters"] | varied for varied in _combinations(said["grid"], said["list"])):
        given = {name: what if name in one else object for name, what in expected.items()}
        _check(dict.fromkeys(expected) | one, given)
        if isinstance(one.get("network"), str):
            models.get(one["network"])
        try:
            text = json.dumps([notebook.stem if notebook else "train", one], sort_keys=True)
        except TypeError as problem:
            raise ValueError(f"a parameter is a number, a text, true, false or a list of them: {problem}") from None
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        if runs.setdefault(name, one) is not one:
            raise ValueError(f"two runs have the same parameters: {one}")
    code = f"memdfa_lab {__version__}" + (f", notebook {source_of(notebook)[:12]}" if notebook else "")
    rest = {name: said[name] for name in ("retries", "threads", "timeout_s", "table")}
    return Sweep(str(notebook or "train"), runs, code, **rest)


def _check(given: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in given:  # a notebook's own names may be anything; here each is a parameter
        lookup("parameter", name, expected)
    check_parameters(dict(given), **expected)


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader, but 1e-3 is a number: YAML 1.1 has it as a text, for want of a point."""

    number = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        said = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506, it is a SafeLoader
    except yaml.YAMLError as problem:
        raise ValueError(f"not YAML, {problem}") from problem
    if not isinstance(said, dict):
        raise ValueError("not a sweep file: that has the keys run and grid or list")
    return said


def _combinations(grid: dict[str, Any] | None, listed: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if (grid is None) == (listed is None):
        raise ValueError("give either grid (each combination is a run) or list (each entry is a run)")
    if grid is None:
        return listed or []
    if not grid:
        raise ValueError("the grid is empty: it takes lines such as seed: [0, 1, 2]")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"in grid, {name} must be a list of one value or more, got {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _notebook(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    numbered = {path.stem: path for path in sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))}
    return lookup("run", name, {"train": path, **numbered, "the path of a notebook": path})


def _expected(notebook: Path | None, table: str | None) -> dict[str, Any]:
    """Return what each parameter must be, as `check_parameters` takes it."""
    if notebook is None:
        if table is not None:
            raise ValueError("table goes with a notebook: the result of train is its history")
        return TRAIN
    import papermill

    has = papermill.inspect_notebook(str(notebook))
    if "out" not in has:
        raise ValueError(f"{notebook.name} has no parameter out, the folder into which a notebook writes its tables")
    if not table or table not in notebook.read_text(encoding="utf-8"):
        raise ValueError(f"table must name a table that {notebook.name} writes, such as histories, got {table!r}")
    return {name: TYPES.get(one["inferred_type_name"], object) for name, one in has.items() if name != "out"}
