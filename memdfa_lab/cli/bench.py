"""memdfa bench: time steps side by side."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab.cli.command import (
    add_command,
    add_model,
    add_rule_options,
    add_rules,
    chosen_rules,
    named_network,
    rule_options,
)
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import models
from memdfa_lab.lab.bench import NETWORKS, bench, contenders, frontier
from memdfa_lab.lab.files import write_text

SHOWN = ["rule", "feedback", "setting", "median_s", "us_a_block", "ratio", "ratio_low", "ratio_high", "peak_mib"]


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "bench",
        _bench,
        "time steps of the rules side by side, in turns, and give the peak beside each",
        "  memdfa bench\n"
        "  memdfa bench --network '784-[800]x32-10' --batch 128 --rules bp memdfa --rounds 21 --out bench\n"
        "  memdfa bench --network mnist_conv --rules memdfa --precision bfloat16  # each without and with it\n"
        "  memdfa bench --network liao_cifar --frontier --out frontier\n"
        "  memdfa bench --model my_nets:small --input 3x32x32    # def small() in my_nets.py, here\n",
    )
    add_rules(command, "--rules", ["all"], "the four rules and the baselines")
    add = command.add_argument
    add("--network", nargs="+", metavar="NAME", default=list(NETWORKS), help=f"default: {', '.join(NETWORKS)}")
    add_model(command)
    add("--batch", type=int, help="batch size; default: 128, 2048, 512, 100, 100, 32 for these, else 128")
    add("--feedback", nargs="+", choices=list(KINDS), default=["regenerated"], help="one or more; default: regenerated")
    add("--frontier", action="store_true", help="instead of the rules: MEM-DFA's keep_bytes beside checkpointing")
    add_rule_options(command)
    add("--channels-last", action="store_true", help="lay out images and filters so, for all of them")
    add("--rounds", type=int, default=9, help="steps of each that count; default: 9")
    add("--out", type=Path, help="write bench.csv and the figure (svg, png) into this folder")


def _bench(options: argparse.Namespace) -> None:
    if options.frontier and (options.rules != ["all"] or len(options.feedback) > 1 or rule_options(options)):
        raise ValueError(
            "--frontier has rules and options of its own, one kind of feedback: leave out --frontier, or these"
        )
    named, tables = named_network(options), []
    networks = [named] if isinstance(named, str) else named
    for network in networks:
        models.input_shape(network)  # an unknown name is refused before the first network takes its minutes
    for network in networks:
        batch = NETWORKS.get(network, 128) if options.batch is None else options.batch
        if options.frontier:
            against = frontier(network, batch, options.feedback[0])
        else:
            rules = chosen_rules(options.rules, list(ALL_RULES))
            against = contenders(rules, options.feedback, rule_options(options))
        tables.append(bench(network, batch, against, rounds=options.rounds, channels_last=options.channels_last))
        first = tables[0].iloc[0]
        if len(tables) == 1:
            print(f"torch {first['torch']}, {first['threads']} threads, {options.rounds} rounds, in turns")
        print(f"\n{network}, batch {batch}: seconds a step and ratio to BP (median, quartiles), peak above rest")
        shown = tables[-1].assign(peak_mib=tables[-1]["peak_bytes"] / 2**20)[SHOWN]
        print(shown.to_string(index=False, float_format="{:.3f}".format), flush=True)
        if options.out:  # after each network: a bench that is interrupted leaves what it has
            from memdfa_lab import figures  # not above: plotting takes a while to import

            table = pd.concat(tables)
            write_text(options.out / "bench.csv", table.to_csv(index=False))
            figures.save(figures.frontier(table), options.out / "bench")
