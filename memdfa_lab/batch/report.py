"""What a notebook needs of its own: its parameters checked, its figures and tables kept, its versions printed."""

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memdfa_lab.core.checks import lookup
from memdfa_lab.lab.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Report:
    """What a notebook shows, also written into a folder: figures as svg and png, tables as csv.

    Without a folder (`out` is None), it only shows. Files are named NOTEBOOK-NAME, so that notebooks share a folder.
    """

    def __init__(self, out: str | Path | None, notebook: str):
        self.notebook = notebook
        self.out = None if out is None else Path(out)
        self.started = time.perf_counter()

    @property
    def folder(self) -> Path | None:
        """Where this notebook's training runs are kept, for a second start to go on from; None without `out`."""
        return None if self.out is None else self.out / self.notebook

    def figure(self, figure: "Figure", name: str, alt: str) -> Any:
        """Write the figure, and return it as a picture with a text for those who cannot see it."""
        from memdfa_lab import figures

        if self.out is not None:
            figures.save(figure, self.out / f"{self.notebook}-{name}")
        picture = figures.picture(figure, alt)
        picture.metadata["name"] = f"{self.notebook}-{name}"  # by which the page of a run finds the files
        return picture

    def table(self, table: "pd.DataFrame", name: str) -> "pd.DataFrame":
        """Write the table as csv, and return it."""
        if self.out is not None:
            write_text(self.out / f"{self.notebook}-{name}.csv", table.to_csv(index=False))
        return table

    def finish(self, seeds: Sequence[int] = ()) -> None:
        """Print what the numbers above depend on: versions, device, threads, seeds, time."""
        print(versions())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        print(f"{platform.machine()}, {torch.get_num_threads()} threads, {device}; seeds {list(seeds)}")
        print(f"{time.perf_counter() - self.started:.0f} s")


def versions() -> str:
    """Return the versions that results depend on, in one line."""
    libraries = ("memdfa_lab", "torch", "numpy", "pandas", "matplotlib")
    return ", ".join(
        [*(f"{name} {metadata.version(name)}" for name in libraries), f"Python {platform.python_version()}"]
    )


def check_parameters(namespace: dict[str, Any], **expected: Any) -> None:
    """Check a notebook's parameters; call it in the first cell after them, with `globals()`.

    What is expected: a set of allowed values, a range of whole numbers, a type, a (low, high) tuple for a number, a
    list of one of these for a non-empty list, or a tuple with None in it for something that may be left out.
    Raises ValueError, one line, for the first parameter that does not fit, and for a name that is no parameter; but
    only in a fresh kernel: if the cells are run again, names that later ones made are there, too.
    """
    shell = {"In", "Out", "exit", "quit", "get_ipython", "open"}
    for name, value in namespace.items() if "_parameters_checked" not in namespace else ():
        is_parameter = isinstance(value, (str, int, float, bool, list, dict, type(None))) and name not in shell
        if is_parameter and not name.startswith("_"):
            lookup("parameter", name, expected)
    for name, what in expected.items():
        if not _fits(namespace[name], what):
            raise ValueError(f"parameter {name} must be {_describe(what)}, got {namespace[name]!r}")
    namespace["_parameters_checked"] = True


def _fits(value: Any, what: Any) -> bool:
    match what:
        case None:
            return value is None
        case list():
            return isinstance(value, (list, tuple)) and bool(value) and all(_fits(item, what[0]) for item in value)
        case tuple() if None in what:
            return any(_fits(value, choice) for choice in what)
        case tuple():
            return isinstance(value, (int, float)) and not isinstance(value, bool) and what[0] <= value <= what[1]
        case range():
            return isinstance(value, int) and not isinstance(value, bool) and value in what
        case set() | frozenset():
            return isinstance(value, str) and value in what
        case _:
            return isinstance(value, what)


def _describe(what: Any) -> str:
    match what:
        case None:
            return "None"
        case list():
            return f"a list of which each is {_describe(what[0])}"
        case tuple() if None in what:
            return " or ".join(_describe(choice) for choice in what)
        case tuple():
            return f"a number from {what[0]} to {what[1]}"
        case range():
            return f"a whole number from {what.start} to {what.stop - 1}"
        case set() | frozenset():
            return f"one of {', '.join(sorted(what))}"
        case _:
            return {"str": "text", "bool": "True or False"}.get(what.__name__, what.__name__)
