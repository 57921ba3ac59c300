"""Peaks of a step: what fills them, how they grow with depth, batch and width, and what time they cost."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.core.checks import check_number
from memdfa_lab.figures.needs import check_table, needs
from memdfa_lab.figures.style import (
    BELOW,
    FILLS,
    HATCHED,
    MIB,
    SETTINGS,
    STYLES,
    legend_below,
    logarithmic,
    two_a_row,
    visible,
)

# What rests between steps, and beside it what a rule's step adds: column -> label, look
RESTING: dict[str, tuple[str, dict[str, Any]]] = {
    "parameters": ("weights and biases", {"color": "#0072B2", "linestyle": "--", "marker": "P"}),
    "optimizer state": ("optimizer state", {"color": "#999999", "linestyle": (0, (5, 1)), "marker": "X"}),
    "feedback": ("stored B", {"color": "#CC79A7", "linestyle": ":", "marker": "*"}),
    **{f"peak {rule}": (f"peak above rest, {label}", style) for rule, (label, style) in STYLES.items()},
}


@needs("rule", "{x}", "peak_bytes")
def peak_against(table: pd.DataFrame, x: str, xlabel: str, measured: pd.DataFrame | None = None) -> Figure:
    """Draw peaks above rest against depth, batch or width, a line a rule, both axes logarithmic.

    `table` has the columns rule, peak_bytes and the one named by `x`; `measured`, drawn as rings on top, needs no rule.
    """
    if measured is not None:
        check_table("measured", measured, [x, "peak_bytes"])
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            wide = "linewidth" in style  # below the others, which may lie on it
            axes.plot(rows[x], rows["peak_bytes"] / MIB, label=label, zorder=1.9 if wide else 2, **style)
        if measured is not None:
            ring: Any = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black"}
            axes.plot(measured[x], measured["peak_bytes"] / MIB, label="measured", linestyle="", zorder=5, **ring)
        axes.set_ylabel("peak above rest (MiB)")
        logarithmic(axes, sorted(set(table[x])), xlabel)
    plt.close(figure)
    return figure


@needs("{x}", one_of=RESTING)
def rest_against(table: pd.DataFrame, x: str, xlabel: str) -> Figure:
    """Draw what rests between steps, a line a part, beside what comes and goes; both axes logarithmic.

    `table` has the column named by `x`, and a column of bytes for each of RESTING that is to be drawn.
    """
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        for column, (label, style) in RESTING.items():
            if column in table and table[column].any():
                axes.plot(table[x], table[column] / MIB, label=label, **style)
        axes.set_ylabel("bytes held (MiB)")
        logarithmic(axes, list(table[x]), xlabel)
    plt.close(figure)
    return figure


@needs("rule", one_of=FILLS)
def peak_fillings(table: pd.DataFrame) -> Figure:
    """Draw what fills each rule's peak, a stacked bar a rule.

    `table` has a column rule, and a column of bytes a category.
    """
    with plt.rc_context(HATCHED):
        figure, axes = plt.subplots(figsize=(7, 0.45 * len(table) + 1.2), layout="constrained")
        labels = [STYLES[rule][0] for rule in table["rule"]]
        left = np.zeros(len(table))
        parts = table[[name for name in FILLS if name in table and table[name].any()]].fillna(0)
        for category, held in parts.items():
            color, hatch = FILLS[str(category)]
            look: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
            axes.barh(labels, held / MIB, left=left, **look)
            left += held.to_numpy() / MIB
        for at, total in enumerate(left):
            axes.text(total, at, f" {total:.2f}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("at the peak, above rest (MiB)")
        legend_below(figure, visible(parts.max(), parts.sum(axis=1).max()))
    plt.close(figure)
    return figure


@needs("network", "batch_size", "rule", "feedback", "ratio", "ratio_low", "ratio_high", "peak_bytes")
def frontier(table: pd.DataFrame) -> Figure:
    """Draw time against memory, a panel a network and a point a contender of `bench`: down and left is better.

    `table` has the columns network, batch_size, rule, feedback, ratio, ratio_low, ratio_high, peak_bytes. Points of one
    rule that differ in their setting are joined; open markers are rules whose feedback is stored.
    """
    with plt.rc_context(SETTINGS):
        networks = list(table.groupby(["network", "batch_size"], sort=False))
        figure, panels = two_a_row(len(networks), 2.9, legend=0.9)
        handles = {}
        for axes, ((network, batch_size), contenders) in zip(panels, networks, strict=True):
            for (rule, feedback), points in contenders.groupby(["rule", "feedback"], sort=False):
                label, style = STYLES[str(rule)]
                label += ", B stored" if feedback == "stored" else ""
                error = [points["ratio"] - points["ratio_low"], points["ratio_high"] - points["ratio"]]
                look = {"color": style["color"], "marker": style["marker"], "markersize": 7, "elinewidth": 1}
                look |= {"linestyle": style["linestyle"] if len(points) > 1 else "", "linewidth": 1.2}
                look |= {"markerfacecolor": "white"} if feedback == "stored" else {}
                handles[label] = axes.errorbar(points["peak_bytes"] / MIB, points["ratio"], yerr=error, **look)
            axes.set(title=f"{network}, batch {batch_size}")
            axes.set(xlabel="peak above rest (MiB)", ylabel="step time / BP's")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.title.set_fontsize(10)
        figure.legend(handles.values(), handles.keys(), ncols=4, **BELOW)
    plt.close(figure)
    return figure


@needs("rule", "peak_bytes", "run_again")
def keep_frontier(table: pd.DataFrame) -> Figure:
    """Draw how much is run twice against the peak: MEM-DFA as it keeps more, beside checkpointing with more segments.

    `table` has the columns rule, peak_bytes and run_again, the part of the blocks that run forward twice.
    """
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            axes.plot(rows["peak_bytes"] / MIB, 100 * rows["run_again"], label=label, **style)
        axes.set(xlabel="peak above rest (MiB)", ylabel="blocks run forward twice (%)", xlim=(0, None), ylim=(-4, 104))
        axes.legend(frameon=False, fontsize=9, handlelength=3.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


@needs("rule", "depth", "bytes")
def peak_at_depth(table: pd.DataFrame, depth: int, ylabel: str, budget_bytes: int | None = None) -> Figure:
    """Draw bytes against depth, a line a rule, both axes logarithmic; one depth, and the budget if given, are marked.

    `table` has the columns rule, depth and bytes, and a row a rule at `depth`.
    """
    check_number("depth", depth, or_more=False)
    if budget_bytes is not None:
        check_number("budget_bytes", budget_bytes, or_more=False)
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            axes.plot(rows["depth"], rows["bytes"] / MIB, label=label, **style | {"markevery": [0, -1]})
            here = rows[rows["depth"] == depth]
            axes.plot(here["depth"], here["bytes"] / MIB, **style | {"markersize": 9, "markeredgecolor": "black"})
        axes.axvline(depth, color="black", linewidth=0.8, zorder=0)
        axes.text(depth, 1.02, f"{depth:,}", transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
        if budget_bytes is not None:
            axes.axhline(budget_bytes / MIB, color="black", linewidth=1, linestyle=(0, (8, 4)), label="budget")
        axes.set_ylabel(ylabel)
        logarithmic(axes, [1, 10, 100, 1000], "hidden layers")
    plt.close(figure)
    return figure


@needs("network", "batch_size", "rule", "depth", "peak_bytes", "measured_bytes", "formula_bytes")
def theory_and_measurement(table: pd.DataFrame) -> Figure:
    """Draw peaks against depth, a panel a network: predicted (lines), measured (rings), closed forms (crosses).

    `table` has the columns network, batch_size, rule, depth, peak_bytes, measured_bytes and formula_bytes; the last two
    may be empty.
    """
    with plt.rc_context(SETTINGS):
        networks = list(table.groupby("network", sort=False))
        size = (8, 4.4)
        figure, panels = plt.subplots(1, len(networks), figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes, (network, rows) in zip(panels.flat, networks, strict=True):
            for rule, line in rows.groupby("rule", sort=False):
                label, style = STYLES[str(rule)]
                zorder = 1.9 if "linewidth" in style else 2  # wide lines below the others, which may lie on them
                look = style | {"marker": ""}
                axes.plot(line["depth"], line["peak_bytes"] / MIB, label=label, zorder=zorder, **look)
            ring: Any = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
            axes.plot(rows["depth"], rows["measured_bytes"] / MIB, label="measured", linestyle="", zorder=5, **ring)
            cross: Any = {"marker": "x", "markersize": 6, "color": "black", "markeredgewidth": 1.2}
            axes.plot(rows["depth"], rows["formula_bytes"] / MIB, label="closed form", linestyle="", zorder=5, **cross)
            logarithmic(axes, [2, 20, 200], "layers")
            axes.get_legend().remove()
            axes.set_title(f"{network}, batch {rows['batch_size'].iloc[0]}", fontsize=10)
        panels[0][0].set_ylabel("peak above rest (MiB)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=4, handlelength=3.5, **BELOW)
    plt.close(figure)
    return figure


@needs("network", "batch_size", "rule", "peak_bytes")
def peaks_by_network(table: pd.DataFrame) -> Figure:
    """Draw a line a network, with a mark for each rule's peak above rest.

    `table` has the columns network, batch_size, rule and peak_bytes.
    """
    with plt.rc_context(SETTINGS):
        cases = table["network"].astype(str) + ", " + table["batch_size"].astype(str)
        names = list(dict.fromkeys(cases))
        figure, axes = plt.subplots(figsize=(8, 0.27 * len(names) + 1.4), layout="constrained")
        place = {name: at for at, name in enumerate(names)}
        at = cases.map(place)
        ends = table.groupby(at)["peak_bytes"].agg(["min", "max"]) / MIB
        axes.hlines(ends.index, ends["min"], ends["max"], color="#bbbbbb", lw=1, zorder=1)
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            look: Any = {"color": style["color"], "marker": style["marker"], "linestyle": "", "label": label}
            look |= {"markersize": style.get("markersize", 6) + 2 if rule == "dfa" else 6}
            axes.plot(rows["peak_bytes"] / MIB, at[rows.index], zorder=2 if rule == "dfa" else 3, **look)
        axes.set_yticks(range(len(names)), labels=names, fontsize=9)
        axes.set(xscale="log", xlabel="peak above rest (MiB)", ylim=(len(names) - 0.5, -0.5))
        axes.xaxis.set_major_formatter("{x:g}")
        figure.legend(ncols=4, **BELOW)
    plt.close(figure)
    return figure
