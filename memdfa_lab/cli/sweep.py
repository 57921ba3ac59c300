"""memdfa sweep: many runs."""

import argparse
from pathlib import Path
from typing import Any

from memdfa_lab.cli.command import add_command


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "sweep",
        _sweep,
        "run a notebook or train once for each combination of parameters; finished runs are not run again",
        "  memdfa sweep sweep.yaml --jobs 4\n"
        "  memdfa sweep sweep.yaml --scheduler tcp://127.0.0.1:8786    # on the workers of a Dask cluster\n"
        "  memdfa sweep status sweep.yaml\n"
        "sweep.yaml, here 12 runs; run may be a notebook, too, then with table: NAME, the table that is its result:\n"
        "  run: train\n"
        "  parameters: {network: '784-[100]x3-10', epochs: 5}\n"
        "  grid: {rule: [bp, memdfa], lr: [0.003, 0.01, 0.03], seed: [0, 1]}\n",
    )
    add = command.add_argument
    add("status", nargs="?", choices=["status"], help="only say how far it is")
    add("file", help="a sweep file; after status, it may be the folder of all runs")
    add("--out", type=Path, help="folder of all runs; default: reports/runs/NAME for NAME.yaml")
    add("--jobs", type=int, help="runs at a time on this machine; default: as many as it has cores for")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster that shares the folder, such as tcp://HOST:8786")


def _sweep(options: argparse.Namespace) -> None:
    from memdfa_lab.batch import sweep

    if options.status:
        table = sweep.status(options.file, options.out)
        counts = table["status"].value_counts()
        print(f"{len(table)} runs:", ", ".join(f"{number} {name}" for name, number in counts.items()))
        for row in table[table["status"] == "failed"].to_dict("records"):
            print(f"  {row['run']}: {row['error']}")
        return
    out = sweep.run(options.file, options.out, options.scheduler, options.jobs)
    print(f"the table of all runs is {out / 'results.csv'}, a figure beside it; each run is in {out / 'runs'}")
