"""What a step holds: profiles, lifetimes, peaks against depth, batch and width, time against memory."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from memdfa_lab.figures.style import FILLS, MIB, SETTINGS, STYLES, legend_below, logarithmic
from memdfa_lab.memory.trace import readable

# What rests between steps, and beside it what a rule's step adds: column -> label, look
RESTING: dict[str, tuple[str, dict[str, Any]]] = {
    "parameters": ("weights and biases", {"color": "#0072B2", "linestyle": "--", "marker": "P"}),
    "optimizer state": ("optimizer state", {"color": "#999999", "linestyle": (0, (5, 1)), "marker": "X"}),
    "feedback": ("stored B", {"color": "#CC79A7", "linestyle": ":", "marker": "*"}),
    **{f"peak {rule}": (f"peak above rest, {label}", style) for rule, (label, style) in STYLES.items()},
}


# What rests, below what a step adds
FILLS_AT_REST = {
    "parameters": ("#dddddd", ""),
    "buffers": ("#bbbbbb", "||"),
    "optimizer state": FILLS["optimizer state"],
    "feedback": FILLS["feedback"],
    "input": ("#009E73", "--"),
}


def memory_profiles(timelines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw one step of each rule: bytes above rest, stacked by category, against operations, the peak marked.

    `timelines`: label -> `Trace.timeline`. Phases are shaded and named; the vertical axis is shared.
    """
    with plt.rc_context({**SETTINGS, "axes.grid": False, "hatch.linewidth": 0.4}):
        rows = math.ceil(len(timelines) / 2)
        figure, panels = plt.subplots(
            rows, 2, figsize=(8, 2.6 * rows + 0.5), layout="constrained", squeeze=False, sharey=True
        )
        for axes in panels.flat[len(timelines) :]:
            axes.remove()
        for axes, (label, table) in zip(panels.flat, timelines.items(), strict=False):
            _draw_profile(axes, label, table)
        panels[0][0].set_ylim(bottom=0)  # once all are drawn: it also fixes the top of the axis they share
        for row in panels:
            row[0].set_ylabel("above rest (MiB)")
        together = pd.concat({label: _alive(table) for label, table in timelines.items()})
        legend_below(figure, _visible(together.max(), max(table["total_bytes"].max() for table in timelines.values())))
    plt.close(figure)
    return figure


def _alive(timeline: pd.DataFrame) -> pd.DataFrame:
    """Return a column a category: the bytes alive after each event."""
    return pd.DataFrame({name: timeline["bytes"].where(timeline["category"] == name, 0).cumsum() for name in FILLS})


def _visible(most: pd.Series, total: float) -> list[str]:
    """Return the categories that can be seen where `total` bytes are drawn, by the most that each holds."""
    return [str(name) for name, held in most.items() if held > total / 300]


def _draw_profile(axes: Any, label: str, table: pd.DataFrame) -> None:
    position = np.arange(len(table))
    bottom = np.zeros(len(table))
    for category, alive in _alive(table).items():
        (color, hatch), top = FILLS[str(category)], bottom + alive.to_numpy() / MIB
        if alive.any():
            axes.fill_between(position, bottom, top, step="post", facecolor=color, hatch=hatch, edgecolor="white", lw=0)
            bottom = top
    total = table["total_bytes"].to_numpy() / MIB
    peak = int(total.argmax())
    axes.plot(peak, total[peak], marker="v", color="black", markersize=6, clip_on=False)
    side = "left" if peak < len(table) / 2 else "right"
    axes.annotate(f" {total[peak]:.2f} MiB ", (peak, total[peak]), ha=side, va="bottom", fontsize=9)
    _shade_phases(axes, list(table["phase"]))
    axes.set(title=label, xlabel="births and frees, in order", xlim=(0, len(table) - 1))
    axes.margins(y=0.25)


def _shade_phases(axes: Any, phases: list[str]) -> None:
    shades = {"forward": "#eeeeee", "error": "#bbbbbb", "update": "#e4e4e4"}
    for name, start, stop in _spans(phases):
        axes.axvspan(start, stop, color=shades.get(name, "#f8f8f8"), zorder=-2, lw=0)
        if stop - start > 0.018 * len(name) * len(phases):  # there is room for it
            middle = (start + stop) / 2
            axes.text(middle, 0.98, name, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)


def _spans(phases: list[str]) -> list[tuple[str, int, int]]:
    """Return (name, start, stop) of each phase; phases that take turns, block by block, are one."""
    spans: list[tuple[str, int, int]] = []
    for at, name in enumerate(phases):
        name = {"local gradient": "learn"}.get(name, name) or (spans[-1][0] if spans else "begin")
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], at + 1)
        else:
            spans.append((name, at, at + 1))
    after_error = next((i + 1 for i, span in enumerate(spans) if span[0] == "error"), len(spans))
    turns = spans[after_error:]
    if len(turns) > 2:
        names = [name for name in ("recompute", "backward", "learn", "update") if name in {turn[0] for turn in turns}]
        turns = [(" + ".join(names), turns[0][1], turns[-1][2])]
    return [*spans[:after_error], *turns]


def lifetimes(timelines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how long what a step makes is held, a row a block: a bar from birth to end for each of its tensors.

    `timelines`: label -> `Trace.timeline`. Wide bars are activations, narrow ones above and below their middle signals
    and gradients; the row above the last block has what the loss makes, e with it. Single numbers are left out.
    """
    looks = {"activations": (0.0, 0.8), "error": (0.2, 0.3), "gradients": (-0.2, 0.3)}  # middle, height
    with plt.rc_context({**SETTINGS, "axes.grid": False, "hatch.linewidth": 0.4}):
        rows = math.ceil(len(timelines) / 2)
        size = (8, 2.6 * rows + 0.5)
        figure, panels = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes in panels.flat[len(timelines) :]:
            axes.remove()
        for axes, (label, table) in zip(panels.flat, timelines.items(), strict=False):
            large = table.groupby("storage")["bytes"].transform("first") > 8
            drawn = table[large & table["category"].isin(looks)].reset_index(drop=True)
            last = int(drawn["block"].max()) + 1
            for _, events in drawn.groupby("storage"):
                birth, category = events.iloc[0], str(events["category"].iloc[0])
                end = events.index[-1] if len(events) > 1 else len(drawn)
                row = last + 1 if pd.isna(birth["block"]) else birth["block"] + 1
                (offset, height), (color, hatch) = looks[category], FILLS[category]
                axes.broken_barh(
                    [(events.index[0], end - events.index[0])],
                    (row + offset - height / 2, height),
                    facecolor=color,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.4,
                )
            _shade_phases(axes, list(drawn["phase"]))
            axes.set(title=label, xlabel="births and frees, in order", xlim=(0, len(drawn)), ylim=(0.4, last + 2.6))
            axes.set_yticks(range(1, last + 2), labels=[*map(str, range(1, last + 1)), "loss, e"])
        for row in panels:
            row[0].set_ylabel("block")
        legend_below(figure, list(looks))
    plt.close(figure)
    return figure


def peak_against(table: pd.DataFrame, x: str, xlabel: str, measured: pd.DataFrame | None = None) -> Figure:
    """Draw peaks above rest against depth, batch or width, a line a rule, both axes logarithmic.

    `table` has the columns rule, peak_bytes and the one named by `x`; so has `measured`, drawn as rings on top.
    """
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


def peak_fillings(table: pd.DataFrame) -> Figure:
    """Draw what fills each rule's peak, a stacked bar a rule.

    `table` has a column rule, and a column of bytes a category.
    """
    with plt.rc_context({**SETTINGS, "axes.grid": False, "hatch.linewidth": 0.4}):
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
        legend_below(figure, _visible(parts.max(), parts.sum(axis=1).max()))
    plt.close(figure)
    return figure


def frontier(table: pd.DataFrame) -> Figure:
    """Draw time against memory, a panel a network and a point a contender of `bench`: down and left is better.

    `table` has the columns network, batch_size, rule, feedback, ratio, ratio_low, ratio_high, peak_bytes. Points of one
    rule that differ in their setting are joined; open markers are rules whose feedback is stored.
    """
    with plt.rc_context(SETTINGS):
        networks = list(table.groupby(["network", "batch_size"], sort=False))
        rows = math.ceil(len(networks) / 2)
        figure, panels = plt.subplots(rows, 2, figsize=(8, 2.9 * rows + 0.9), layout="constrained", squeeze=False)
        for axes in panels.flat[len(networks) :]:
            axes.remove()
        handles = {}
        for axes, ((network, batch_size), contenders) in zip(panels.flat, networks, strict=False):
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
        place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}
        figure.legend(handles.values(), handles.keys(), **place)
    plt.close(figure)
    return figure


def keep_frontier(table: pd.DataFrame) -> Figure:
    """Draw how much is run twice against the peak: MEM-DFA as it keeps more, beside checkpointing with more segments.

    `table` has the columns rule, setting, peak_bytes and run_again, the part of the blocks that run forward twice.
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


def peak_at_depth(table: pd.DataFrame, depth: int, ylabel: str, budget_bytes: int | None = None) -> Figure:
    """Draw bytes against depth, a line a rule, both axes logarithmic; one depth, and the budget if given, are marked.

    `table` has the columns rule, depth and bytes, and a row a rule at `depth`.
    """
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


def step_profiles(steps: Mapping[str, pd.DataFrame], ylabel: str) -> Figure:
    """Draw one step of each rule, bytes stacked by category, the peak marked; the vertical axis is shared.

    `steps`: label -> a row a moment, with the column phase and a column of bytes a category, the lowest first.
    """
    fills = {**FILLS_AT_REST, **FILLS}
    top = max(table.drop(columns="phase").sum(axis=1).max() for table in steps.values()) / MIB
    with plt.rc_context({**SETTINGS, "axes.grid": False, "hatch.linewidth": 0.4}):
        rows, columns = math.ceil(len(steps) / 2), min(len(steps), 2)
        size = (7.5, 2.1 * rows + 0.5)
        figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes in panels.flat[len(steps) :]:
            axes.remove()
        for panel, (axes, (label, table)) in enumerate(zip(panels.flat, steps.items(), strict=False)):
            position, bottom = np.arange(len(table)), np.zeros(len(table))
            for name in table.columns.drop("phase"):
                (color, hatch), above = fills[name], bottom + table[name].to_numpy() / MIB
                look: Any = {"facecolor": color, "hatch": hatch, "edgecolor": "white", "lw": 0}
                axes.fill_between(position, bottom, above, step="post", **look)
                bottom = above
            peak = int(bottom.argmax())
            axes.plot(peak, bottom[peak], marker="v", color="black", markersize=6, clip_on=False)
            side = "left" if peak < len(table) / 2 else "right"
            said = f" {readable(bottom[peak] * MIB)} "
            axes.annotate(said, (peak, bottom[peak]), ha=side, va="bottom", fontsize=9)
            _shade_phases(axes, list(table["phase"]))
            axes.set(title=label, xlim=(0, len(table) - 1), xticks=[], ylim=(0, 1.3 * top))
            axes.set_xlabel("births and frees, in order" if panel >= len(steps) - columns else "")
            axes.yaxis.set_major_formatter("{x:,g}")
        for row in panels:
            row[0].set_ylabel(ylabel)
        shown = {name for table in steps.values() for name in table.columns}
        handles = [
            Rectangle((0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor="white", label=name)
            for name, (color, hatch) in fills.items()
            if name in shown
        ]
        place: Any = {"loc": "outside lower center", "ncols": 5, "frameon": False, "fontsize": 9}
        figure.legend(handles=handles, handlelength=1.4, **place)
    plt.close(figure)
    return figure


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
        place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9, "handlelength": 3.5}
        figure.legend(handles, labels, **place)
    plt.close(figure)
    return figure


def peaks_by_network(table: pd.DataFrame) -> Figure:
    """Draw a line a network, with a mark for each rule's peak above rest.

    `table` has the columns network, batch_size, rule and peak_bytes.
    """
    with plt.rc_context(SETTINGS):
        names = list(dict.fromkeys(table["network"] + ", " + table["batch_size"].astype(str)))
        figure, axes = plt.subplots(figsize=(8, 0.27 * len(names) + 1.4), layout="constrained")
        place = {name: at for at, name in enumerate(names)}
        at = (table["network"] + ", " + table["batch_size"].astype(str)).map(place)
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
        legend: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}
        figure.legend(**legend)
    plt.close(figure)
    return figure
