"""memdfa bench: time steps side by side."""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab.cli.command import (
    add_command,
    add_model,
    add_rules,
    add_settings,
    chosen_rules,
    given,
    named_network,
)
from memdfa_lab.core.devices import check_device
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.precision import PASS1
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import models
from memdfa_lab.lab.bench import NETWORKS, bench, contenders, frontier, wait_until_quiet
from memdfa_lab.lab.files import write_text

OPTIONS = ("precision", "clip_global_norm")
SHOWN = ["rule", "feedback", "setting", "layout", "median_s", "us_a_block", "ratio", "ratio_low", "ratio_high"]


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "bench",
        _bench,
        "time steps of the rules side by side, in turns, and give the peak beside each",
        "  memdfa bench\n"
        "  memdfa bench --network '784-[800]x32-10' --batch 128 --rules bp memdfa --rounds 21 --out bench\n"
        "  memdfa bench --network mnist_conv --rules memdfa --precision bfloat16  # each without and with it\n"
        "  memdfa bench --rules memdfa --pass1 bfloat16 int8 --threads 1 all --quiet\n"
        "  memdfa bench --network liao_cifar --frontier --pass1 bfloat16 --out frontier\n"
        "  memdfa bench --device cuda\n"
        "  memdfa bench --model my_nets:small --input 3x32x32    # def small() in my_nets.py, here\n",
    )
    add_rules(command, "--rules", ["all"], "the four rules, the baselines, and those of one pass")
    add = command.add_argument
    add("--network", nargs="+", metavar="NAME", default=list(NETWORKS), help=f"default: {', '.join(NETWORKS)}")
    add_model(command)
    add("--batch", type=int, help="batch size; default: 128, 2048, 512, 100, 100, 32 for these, else 128")
    add("--feedback", nargs="+", choices=list(KINDS), default=["regenerated"], help="one or more; default: regenerated")
    add("--frontier", action="store_true", help="instead of the rules: MEM-DFA's keep_bytes beside checkpointing")
    add_settings(command, *OPTIONS, "device")
    add("--pass1", nargs="+", choices=list(PASS1), default=[], help="one or more, each beside an exact one")
    add(
        "--threads", nargs="+", type=_threads, metavar="N", default=[None], help="as many, or all; default: torch's own"
    )
    add("--quiet", action="store_true", help="before each timing, wait up to 10 minutes until others use no processor")
    add("--rounds", type=int, default=9, help="steps of each that count; default: 9")
    add("--out", type=Path, help="write bench.csv and the figure (svg, png) into this folder")


def _bench(options: argparse.Namespace) -> None:
    more = given(options, OPTIONS)
    if options.frontier and (options.rules != ["all"] or len(options.feedback) > 1 or more):
        raise ValueError(
            "--frontier has rules and options of its own, one kind of feedback: leave out --frontier, or these"
        )
    check_device(options.device)
    named, tables = named_network(options), []
    networks = [named] if isinstance(named, str) else named
    for network in networks:
        models.input_shape(network)  # an unknown name is refused before the first network takes its minutes
    if options.out:
        from memdfa_lab import figures  # not above: plotting takes a while to import
    rules = chosen_rules(options.rules, list(ALL_RULES))
    for network, threads in itertools.product(networks, options.threads):
        batch = NETWORKS.get(network, 128) if options.batch is None else options.batch
        if options.frontier:
            against = frontier(network, batch, options.feedback[0], passes=options.pass1)
        else:
            against = contenders(rules, options.feedback, more, options.pass1)
        if options.quiet and not wait_until_quiet():
            print("others still use the processors: timing all the same", file=sys.stderr)
        tables.append(bench(network, batch, against, rounds=options.rounds, threads=threads, device=options.device))
        first = tables[-1].iloc[0]
        if len(tables) == 1:
            print(f"torch {first['torch']} on {options.device}, {options.rounds} rounds, in turns")
        title = f"{network}, batch {batch}, {first['threads']} threads"
        print(f"\n{title}: seconds a step and ratio to BP (median, quartiles), peak above rest")
        shown = tables[-1].assign(peak_mib=tables[-1]["peak_bytes"] / 2**20)[[*SHOWN, "peak_mib"]]
        print(shown.to_string(index=False, float_format="{:.3f}".format), flush=True)
        if first["noisy"]:
            print(
                f"{title}: noisy, BP moved by {first['moved']:.0%}: stop what else runs, or try --quiet",
                file=sys.stderr,
            )
        if options.out:  # after each network: a bench that is interrupted leaves what it has
            table = pd.concat(tables)
            write_text(options.out / "bench.csv", table.to_csv(index=False))
            if len(options.threads) > 1:
                table["network"] += ", " + table["threads"].astype(str) + " threads"
            figures.save(figures.frontier(table), options.out / "bench")


def _threads(given: str) -> int:
    if given != "all" and not given.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, or all, got {given!r}")
    return os.cpu_count() or 1 if given == "all" else int(given)
