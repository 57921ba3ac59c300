"""memdfa profile: the memory of one training step."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab import memory
from memdfa_lab.cli.command import (
    add_command,
    add_model,
    add_rules,
    add_settings,
    chosen_rules,
    given,
    named_network,
)
from memdfa_lab.core.rules import ALL_RULES, RULES
from memdfa_lab.lab import experiments
from memdfa_lab.lab.example import FEEDBACK, kind_for
from memdfa_lab.lab.files import write_text

RULE_OPTIONS = ("precision", "pass1", "clip_global_norm")


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "profile",
        _profile,
        "measure or predict the memory of one training step, for each rule",
        "  memdfa profile --network long_fc --batch 128 --rules all\n"
        "  memdfa profile --network '784-[800]x32-10' --batch 10000 --predict --plot profile.svg\n"
        "  memdfa profile --model torchvision.models:alexnet --input 3x224x224 --batch 64 --budget 8GiB\n",
    )
    add_settings(command, "network", "optimizer", network="long_fc", optimizer="sgd")
    add_model(command)
    add_rules(command, "--rules", list(RULES), "the four rules, the baselines and the one-pass rules")
    add_settings(command, *RULE_OPTIONS, "device")
    add = command.add_argument
    kinds = "matrices B between steps: stored, drawn again at each use, one shared by all blocks, or learned, by DFA "
    kinds += "and MEM-DFA; the other rules then store theirs; default: regenerated"
    add("--feedback", choices=list(FEEDBACK), default="regenerated", help=kinds)
    add("--batch", type=int, default=128, metavar="N", help="examples per step; default: 128")
    add("--predict", action="store_true", help="predict without running the step: takes seconds, whatever the size")
    budget = "predict, and find the largest batch whose peak, with what is at rest, fits in SIZE, such as 8GiB or 500MB"
    add("--budget", metavar="SIZE", help=budget)
    grid = "interpolate the signals of images from G x G positions: B is smaller; default: a position for each pixel"
    add("--grid", type=int, metavar="G", help=grid)
    add("--table", type=Path, metavar="FILE", help="write the printed table to this csv file")
    add("--csv", type=Path, metavar="FILE", help="write every allocation and release of the step to this csv file")
    add("--plot", type=Path, metavar="FILE", help="draw the bytes over the course of the step: an svg and a png")


def _profile(options: argparse.Namespace) -> None:
    network, set_to = named_network(options), given(options, RULE_OPTIONS)
    budget = None if options.budget is None else memory.bytes_of(options.budget)
    rules, measured = chosen_rules(options.rules, list(ALL_RULES)), not options.predict and budget is None
    how = {rule: (options.optimizer, FEEDBACK[kind_for(rule, options.feedback)](grid=options.grid)) for rule in rules}
    traces = {
        rule: experiments.profile(rule, network, options.batch, *how[rule], measured, device=options.device, **set_to)
        for rule in rules
    }
    rows = [
        {"rule": rule, "peak": trace.peak_bytes, **trace.peak_by_category, "at rest": trace.resting_bytes}
        for rule, trace in traces.items()
    ]
    table = pd.DataFrame(rows).fillna(0)
    table = table[[name for name in ("rule", "peak", *memory.CATEGORIES, "at rest") if name in table]]
    seen = "measured" if measured else "predicted"
    run = ", ".join([network, f"batch {options.batch}", options.optimizer, *map(str, set_to.values())])
    print(f"{run}: bytes, {seen}; the peak is above what is at rest")
    print(table.to_string(index=False, float_format="{:.0f}".format))
    if budget is not None:
        fits = pd.DataFrame(
            [{"rule": rule, **experiments.sizes(rule, network, budget, *how[rule], **set_to)} for rule in rules]
        )
        print(
            f"\nlargest batch: peak and rest together fit in {options.budget}; B: bytes of all matrices B, kept or not"
        )
        print("s to draw B: seconds to draw all of B on this machine, estimated from a million numbers")
        print(fits.to_string(index=False, float_format="{:.3g}".format))
        table = table.merge(fits, on="rule")
    if options.table:
        write_text(options.table, table.to_csv(index=False))
    if options.csv:
        timelines = [trace.timeline.assign(rule=rule) for rule, trace in traces.items()]
        write_text(options.csv, pd.concat(timelines).to_csv(index=False))
    if options.plot:
        from memdfa_lab import figures  # here, since plotting takes a while to import

        labels = {figures.label(rule): trace.timeline for rule, trace in traces.items()}
        figures.save(figures.memory_profiles(labels), options.plot)
