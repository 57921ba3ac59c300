"""Sweep files: what is run, and with which parameters. Errors in a file are reported here, before anything runs."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from memdfa_lab.batch.notebooks import numbered, parameters_of, resolved, source_of
from memdfa_lab.batch.report import parameters_model
from memdfa_lab.core.checks import lookup
from memdfa_lab.lab import models
from memdfa_lab.lab.settings import Checked, RunSettings

# type of a notebook's parameter, as papermill writes it -> type that its values must have
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
Values = Annotated[list[Any], Field(min_length=1)]
Grid = Annotated[dict[str, Values], Field(min_length=1)]
Entries = Annotated[list[dict[str, Any]], Field(min_length=1)]


class SweepFile(Checked):
    """Key: the keys of a sweep file."""

    run: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    grid: Grid | None = None
    list: Entries | None = None
    retries: int = Field(1, ge=0, le=100)
    threads: int = Field(1, ge=1, le=1024)
    timeout_s: float = Field(3600, ge=1)
    table: str | None = None

    def combinations(self) -> Entries:
        """Return the parameters of each run. Raises ValueError unless there is either a grid or a list."""
        if (self.grid is None) == (self.list is None):
            raise ValueError("give either grid (each combination is a run) or list (each entry is a run)")
        grid = self.grid or {}
        products = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
        return [self.parameters | varied for varied in self.list or products]


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file, checked, with all its runs."""

    run: str  # train, or the path of a notebook
    runs: dict[str, dict[str, Any]]  # hash of all settings -> the parameters as they are written
    code: str  # version of the package, hash of the notebook: if one of them changes, all runs are repeated
    result: str  # name of the file with a run's result, in its folder
    folder: str  # relative paths among the parameters start here
    comments: dict[str, str]  # parameter -> its comment, which says whether it is a path
    retries: int  # how often a failed run is repeated
    threads: int  # for each run
    timeout_s: float  # seconds that a notebook may take

    @property
    def varied(self) -> list[str]:
        """The names of the parameters that differ between runs."""
        names = dict.fromkeys(name for parameters in self.runs.values() for name in parameters)
        return [name for name in names if len({json.dumps(one.get(name)) for one in self.runs.values()}) > 1]

    def label(self, name: str) -> str:
        """Return, as text, those parameters of a run that differ between runs."""
        return ", ".join(f"{key}={self.runs[name][key]}" for key in self.varied if key in self.runs[name])

    def given(self, name: str) -> dict[str, Any]:
        """Return the parameters of a run with absolute paths, which hold in any working directory."""
        return resolved(self.runs[name], self.comments, self.folder)


def from_yaml(text: str) -> Any:
    """Return the value of a YAML 1.2 document. Raises ValueError, one line, if it is not valid or has a key twice."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as problem:
        mark, what = getattr(problem, "problem_mark", None), getattr(problem, "problem", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"not YAML: {what or problem}{where}") from None


def read(file: str | Path) -> Sweep:
    """Read a sweep file. Raises ValueError, one line, for anything in it that cannot be run."""
    try:
        content = from_yaml(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a sweep file: it needs the key run, and grid or list")
        return _sweep(SweepFile(**content), Path(file).parent)
    except (ValueError, TypeError, OSError) as problem:
        raise ValueError(f"{file}: {' '.join(str(problem).split())}") from problem


def _sweep(file: SweepFile, beside: Path) -> Sweep:
    code = f"memdfa_lab {metadata.version('memdfa_lab')}"
    if file.run == "train":
        if file.table is not None:
            raise ValueError("table goes with a notebook only: the result of train is its history")
        checked: type[Checked] = RunSettings
        run, result, comments = "train", "history.csv", {"root": "folder"}
    else:
        notebook = _notebook(beside, file.run)
        has = _parameters(notebook, file.table)
        types = {name: TYPES.get(about["inferred_type_name"], object) for name, about in has.items()}
        checked, run, result = parameters_model(types), str(notebook), f"{notebook.stem}-{file.table}.csv"
        code += f", notebook {source_of(notebook)[:12]}"
        comments = {name: about["help"] for name, about in has.items()}
    runs: dict[str, dict[str, Any]] = {}
    for one in file.combinations():
        settings = checked(**one)
        if isinstance(one.get("network"), str):  # an unknown name is reported before anything runs
            models.get(one["network"])
        if isinstance(settings, RunSettings):
            settings = settings.completed()
        name = _hash([Path(run).stem, settings.model_dump(exclude_unset=file.run != "train")])
        if runs.setdefault(name, one) is not one:
            raise ValueError(f"two runs have the same settings: {one}")
    where = str(Path.cwd())
    return Sweep(run, runs, code, result, where, comments, file.retries, file.threads, file.timeout_s)


def _hash(value: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    except TypeError as problem:
        raise ValueError(f"a parameter must be a number, a text, true, false or a list of these: {problem}") from None


def _notebook(beside: Path, name: str) -> Path:
    path = beside / name
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    return lookup("run", name, {"train": path, **numbered(), "the path of a notebook": path})


def _parameters(notebook: Path, table: str | None) -> dict[str, dict[str, str]]:
    """Return the parameters of a notebook except `out`. Raises ValueError if it lacks `out` or the table."""
    has = parameters_of(notebook)
    if has.pop("out", None) is None:
        raise ValueError(f"{notebook.name} has no parameter out, the folder into which a notebook writes its tables")
    if not table or table not in notebook.read_text(encoding="utf-8"):
        raise ValueError(f"table must name a table that {notebook.name} writes, such as histories, got {table!r}")
    return has
