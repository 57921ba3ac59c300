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
        "run the numbered notebooks in order; executed notebooks, figures, tables and index.html go into a run folder",
        "  memdfa reproduce\n"
        "  memdfa reproduce --only 02,04 -p dataset mnist -p epochs 20 --out reports/runs/mnist\n"
        "  memdfa reproduce --out reports/runs/mnist    # goes on with that run, if it was cut or something failed\n"
        "  memdfa reproduce --paper --budget 2h         # the paper's comparison, as far as it goes in two hours\n"
        "  memdfa reproduce --paper --only mnist_2x800,mnist_7x240 --out reports/runs/paper\n",
    )
    add = command.add_argument
    add("--only", type=lambda text: text.split(","), default=[], metavar="02,04", help="these notebooks; default: all")
    add("--paper", action="store_true", help="instead: run the comparison; --only then names experiments of it")
    add("--budget", type=_seconds, metavar="2h", help="with --paper: its time, such as 90m or 1h30m")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter, its value as in YAML")
    out = "run folder, of a run to go on with or a new one; default: reports/runs/<time>, with --paper reports/paper"
    add("--out", type=Path, help=out)
    add("--overwrite", action="store_true", help="start anew what the folder already has")
    add("--jobs", type=int, metavar="N", help="notebooks at a time, with one thread each; default: as many as cores")
    add("--timeout", type=float, default=900, metavar="S", help="seconds that one notebook may take; default: 900")


def _seconds(text: str) -> float:
    """Read a time such as 2h, 90m, 1h30m or 45s."""
    try:
        seconds = float(pd.Timedelta(text).total_seconds()) if text[-1:].isalpha() else math.nan
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # "" and a number without a unit are no times, either
        raise argparse.ArgumentTypeError(f"a time is given as 2h, 90m or 1h30m, got {text!r}")
    return seconds


def _reproduce(options: argparse.Namespace) -> None:
    from memdfa_lab.batch.reproduce import reproduce
    from memdfa_lab.batch.sweep_file import from_yaml

    if options.paper:
        return _reproduce_paper(options)
    if options.budget is not None:
        raise ValueError("--budget goes with --paper: notebooks have --timeout")
    try:
        parameters = {name: from_yaml(value) for name, value in options.p} or None
    except ValueError as problem:
        raise ValueError(f"-p takes a value as in YAML, such as 3, true, mnist or [bp, dfa]: {problem}") from None
    out = reproduce(
        options.out,
        options.only,
        parameters,
        overwrite=options.overwrite,
        timeout_s=options.timeout,
        jobs=options.jobs,
    )
    print(f"figures and numbers are in {out / 'index.html'}, executed notebooks beside it")


def _reproduce_paper(options: argparse.Namespace) -> None:
    from memdfa_lab.batch import paper

    if options.p or options.overwrite:
        raise ValueError("-p and --overwrite do not go with --paper: another --out starts anew, in an empty folder")
    out = options.out or Path("reports/paper")
    paper.runs.run(out, options.only, options.budget, say=partial(print, flush=True))
    if not (out / "depth.csv").exists():
        print("memory tables, predicted: some minutes", flush=True)
        paper.memory.measure(out)
    print(f"tables are in {out}/: notebook 07_paper_figures draws them, with runs={str(out)!r}")
