"""Runs with a name and a folder: one training run from plain settings, and the notebooks through papermill."""

import os
import platform
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memdfa_lab import datasets, feedback, memory, models
from memdfa_lab.baselines import BASELINES
from memdfa_lab.files import write_text
from memdfa_lab.fit import History, fit
from memdfa_lab.losses import LOSSES
from memdfa_lab.names import known
from memdfa_lab.rules import RULES, Rule

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    from memdfa_lab.datasets import Data
    from memdfa_lab.memory import Trace

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def load_for(network: str, dataset: str, root: str | Path | None = None) -> "Data":
    """Return a dataset as the network takes it: digits in the network's own shape, all else as it is."""
    shape = models.get(network).input_shape if dataset in ("mnist5k", "mnist") else None
    return datasets.load(dataset, root=root, shape=shape)


def make_rule(
    rule: str,
    network: str,
    data: "Data",
    *,
    lr: float | None = None,
    optimizer: str = "sgd",
    loss: str | None = None,
    feedback_kind: str = "stored",
    distribution: str = "he_normal",
    scale: float = 1.0,
    seed: int = 0,
    clip_norm: float | None = None,
    device: str = "cpu",
) -> Rule:
    """Return a rule with a new network for `data`, from names and numbers; what is None is the network's own setting.

    `seed` gives weights and feedback. Raises ValueError for an unknown name or a device that is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not there: use cpu, or install a torch that finds your GPU")
    setting = models.get(network)
    return known("rule", rule, {**RULES, **BASELINES})(
        models.build(network, data.input_shape, data.classes, seed=seed).to(device),
        optimizer=partial(
            known("optimizer", optimizer, OPTIMIZERS), lr=setting.lr.get(rule, setting.lr["bp"]) if lr is None else lr
        ),
        loss_fn=known("loss", loss or setting.loss, LOSSES),
        feedback=known("feedback", feedback_kind, feedback.KINDS)(seed, distribution, scale),
        clip_norm=clip_norm,
    )


def train(
    rule: str,
    network: str,
    data: "Data",
    epochs: int,
    batch_size: int | None = None,
    *,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    seed: int = 0,
    **settings: Any,
) -> tuple[Rule, History]:
    """Train one network with one rule and return both; `settings` go to `make_rule`.

    With a `folder`, history.csv and checkpoint.pt are written there, and a run that was cut goes on.
    """
    made = make_rule(rule, network, data, seed=seed, **settings)
    history = fit(
        made,
        data,
        epochs,
        models.get(network).batch_size if batch_size is None else batch_size,
        seed=seed,
        checkpoint=None if folder is None else Path(folder) / "checkpoint.pt",
        overwrite=overwrite,
        progress=progress,
    )
    if folder is not None:
        history.to_csv(Path(folder) / "history.csv")
    return made, history


def compare(
    network: str,
    data: "Data",
    rules: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    batch_size: int | None = None,
    *,
    folder: str | Path | None = None,
    **settings: Any,
) -> tuple["pd.DataFrame", dict[tuple[str, int], Rule]]:
    """Train a network with each rule from each seed; `settings` go to `train`.

    Returns the histories in one table with the columns rule and seed in front, and the trained rules by (rule, seed).
    With a `folder`, each run has a folder of its own in it, RULE/seedSEED.
    """
    import pandas as pd

    tables, trained = [], {}
    for rule in rules:
        for seed in seeds:
            place = None if folder is None else Path(folder) / rule / f"seed{seed}"
            made, history = train(rule, network, data, epochs, batch_size, folder=place, seed=seed, **settings)
            trained[rule, seed] = made
            tables.append(history.table.assign(rule=rule, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table[["rule", "seed", *(name for name in table if name not in ("rule", "seed"))]], trained


def summary(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a row a rule from the table of `compare`: mean and spread over seeds of the last epoch, time of all."""
    runs = table.groupby(["rule", "seed"], sort=False)
    last = runs.last().assign(seconds=runs["seconds"].sum())
    rules = last.groupby("rule", sort=False)
    return rules.agg(
        seeds=("loss", "size"),
        train_loss=("loss", "mean"),
        test_accuracy=("test_accuracy", "mean"),
        test_accuracy_std=("test_accuracy", "std"),
        train_accuracy=("train_accuracy", "mean"),
        seconds=("seconds", "mean"),
    ).reset_index()


def profile(
    rule: str,
    network: str,
    batch_size: int,
    optimizer: str = "sgd",
    feedback_kind: str = "regenerated",
    measured: bool = False,
    seed: int = 0,
) -> "Trace":
    """Return what a step in the steady state holds, from names; predicted, or `measured` on random data.

    Raises ValueError for unknown names and a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be 1 or more, got {batch_size}")
    shape = (batch_size, *models.get(network).input_shape)
    make = partial(known("optimizer", optimizer, OPTIMIZERS), lr=1e-6)
    storage = known("feedback", feedback_kind, feedback.KINDS)(seed)
    build = partial(models.build, network)
    if not measured:
        return memory.predict(rule, build, shape, make, storage)
    made = known("rule", rule, {**RULES, **BASELINES})(build(), make, feedback=storage)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(shape, generator=generator), torch.randint(10, (batch_size,), generator=generator)
    return memory.measure(made, x, y, warm_up=1)


def confusion(y: Tensor, predicted: Tensor, classes: int) -> "np.ndarray":
    """Return how often each class (rows) was taken for each (columns), shape (classes, classes)."""
    pairs = y.cpu() * classes + predicted.cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()


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
        return figures.picture(figure, alt)

    def table(self, table: "pd.DataFrame", name: str) -> "pd.DataFrame":
        """Write the table as csv, and return it."""
        if self.out is not None:
            write_text(self.out / f"{self.notebook}-{name}.csv", table.to_csv(index=False))
        return table

    def finish(self, seeds: Sequence[int] = ()) -> None:
        """Print what the numbers above depend on: versions, device, threads, seeds, time."""
        libraries = ("memdfa_lab", "torch", "numpy", "pandas", "matplotlib")
        print(
            *(f"{name} {metadata.version(name)}" for name in libraries), f"Python {platform.python_version()}", sep=", "
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        print(f"{platform.machine()}, {torch.get_num_threads()} threads, {device}; seeds {list(seeds)}")
        print(f"{time.perf_counter() - self.started:.0f} s")


def check_parameters(namespace: dict[str, Any], **expected: Any) -> None:
    """Check a notebook's parameters; call it in the first cell after them, with `globals()`.

    What is expected: a set of allowed values, a range of whole numbers, a type, a (low, high) tuple for a number, a
    list of one of these for a non-empty list, or a tuple with None in it for something that may be left out.
    Raises ValueError, one line, for the first parameter that does not fit, and for a name that is no parameter.
    """
    shell = {"In", "Out", "exit", "quit", "get_ipython", "open"}
    for name, value in namespace.items():
        is_parameter = isinstance(value, (str, int, float, bool, list, dict, type(None))) and name not in shell
        if is_parameter and not name.startswith("_"):
            known("parameter", name, expected)
    for name, what in expected.items():
        if not _fits(namespace[name], what):
            raise ValueError(f"parameter {name} must be {_describe(what)}, got {namespace[name]!r}")


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


def notebooks_folder() -> Path:
    """Return where the numbered notebooks are: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "notebooks", here / "_notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the notebooks are not installed: install memdfa_lab from its repository or its wheel")


def reproduce(
    out: str | Path | None = None,
    only: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    timeout_s: int = 3600,
) -> Path:
    """Run the notebooks in order through papermill and return the run folder.

    The folder (reports/runs/<time> if not given) gets each executed notebook, its figures (svg, png) and tables (csv).
    `only` picks notebooks by number or name; `parameters` are injected into each. Raises ValueError for a folder that
    holds a run already, and for a notebook or a parameter that is not there. When a cell fails, papermill's
    PapermillExecutionError; the notebook as far as it went is in the folder then.
    """
    import papermill

    from memdfa_lab.headless import ENGINE

    chosen = _choose(sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb")), only)
    parameters = parameters or {}
    takes = {notebook: set(papermill.inspect_notebook(str(notebook))) for notebook in chosen}
    for name in parameters:
        known("parameter", name, dict.fromkeys(sorted(set.union(*takes.values()))))
    out = Path("reports/runs") / time.strftime("%Y%m%d-%H%M%S") if out is None else Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds a run already: choose another folder with --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    for notebook in chosen:
        partial_name = out / f".{notebook.name}"
        try:
            papermill.execute_notebook(
                str(notebook),
                str(partial_name),
                parameters={
                    "out": str(out.resolve()),
                    **{name: value for name, value in parameters.items() if name in takes[notebook]},
                },
                engine_name=ENGINE,
                kernel_name="python3",
                execution_timeout=timeout_s,
                progress_bar=True,
            )
        finally:
            if partial_name.exists():
                os.replace(partial_name, out / notebook.name)
    return out


def _choose(notebooks: list[Path], only: Sequence[str]) -> list[Path]:
    chosen = []
    for name in only:
        found = [path for path in notebooks if name in (path.name[:2], path.stem, path.name)]
        if not found:
            raise ValueError(f"no notebook {name!r}: there are {', '.join(path.stem for path in notebooks)}")
        chosen += found
    return chosen or notebooks
