"""memdfa train: train a network with one rule or several."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab.cli.command import (
    INTERRUPTED,
    add_command,
    add_model,
    add_rules,
    add_settings,
    chosen_rules,
    named_network,
)
from memdfa_lab.lab import distributed, experiments, models
from memdfa_lab.lab.datasets import Data
from memdfa_lab.lab.files import file_name
from memdfa_lab.lab.offload import Disk, Host
from memdfa_lab.lab.settings import RunSettings
from memdfa_lab.memory.trace import readable

NAMES = [name for name in RunSettings.model_fields if name != "rule"]


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        _train,
        "train a network with one or more rules, each from the same seed",
        "  memdfa train --rule memdfa --network fc_relu --dataset mnist --epochs 3\n"
        "  memdfa train --rule all --network mnist_conv --epochs 5 --lr 0.05 --feedback regenerated\n"
        "  memdfa train --model torchvision.models:alexnet --input 3x64x64 --epochs 1\n"
        "  torchrun --nproc-per-node 2 -m memdfa_lab train --rule memdfa    # two processes share each batch\n",
    )
    add_rules(command, "--rule", ["memdfa"], "bp, fa, dfa and memdfa")
    add_settings(command, *NAMES)
    add_model(command)
    add = command.add_argument
    out = "folder of the run, which is resumed if it has begun; default: reports/runs/NETWORK-DATASET-seedSEED"
    add("--out", type=Path, help=out)
    add("--overwrite", action="store_true", help="start anew, even if the folder has a run")
    rests = "keep weights and optimizer state in this folder, one block at a time in memory; a run in it is resumed"
    add("--offload", type=Path, metavar="FOLDER", help=f"for --rule memdfa: {rests}")
    every = "with --offload: steps between two commits; a crashed run resumes from the last one"
    one = "0: only one copy of the network is on disk, and a crash can destroy it"
    add("--commit-every", type=int, default=100, metavar="STEPS", help=f"{every}; {one}; default: 100")
    add("--sync-batchnorm", action="store_true", help="under torchrun: BatchNorm's statistics are over all ranks")
    seconds = "under torchrun: seconds that a rank waits for another before it fails; default: 60"
    add("--dist-timeout", type=float, default=distributed.TIMEOUT_S, metavar="S", help=seconds)


def _train(options: argparse.Namespace) -> None:
    with distributed.ranks(options.device, options.dist_timeout) as group:
        try:
            _train_in(group, options)
        except KeyboardInterrupt:
            if group.rank == 0:  # the first rank reports for all
                raise
            sys.exit(INTERRUPTED)


def _train_in(group: distributed.Group, options: argparse.Namespace) -> None:
    options.network = named_network(options)
    settings = {name: getattr(options, name) for name in NAMES} | {"device": group.device}
    runs = [RunSettings(rule=rule, **settings) for rule in chosen_rules(options.rule)]  # refused here, before any work
    alone = [run.rule for run in runs] == ["memdfa"] and group.size == 1 and group.device == "cpu"
    if options.offload is not None and (not alone or options.overwrite):
        raise ValueError("--offload is for --rule memdfa in one process on the CPU; to start anew, delete the folder")
    with group.first_rank_first():  # the first rank downloads, the others find the files
        data = experiments.load_for(options.network, options.dataset, options.root)
    name = f"{options.network}-{data.name}-seed{options.seed}"  # layers as text have characters of all kinds
    out = options.out or Path("reports/runs") / file_name(name)
    how = {"overwrite": options.overwrite, "group": group, "sync_batchnorm": options.sync_batchnorm}
    rows = []
    for run in runs:
        with nullcontext() if options.offload is None else _store(options, run, data) as store:
            more = how if store is None else how | {"offload": store}
            _, history = experiments.train(data=data, folder=out / run.rule, **dict(run), **more)
        rows.append({"rule": run.rule, **history.table.iloc[-1], "seconds": history.table["seconds"].sum()})
    if group.rank == 0:
        print(pd.DataFrame(rows).astype({"epoch": int}).to_string(index=False, float_format="{:.4f}".format))
        print(f"histories and checkpoints are in {out}/")


def _store(options: argparse.Namespace, run: RunSettings, data: Data) -> Disk:
    run = run.completed()
    how = str(run.optimizer), experiments.feedback_of(run)
    shape = "" if models.get(run.network).input_shape else "@" + "x".join(map(str, data.input_shape))
    trace = experiments.profile("memdfa", run.network + shape, 2, *how, offload=Host("cpu", ahead=0))
    takes = trace.offloaded_bytes * (2 if options.commit_every else 1)
    store = Disk(options.offload, commit_every=options.commit_every or None)
    where = f"resumes from step {store.steps}" if store.steps else "begins"
    disk = f"about {readable(takes)} of {readable(store.free_bytes)} free"
    print(f"{options.network} is kept in {options.offload}/, and training {where}; it takes {disk}")
    return store
