"""One step of each rule over time: the bytes in memory at each moment, and how long each tensor lives."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.figures.inputs import draws
from memdfa_lab.figures.style import FILLS, MIB, legend_of_fills, panels
from memdfa_lab.memory.trace import readable

TURNS = ("recompute", "backward", "learn", "update")  # phases that blocks go through one after another


@draws("phase category", "bytes", each=True)
def memory_profiles(timelines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw one step of each rule: bytes above rest, stacked by category, against operations, the peak marked.

    `timelines`: label -> `Trace.timeline`, of which phase, category and bytes are drawn. Phases are shaded and named;
    the vertical axis is shared.
    """
    steps = {}
    for label, table in timelines.items():
        alive = {name: table["bytes"].where(table["category"] == name, 0).cumsum() for name in FILLS}
        steps[label] = pd.DataFrame({"phase": table["phase"], **alive})
    figure = draw_steps(steps, "above rest (MiB)", height=2.6)
    held = pd.concat(steps).drop(columns="phase")
    legend_of_fills(figure, held.max(), held.sum(axis=1).max() / 300)  # smaller parts cannot be seen
    return figure


def draw_steps(steps: Mapping[str, pd.DataFrame], ylabel: str, height: float) -> Figure:
    """Draw one panel per step, bytes stacked by category over phases; panels are `height` inches high and share y."""
    columns = min(len(steps), 2)
    figure, all_axes = panels(len(steps), columns, height, sharey=True, grid=False)
    top = pd.concat(steps).drop(columns="phase").sum(axis=1).max()
    for place, (axes, (label, table)) in enumerate(zip(all_axes, steps.items(), strict=True)):
        lower = np.zeros(len(table))
        for name in (name for name in FILLS if name in table and table[name].any()):
            (color, hatch), upper = FILLS[name], lower + table[name].to_numpy() / MIB
            look: Any = {"facecolor": color, "hatch": hatch, "edgecolor": "white", "lw": 0}
            axes.fill_between(np.arange(len(table)), lower, upper, step="post", **look)
            lower = upper
        mark_peak(axes, lower)
        shade_phases(axes, list(table["phase"]))
        axes.set(title=label, xlim=(0, max(1, len(table) - 1)), ylim=(0, max(1.3 * top, 1) / MIB))
        axes.set_xlabel("time (events)" if place >= len(steps) - columns else "")
        axes.set_ylabel(ylabel if place % columns == 0 else "")
        axes.yaxis.set_major_formatter("{x:,g}")
    return figure


@draws("phase category", "storage block bytes", each=True)
def lifetimes(timelines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how long the tensors of a step live, one row per block: a bar from birth to end for each of them.

    `timelines`: label -> `Trace.timeline`, of which storage, phase, block, category and bytes are drawn. Thick bars are
    activations; thin bars are signals (above the middle) and gradients (below it). The row above the last block has the
    tensors of the loss, including e. Time is counted in births and frees, on the same scale in all panels. Single
    numbers are left out. Raises ValueError for a step without blocks.
    """
    bars = {"activations": (0.0, 0.8), "error": (0.2, 0.3), "gradients": (-0.2, 0.3)}  # middle, height
    figure, all_axes = panels(len(timelines), columns=2, height=2.6, sharey=True, grid=False)
    longest = 1
    for place, (axes, (label, table)) in enumerate(zip(all_axes, timelines.items(), strict=True)):
        large = table.groupby("storage")["bytes"].transform("first") > 8
        events = table[large & table["category"].isin(bars)].reset_index(drop=True)
        if events["block"].isna().all():
            raise ValueError(f"timelines[{label!r}] has no tensor of a block: it needs a `Trace.timeline` of a step")
        last = int(events["block"].max()) + 1
        births = events.drop_duplicates("storage")
        ends = births["storage"].map(events.index.to_series().groupby(events["storage"]).last())
        ends = ends.where(ends > births.index, len(events))  # what has no end outlives the step
        for category, (middle, height) in bars.items():
            born, (color, hatch) = births[births["category"] == category], FILLS[category]
            rows, length = born["block"].fillna(last) + 1 + middle, ends[born.index] - born.index
            look: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
            axes.barh(rows, length, height, left=born.index, **look)
        shade_phases(axes, list(events["phase"]))
        axes.set(title=label, xlabel="time (events)", ylim=(0.4, last + 2.6))
        longest = max(longest, len(events))
        axes.set_yticks(range(1, last + 2), labels=[*range(1, last + 1), "loss, e"])
        axes.set_ylabel("block" if place % 2 == 0 else "")
    for axes in all_axes:
        axes.set_xlim(0, longest)
    legend_of_fills(figure, pd.Series(1, index=list(bars)))
    return figure


def mark_peak(axes: Any, total: np.ndarray) -> None:
    """Mark where the total, in MiB, is largest, and write its size there, in MiB unless it is tiny."""
    peak = int(total.argmax())
    axes.plot(peak, total[peak], marker="v", color="black", markersize=6, clip_on=False)
    side = "left" if peak < len(total) / 2 else "right"
    text = f"{total[peak]:,.2f} MiB" if total[peak] >= 0.01 else readable(total[peak] * MIB)
    axes.annotate(f" {text} ", (peak, total[peak]), ha=side, va="bottom", fontsize=9)


def shade_phases(axes: Any, phases: list[str]) -> None:
    """Shade the phases, and write their names where there is room."""
    shades = {"forward": "#eeeeee", "error": "#bbbbbb", "update": "#e4e4e4"}
    for name, start, stop in spans(phases):
        axes.axvspan(start, stop, color=shades.get(name, "#f8f8f8"), zorder=-2, lw=0)
        if stop - start > 0.018 * len(name) * len(phases):
            middle = (start + stop) / 2
            axes.text(middle, 0.98, name, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)


def spans(phases: list[str]) -> list[tuple[str, int, int]]:
    """Return (name, start, stop) of each phase; phases that alternate from block to block count as one."""
    named = pd.Series(phases).replace("local gradient", "learn")
    named = named.where(named != "").ffill().fillna("begin")
    runs = [rows for _, rows in named.groupby((named != named.shift()).cumsum())]
    found = [(str(rows.iloc[0]), int(rows.index[0]), int(rows.index[-1]) + 1) for rows in runs]
    first = next((place for place, span in enumerate(found) if span[0] in TURNS), len(found))
    turns = found[first:]
    if len(turns) > 2:
        names = [name for name in TURNS if name in {turn[0] for turn in turns}]
        turns = [(" + ".join(names), turns[0][1], turns[-1][2])]
    return [*found[:first], *turns]
