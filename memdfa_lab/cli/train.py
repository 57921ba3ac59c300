"""memdfa train: train a network with one rule or several."""

import argparse
import sys
from pathlib import Path
from typing import Any

import memdfa_lab as ml
from memdfa_lab.cli.command import INTERRUPTED, add_command
from memdfa_lab.core.feedback import DISTRIBUTIONS, KINDS
from memdfa_lab.lab.experiments import OPTIMIZERS
from memdfa_lab.lab.losses import LOSSES


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        _train,
        "train a network with one rule or several, from the same seeds",
        "  memdfa train --rule memdfa --network fc_relu --dataset mnist --epochs 3\n"
        "  memdfa train --rule all --network mnist_conv --epochs 5 --lr 0.05 --feedback regenerated\n"
        "  torchrun --nproc-per-node 2 -m memdfa_lab train --rule memdfa    # two processes, half of each batch each\n",
    )
    add = command.add_argument
    add("--rule", nargs="+", default=["memdfa"], choices=[*ml.RULES, "all"], help="default: memdfa")
    add("--network", default="fc_relu", metavar="NAME", help=f"one of {', '.join(ml.models.names())}")
    add(
        "--dataset", default="mnist5k", help="mnist5k (default, no network needed), mnist, cifar10 or a path to an .npz"
    )
    add("--root", help="where data sets are kept (default: $MEMDFA_DATA, else the user's cache)")
    add("--epochs", type=int, help="default: the network's setting")
    add("--batch-size", type=int, help="default: the network's setting")
    add("--lr", type=float, help="learning rate; default: the network's setting, which is for its own optimizer")
    add("--optimizer", choices=OPTIMIZERS, help="default: the network's setting (momentum: sgd with momentum 0.9)")
    add("--weight-decay", type=float, help="default: the network's setting")
    add("--loss", choices=LOSSES, help="default: the network's setting")
    add("--feedback", choices=KINDS, default="stored", help="what is kept of the random matrices; default: stored")
    add("--distribution", choices=DISTRIBUTIONS, help="of the random matrices; default: the network's setting")
    add("--initialisation", choices=ml.models.INITIALISATIONS, help="of the weights; default: the network's setting")
    add("--scale", type=float, default=1.0, help="multiplies the random matrices; default: 1")
    add("--clip-norm", type=float, help="largest norm of one block's gradient; default: no clipping")
    add("--seed", type=int, default=0, help="of weights, feedback and the order of the data; default: 0")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--out", type=Path, help="run folder; default: reports/runs/NETWORK-DATASET-seedSEED")
    add("--overwrite", action="store_true", help="start anew instead of going on with the run in the folder")
    add("--sync-batchnorm", action="store_true", help="under torchrun: BatchNorm's statistics over all ranks")
    seconds = "under torchrun: how long a rank waits for another before it gives up; default: 60"
    add("--dist-timeout", type=float, default=ml.distributed.TIMEOUT_S, metavar="S", help=seconds)


def _train(options: argparse.Namespace) -> None:
    with ml.distributed.ranks(options.device, options.dist_timeout) as group:
        try:
            _train_in(group, options)
        except KeyboardInterrupt:
            if group.rank == 0:  # it speaks for all
                raise
            sys.exit(INTERRUPTED)


def _train_in(group: ml.distributed.Group, options: argparse.Namespace) -> None:
    import pandas as pd

    rules = list(ml.RULES) if "all" in options.rule else list(dict.fromkeys(options.rule))
    data = ml.experiments.load_for(options.network, options.dataset, options.root)
    out = options.out or Path("reports/runs") / f"{options.network}-{data.name}-seed{options.seed}"
    rows = []
    for rule in rules:
        _, history = ml.experiments.train(
            rule,
            options.network,
            data,
            options.epochs,
            options.batch_size,
            folder=out / rule,
            overwrite=options.overwrite,
            seed=options.seed,
            lr=options.lr,
            optimizer=options.optimizer,
            weight_decay=options.weight_decay,
            loss=options.loss,
            initialisation=options.initialisation,
            feedback_kind=options.feedback,
            distribution=options.distribution,
            scale=options.scale,
            clip_norm=options.clip_norm,
            device=group.device,
            group=group,
            sync_batchnorm=options.sync_batchnorm,
        )
        last = history.table.iloc[-1]
        rows.append({"rule": rule, **last, "seconds": history.table["seconds"].sum()})
    if group.rank == 0:
        print(pd.DataFrame(rows).astype({"epoch": int}).to_string(index=False, float_format="{:.4f}".format))
        print(f"histories and checkpoints are in {out}/")
