"""memdfa bench: compare the time and memory of training steps."""

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
from memdfa_lab.core.precision import PASS1
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import models
from memdfa_lab.lab.bench import NETWORKS, PLAIN, bench, contenders, counted, frontier
from memdfa_lab.lab.example import FEEDBACK
from memdfa_lab.lab.files import write_text
from memdfa_lab.lab.quiet import wait_until_quiet

OPTIONS = ("precision", "clip_global_norm")
SHOWN = ["rule", "feedback", "setting", "layout", "median_s", "us_a_block", "ratio", "ratio_low", "ratio_high"]


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "bench",
        _bench,
        "time a training step of each rule, in alternation, and measure its peak memory",
        "  memdfa bench\n"
        "  memdfa bench --network '784-[800]x32-10' --batch 128 --rules bp memdfa --rounds 21 --out bench\n"
        "  memdfa bench --network mnist_conv --rules memdfa --precision bfloat16  # with and without it\n"
        "  memdfa bench --rules memdfa --pass1 bfloat16 int8 --threads 1 all --quiet\n"
        "  memdfa bench --network liao_cifar --frontier --pass1 bfloat16 --out frontier\n"
        "  memdfa bench --device cuda\n"
        "  memdfa bench --model my_nets:small --input 3x32x32    # def small() in ./my_nets.py\n",
    )
    add_rules(command, "--rules", ["all"], "the four rules, the baselines and the one-pass rules")
    add = command.add_argument
    named = f"one or more networks, named as in memdfa train; default: {', '.join(NETWORKS)}"
    add("--network", nargs="+", metavar="NAME", default=list(NETWORKS), help=named)
    add_model(command)
    batches = f"examples per step; default: {', '.join(map(str, NETWORKS.values()))} for the default networks, else 128"
    add("--batch", type=int, metavar="N", help=batches)
    kinds = "how the matrices B are kept between steps, one kind or more; learned is for DFA and MEM-DFA, and the "
    kinds += "other rules then store theirs; default: regenerated"
    add("--feedback", nargs="+", choices=list(FEEDBACK), default=["regenerated"], help=kinds)
    others = "in place of --rules: MEM-DFA with five values of keep_bytes, checkpointing, and other ways to save memory"
    add("--frontier", action="store_true", help=others)
    plain = (
        "time BP also as a plain torch loop, with one fused optimizer for all weights and without the package's checks"
    )
    add("--plain", action="store_true", help=plain)
    add_settings(command, *OPTIONS, "device")
    formats = "time DFA and MEM-DFA also with their first pass in these number formats; default: only in the exact one"
    add("--pass1", nargs="+", choices=list(PASS1), default=[], help=formats)
    threads = "numbers of threads, one or more; all: one per processor; default: torch's own number"
    add("--threads", nargs="+", type=_threads, metavar="N", default=[None], help=threads)
    quiet = "before each table, wait up to 10 minutes until other processes are idle (Linux only)"
    add("--quiet", action="store_true", help=quiet)
    add("--rounds", type=int, default=9, metavar="N", help="timed steps of each rule, after a warm-up; default: 9")
    add("--out", type=Path, help="folder for bench.csv and a figure (svg, png); default: nothing is written")


def _bench(options: argparse.Namespace) -> None:
    more = given(options, OPTIONS)
    if options.frontier and (options.rules != ["all"] or len(options.feedback) > 1 or more):
        raise ValueError(
            "--frontier has its own rules and options, and takes one kind of feedback: leave out --frontier, or these"
        )
    check_device(options.device)
    named, tables = named_network(options), []
    networks = [named] if isinstance(named, str) else named
    for network in networks:
        models.input_shape(network)  # refuse an unknown name before the first network is timed
    if options.out:
        from memdfa_lab import figures  # here, since plotting takes a while to import
    rules = chosen_rules(options.rules, list(ALL_RULES))
    for network, threads in itertools.product(networks, options.threads):
        batch = NETWORKS.get(network, 128) if options.batch is None else options.batch
        if options.frontier:
            against = frontier(network, batch, options.feedback[0], passes=options.pass1)
        else:
            against = contenders(rules, options.feedback, more, options.pass1)
        against += [PLAIN] if options.plain else []
        if options.quiet and not wait_until_quiet():
            print("other processes still use the processors: timing anyway", file=sys.stderr)
        tables.append(bench(network, batch, against, rounds=options.rounds, threads=threads, device=options.device))
        first = tables[-1].iloc[0]
        if len(tables) == 1:
            print(f"torch {first['torch']} on {options.device}, {options.rounds} rounds")
        title = f"{network}, batch {batch}, {counted(first['threads'], 'thread')}"
        print(f"\n{title}: seconds per step and ratio to BP (median, quartiles), peak above rest")
        shown = tables[-1].assign(peak_mib=tables[-1]["peak_bytes"] / 2**20)[[*SHOWN, "peak_mib"]]
        print(shown.to_string(index=False, float_format="{:.3f}".format), flush=True)
        if first["noisy"]:
            print(
                f"{title}: noisy, BP's time varied by {first['moved']:.0%}: stop other processes, or use --quiet",
                file=sys.stderr,
            )
        if options.out:  # after each network, so that an interrupted bench keeps the finished ones
            table = pd.concat(tables)
            write_text(options.out / "bench.csv", table.to_csv(index=False))
            if len(options.threads) > 1:
                table["network"] += ", " + table["threads"].map(lambda n: counted(n, "thread"))
            figures.save(figures.frontier(table), options.out / "bench")


def _threads(given: str) -> int:
    if given != "all" and not given.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, or all, got {given!r}")
    return os.cpu_count() or 1 if given == "all" else int(given)
