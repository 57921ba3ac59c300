"""memdfa profile: what one step holds."""

import argparse
from pathlib import Path
from typing import Any

import memdfa_lab as ml
from memdfa_lab.cli.command import add_command
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.lab.bench import ALL
from memdfa_lab.lab.experiments import OPTIMIZERS
from memdfa_lab.lab.files import write_text


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "profile",
        _profile,
        "say what one training step holds in memory, rule by rule, measured or predicted",
        "  memdfa profile --network long_fc --batch 128 --rules all\n"
        "  memdfa profile --network '784-[800]x32-10' --batch 10000 --predict --plot profile.svg\n",
    )
    add = command.add_argument
    add(
        "--network",
        default="long_fc",
        metavar="NAME",
        help=f"a ReLU MLP such as 784-[800]x32-10, or {', '.join(ml.models.names())}",
    )
    add("--batch", type=int, default=128, help="batch size; default: 128")
    add("--rules", nargs="+", default=list(ml.RULES), choices=[*ALL, "all"], help="default: bp fa dfa memdfa")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="default: sgd")
    add("--feedback", choices=KINDS, default="regenerated", help="default: regenerated")
    add("--predict", action="store_true", help="do not run the step: any size, in seconds")
    add("--csv", type=Path, help="write every birth and free to this file")
    add("--plot", type=Path, help="draw the profiles into this file (svg and png beside it)")


def _profile(options: argparse.Namespace) -> None:
    import pandas as pd

    from memdfa_lab.memory import CATEGORIES

    rules = list(ALL) if "all" in options.rules else list(dict.fromkeys(options.rules))
    traces = {
        rule: ml.experiments.profile(
            rule, options.network, options.batch, options.optimizer, options.feedback, measured=not options.predict
        )
        for rule in rules
    }
    rows = [
        {"rule": rule, "peak": trace.peak_bytes, **trace.peak_by_category, "at rest": trace.resting_bytes}
        for rule, trace in traces.items()
    ]
    table = pd.DataFrame(rows).fillna(0)
    table = table[[name for name in ("rule", "peak", *CATEGORIES, "at rest") if name in table]]
    how = "predicted" if options.predict else "measured"
    print(f"{options.network}, batch {options.batch}, {options.optimizer}: bytes, {how}; the peak is above rest")
    print(table.to_string(index=False, float_format="{:.0f}".format))
    if options.csv:
        timelines = [trace.timeline.assign(rule=rule) for rule, trace in traces.items()]
        write_text(options.csv, pd.concat(timelines).to_csv(index=False))
    if options.plot:
        labels = {ml.figures.STYLES[rule][0]: trace.timeline for rule, trace in traces.items()}
        ml.figures.save(ml.figures.memory_profiles(labels), options.plot)
