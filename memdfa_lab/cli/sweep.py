"""memdfa sweep: one run for each combination of parameters."""

import argparse
from pathlib import Path
from typing import Any

from memdfa_lab.cli.command import add_command


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "sweep",
        _sweep,
        "run a notebook or `memdfa train` for each combination of parameters; finished runs are not repeated",
        "  memdfa sweep sweep.yaml --jobs 4\n"
        "  memdfa sweep sweep.yaml --scheduler tcp://127.0.0.1:8786    # on the workers of a Dask cluster\n"
        "  memdfa sweep status sweep.yaml\n"
        "A sweep.yaml of 12 runs. For a notebook, give its path as run, and the name of its result as table:\n"
        "  run: train\n"
        "  parameters: {network: '784-[100]x3-10', epochs: 5}\n"
        "  grid: {rule: [bp, memdfa], lr: [0.003, 0.01, 0.03], seed: [0, 1]}\n",
    )
    add = command.add_argument
    add("status", nargs="?", choices=["status"], help="run nothing, and count finished, failed and waiting runs")
    add("file", help="a sweep file, as below; after status also the folder of all runs")
    add("--out", type=Path, help="folder of all runs; default: reports/runs/NAME for NAME.yaml")
    jobs = "runs at a time on this machine; default: number of cores, divided by the threads of a run"
    add("--jobs", type=int, metavar="N", help=jobs)
    cluster = "run on the Dask cluster at ADDRESS, such as tcp://HOST:8786, whose workers share the folder"
    add("--scheduler", metavar="ADDRESS", help=f"{cluster}; default: run on this machine")


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
    print(f"the results of all runs are in {out / 'results.csv'}, and each run is in {out / 'runs'}")
