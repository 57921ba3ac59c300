"""Past one machine: what a data-parallel step sends, and who computes when in a pipeline."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from memdfa_lab.core.checks import check_number, lookup
from memdfa_lab.figures.needs import needs
from memdfa_lab.figures.style import BELOW, HATCHED, MIB, SETTINGS, STYLES

# task -> colour, hatch
TASKS = {
    "forward": ("#56B4E9", ""),
    "recompute": ("#0072B2", "//"),
    "backward": ("#E69F00", "\\\\"),
    "local gradient": ("#D55E00", ".."),
}
LINES: list[Any] = [
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": ":", "marker": "^"},
    {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1)), "marker": "v"},
]


@needs("network", "ranks", "gradient_bytes", "sent_bytes")
def sent(table: pd.DataFrame) -> Figure:
    """Draw the bytes that a rank sends in a step against the number of ranks, a line a network: the ring's formula.

    `table` has the columns network, ranks, gradient_bytes and sent_bytes, which are drawn as marks.
    """
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
        longest = range(1, 2 * int(table["ranks"].max()) + 1)
        for (network, rows), look in zip(table.groupby("network", sort=False), 10 * LINES, strict=False):
            gradient = rows["gradient_bytes"].iloc[0] / MIB
            ring = [2 * (R - 1) / R * gradient for R in longest]
            axes.plot(longest, ring, color=look["color"], linestyle=look["linestyle"])
            axes.plot(rows["ranks"], rows["sent_bytes"] / MIB, **look | {"linestyle": "", "label": network})
            axes.axhline(2 * gradient, color=look["color"], linewidth=0.6)
        axes.set(xlabel="ranks", ylabel="sent by a rank in a step (MiB)", xticks=longest)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


@needs("machine", "task", "batch", "start", "end", each=True)
def pipelines(simulations: Mapping[str, pd.DataFrame], batch: int = 1) -> Figure:
    """Draw who computes what when, a panel a rule and a row a machine; `batch` is in strong colours.

    A simulation is a table of `pipeline.simulate`: machine, task, batch, start, end. Time begins with the batch and
    ends when the next one is done. Raises ValueError where one of the two is missing.
    """
    for rule, table in simulations.items():
        lookup("rule", rule, STYLES)
        for task in table["task"].unique():
            lookup("task", task, TASKS)
        if not {batch, batch + 1} <= set(table["batch"]):
            raise ValueError(f"batch {batch!r} or the one after it is not in simulations[{rule!r}]: choose another")
    with plt.rc_context(HATCHED):
        size = (8, 1.55 * len(simulations) + 0.9)
        figure, panels = plt.subplots(
            len(simulations), 1, figsize=size, layout="constrained", squeeze=False, sharex=True
        )
        ends = []
        for axes, (rule, table) in zip(panels.flat, simulations.items(), strict=True):
            start = table[table["batch"] == batch]["start"].min()
            ends.append(table[table["batch"] == batch + 1]["end"].max() - start)
            for (name, number), rows in table.groupby(["task", "batch"], sort=False):
                color, hatch = TASKS[str(name)]
                strong = number == batch
                for machine, spans in rows.groupby("machine"):
                    bars = [
                        (begin - start, end - begin) for begin, end in zip(spans["start"], spans["end"], strict=True)
                    ]
                    look: Any = {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
                    axes.broken_barh(bars, (float(str(machine)) - 0.42, 0.84), alpha=1 if strong else 0.35, **look)
            machines = range(int(table["machine"].max()) + 1)
            axes.set(yticks=machines, yticklabels=[str(machine + 1) for machine in machines], ylabel="machine")
            axes.set_ylim(machines[-1] + 0.6, -0.6)
            axes.set_title(STYLES[rule][0], fontsize=10, loc="left")
        panels.flat[-1].set(xlabel="time (forward passes of a micro-batch on one machine)", xlim=(0, max(ends)))
        shown = [name for name in TASKS if any((table["task"] == name).any() for table in simulations.values())]
        handles = [
            Rectangle((0, 0), 1, 1, facecolor=c, hatch=h, edgecolor="white") for c, h in (TASKS[name] for name in shown)
        ]
        figure.legend(handles, shown, ncols=4, handlelength=1.4, **BELOW)
    plt.close(figure)
    return figure


@needs("rule", "x", "busy", "rate", each=True)
def utilisation(tables: Mapping[str, pd.DataFrame], ideal: float = 1 / 3) -> Figure:
    """Draw how busy machines are and how fast they learn: a column a table, named by what is on its x axis.

    A table has the columns rule, x, busy and rate; `ideal` is the rate of BP that never waits.
    """
    check_number("ideal", ideal, or_more=False)
    with plt.rc_context(SETTINGS):
        size = (8, 5.2)
        figure, panels = plt.subplots(2, len(tables), figsize=size, layout="constrained", squeeze=False, sharey="row")
        for column, (xlabel, table) in enumerate(tables.items()):
            for axes, values in zip(panels[:, column], (100 * table["busy"], table["rate"] / ideal), strict=True):
                for rule, rows in table.groupby("rule", sort=False):
                    label, style = STYLES[str(rule)]
                    wide = "linewidth" in style  # below the others, which may lie on it
                    axes.plot(rows["x"], values[rows.index], label=label, zorder=1.9 if wide else 2, **style)
                ticks = sorted(set(table["x"]))
                axes.set(xscale="log", xlabel=xlabel)
                axes.set_xticks(ticks, labels=[f"{tick}" for tick in ticks])
                axes.minorticks_off()
                axes.set_ylim(bottom=0)
        panels[0][0].set_ylabel("machines busy (%)")
        panels[1][0].set_ylabel("speed / BP's if it never waited")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(labels), handlelength=3.5, **BELOW)
    plt.close(figure)
    return figure
