"""A notebook's helpers: check its parameters, save its figures and tables, print versions."""

import functools
import operator
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import torch
from pydantic import Field, create_model

from memdfa_lab.core.devices import accelerator, module_of
from memdfa_lab.lab.files import write_text
from memdfa_lab.lab.settings import Checked, NameOf

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report:
    """Show a notebook's figures and tables, and write them into a folder: figures as svg and png, tables as csv.

    Without a folder (`out` is None), they are only shown. Files are named NOTEBOOK-NAME, so that several notebooks can
    share a folder.
    """

    def __init__(self, out: str | Path | None, notebook: str):
        self.notebook = notebook
        self.out = None if out is None else Path(out)
        self.started = time.perf_counter()

    @property
    def folder(self) -> Path | None:
        """The folder of this notebook's training runs, in which a second start continues; None without `out`."""
        return None if self.out is None else self.out / self.notebook

    def figure(self, figure: "Figure", name: str, alt: str) -> Any:
        """Write the figure, and return it as a picture with `alt` as its text for readers who cannot see it."""
        from memdfa_lab import figures

        if self.out is not None:
            figures.save(figure, self.out / f"{self.notebook}-{name}")
        return figures.picture(figure, alt)

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write the table as csv, and return it with the usual names of the rules (MEM-DFA for memdfa)."""
        from memdfa_lab.figures import label

        if self.out is not None:
            write_text(self.out / f"{self.notebook}-{name}.csv", table.to_csv(index=False))
        return table.rename(columns=label).map(lambda value: label(value) if isinstance(value, str) else value)

    def finish(self, seeds: Sequence[int] = ()) -> None:
        """Print what the results depend on (versions, device, threads, seeds), and how long the notebook took."""
        print(versions())
        kind = accelerator()
        device = getattr(module_of(kind), "get_device_name", kind.upper)() if kind else "no GPU"
        print(f"{platform.machine()}, {torch.get_num_threads()} threads, {device}; seeds {list(seeds)}")
        print(f"{time.perf_counter() - self.started:.0f} s")


def versions() -> str:
    """Return the versions that results depend on, in one line."""
    libraries = ("memdfa_lab", "torch", "numpy", "pandas", "matplotlib")
    return ", ".join(
        [*(f"{name} {metadata.version(name)}" for name in libraries), f"Python {platform.python_version()}"]
    )


def check_parameters(namespace: dict[str, Any], **expected: Any) -> None:
    """Check the parameters of a notebook; call it in the first cell after them, with `globals()`.

    `namespace`: the notebook's names. `expected`: for each parameter a set of allowed names, a range of whole numbers,
    a type, a (low, high) tuple for a number, a list of one of these for a non-empty list, or a tuple of alternatives
    one of which is None.

    Raises ValueError, one line, for the first parameter that does not fit. The first call in a kernel also refuses any
    other name; later calls do not, since later cells may have made names.
    """
    shell = {"In", "Out", "exit", "quit", "get_ipython", "open"}
    given = {name: namespace[name] for name in expected}
    for name, value in namespace.items() if "_parameters_checked" not in namespace else ():
        is_parameter = isinstance(value, (str, int, float, bool, list, dict, type(None))) and name not in shell
        if is_parameter and not name.startswith("_"):
            given[name] = value
    parameters_model(expected)(**given)
    namespace["_parameters_checked"] = True


def parameters_model(expected: dict[str, Any]) -> type[Checked]:
    """Return the model that checks parameters; `expected` is as in `check_parameters`."""
    fields: Any = {name: (_annotation(name, what), None) for name, what in expected.items()}
    return create_model("Parameters", __base__=Checked, __doc__="Parameter: the parameters of a notebook.", **fields)


def _annotation(name: str, what: Any) -> Any:
    match what:
        case list():
            return Annotated[list[_annotation(name, what[0])], Field(min_length=1)]  # type: ignore[misc]
        case tuple() if None in what:
            return functools.reduce(operator.or_, (_annotation(name, choice) for choice in what))
        case tuple():
            return Annotated[float, Field(ge=what[0], le=what[1], allow_inf_nan=False)]
        case range():
            return Annotated[int, Field(ge=what.start, le=what.stop - 1)]
        case set() | frozenset():
            return Annotated[str, NameOf(name, dict.fromkeys(sorted(what)))]
        case _:
            return Any if what is object else what
