"""memdfa reproduce: run the notebooks, or the paper's comparison."""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab.cli.command import add_command


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "reproduce",
        _reproduce,
        "run the numbered notebooks; executed notebooks, figures, tables and index.html are written to a run folder",
        "  memdfa reproduce\n"
        "  memdfa reproduce --only 02,04 -p dataset mnist -p epochs 20 --out reports/runs/mnist\n"
        "  memdfa reproduce --out reports/runs/mnist    # resumes that run\n"
        "  memdfa reproduce --paper --budget 2h         # the paper's comparison, within two hours\n"
        "  memdfa reproduce --paper --only mnist_2x800,mnist_7x240 --out reports/runs/paper\n",
    )
    add = command.add_argument
    only = "notebooks such as 02,04 (with --paper: experiments); default: those of the run in --out, else all"
    add("--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help=only)
    add("--paper", action="store_true", help="run the paper's comparison in place of the notebooks")
    add(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="with --paper: time limit, such as 2h, 1h30m or 90m; default: none",
    )
    parameter = "set a parameter of the notebooks, to a value in YAML such as 3, true or [bp, dfa]; can be repeated"
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=parameter)
    out = "run folder; a run in it is resumed; default: reports/runs/<time>, with --paper reports/paper"
    add("--out", type=Path, help=out)
    add("--overwrite", action="store_true", help="run again notebooks that the folder already has results of")
    add("--jobs", type=int, metavar="N", help="notebooks at a time, each with one thread; default: number of cores")
    add("--timeout", type=float, default=900, metavar="S", help="seconds that one notebook may take; default: 900")


def _seconds(text: str) -> float:
    """Read a time such as 2h, 90m, 1h30m or 45s."""
    try:
        seconds = float(pd.Timedelta(text).total_seconds()) if text[-1:].isalpha() else math.nan
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # also for "" and a number without a unit
        raise argparse.ArgumentTypeError(f"a time is given as 2h, 90m or 1h30m, got {text!r}")
    return seconds


def _reproduce(options: argparse.Namespace) -> None:
    from memdfa_lab.batch.reproduce import reproduce
    from memdfa_lab.batch.sweep_file import from_yaml

    if options.paper:
        return _reproduce_paper(options)
    if options.budget is not None:
        raise ValueError("--budget goes with --paper: for notebooks, use --timeout")
    try:
        parameters = {name: from_yaml(value) for name, value in options.p} or None
    except ValueError as problem:
        raise ValueError(f"-p takes a value in YAML, such as 3, true, mnist or [bp, dfa]: {problem}") from None
    out = reproduce(
        options.out,
        options.only,
        parameters,
        overwrite=options.overwrite,
        timeout_s=options.timeout,
        jobs=options.jobs,
    )
    print(f"{out / 'index.html'} shows the figures and tables; the executed notebooks are in the same folder")


def _reproduce_paper(options: argparse.Namespace) -> None:
    from memdfa_lab.batch import paper

    if options.p or options.overwrite:
        raise ValueError("-p and --overwrite do not go with --paper: to start anew, give another folder with --out")
    out = options.out or Path("reports/paper")
    paper.runs.run(out, options.only, options.budget, say=partial(print, flush=True))
    if not (out / "depth.csv").exists():
        print("predicting the memory tables takes some minutes", flush=True)
        paper.memory.measure(out)
    print(f"tables are in {out}/; notebook 07_paper_figures draws them with the parameter runs={str(out)!r}")
