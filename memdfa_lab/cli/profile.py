"""memdfa profile: what one step holds."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab.cli.command import (
    add_command,
    add_rule_options,
    add_rules,
    add_settings,
    chosen_rules,
    rule_options,
)
from memdfa_lab.core.rules import ALL_RULES, RULES
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import write_text
from memdfa_lab.memory import CATEGORIES


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "profile",
        _profile,
        "tell what one training step holds in memory, rule by rule, measured or predicted",
        "  memdfa profile --network long_fc --batch 128 --rules all\n"
        "  memdfa profile --network '784-[800]x32-10' --batch 10000 --predict --plot profile.svg\n",
    )
    add_settings(
        command, "network", "optimizer", "feedback", network="long_fc", optimizer="sgd", feedback="regenerated"
    )
    add_rules(command, "--rules", list(RULES), "the four rules and the baselines")
    add_rule_options(command)
    add = command.add_argument
    add("--batch", type=int, default=128, help="batch size; default: 128")
    add("--predict", action="store_true", help="do not run the step: any size, in seconds")
    add("--csv", type=Path, help="write every birth and free to this file")
    add("--plot", type=Path, help="draw the profiles into this file (svg and png beside it)")


def _profile(options: argparse.Namespace) -> None:
    how = (options.network, options.batch, options.optimizer, options.feedback)
    rules = chosen_rules(options.rules, list(ALL_RULES))
    set_to = rule_options(options)
    traces = {rule: experiments.profile(rule, *how, measured=not options.predict, **set_to) for rule in rules}
    rows = [
        {"rule": rule, "peak": trace.peak_bytes, **trace.peak_by_category, "at rest": trace.resting_bytes}
        for rule, trace in traces.items()
    ]
    table = pd.DataFrame(rows).fillna(0)
    table = table[[name for name in ("rule", "peak", *CATEGORIES, "at rest") if name in table]]
    seen = "predicted" if options.predict else "measured"
    run = ", ".join([options.network, f"batch {options.batch}", options.optimizer, *map(str, set_to.values())])
    print(f"{run}: bytes, {seen}; the peak is above rest")
    print(table.to_string(index=False, float_format="{:.0f}".format))
    if options.csv:
        timelines = [trace.timeline.assign(rule=rule) for rule, trace in traces.items()]
        write_text(options.csv, pd.concat(timelines).to_csv(index=False))
    if options.plot:
        from memdfa_lab import figures  # not above: plotting takes a while to import

        labels = {figures.STYLES[rule][0]: trace.timeline for rule, trace in traces.items()}
        figures.save(figures.memory_profiles(labels), options.plot)
