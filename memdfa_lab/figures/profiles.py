"""One step of each rule over time: what is held at each moment, and how long each tensor is."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.core.checks import lookup
from memdfa_lab.figures.needs import needs
from memdfa_lab.figures.style import FILLS, FILLS_AT_REST, HATCHED, MIB, legend_below, two_a_row, visible
from memdfa_lab.memory.trace import readable

TURNS = ("recompute", "backward", "learn", "update")  # phases that blocks go through one after another


@needs("phase", "category", "bytes", "total_bytes", each=True)
def memory_profiles(timelines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw one step of each rule: bytes above rest, stacked by category, against operations, the peak marked.

    `timelines`: label -> `Trace.timeline`, of which phase, category, bytes and total_bytes are drawn. Phases are
    shaded and named; the vertical axis is shared.
    """
    with plt.rc_context(HATCHED):
        figure, panels = two_a_row(len(timelines), 2.6, sharey=True)
        held = {label: _alive(table) for label, table in timelines.items()}
        for axes, (label, table) in zip(panels, timelines.items(), strict=True):
            total = _draw_stack(axes, label, held[label], table["phase"])
            peak = int(total.argmax())
            _mark_peak(axes, total, f"{total[peak]:.2f} MiB")
            axes.set(xlabel="births and frees, in order")
            axes.margins(y=0.25)
        panels[0].set_ylim(bottom=0)  # once all are drawn: it also fixes the top of the axis they share
        for axes in panels[::2]:
            axes.set_ylabel("above rest (MiB)")
        most = max(table["total_bytes"].max() for table in timelines.values())
        legend_below(figure, visible(pd.concat(held).max(), most))
    plt.close(figure)
    return figure


@needs("phase", each=True, one_of={**FILLS_AT_REST, **FILLS})
def step_profiles(steps: Mapping[str, pd.DataFrame], ylabel: str) -> Figure:
    """Draw one step of each rule, bytes stacked by category, the peak marked; the vertical axis is shared.

    `steps`: label -> a row a moment, with the column phase and a column of bytes a category, the lowest first.
    """
    for name in {name: None for table in steps.values() for name in table.columns.drop("phase")}:
        lookup("category", name, {**FILLS_AT_REST, **FILLS})
    top = max(table.drop(columns="phase").sum(axis=1).max() for table in steps.values()) / MIB
    with plt.rc_context(HATCHED):
        columns = min(len(steps), 2)
        figure, panels = two_a_row(len(steps), 2.1, columns, width=7.5, sharey=True)
        for panel, (axes, (label, table)) in enumerate(zip(panels, steps.items(), strict=True)):
            total = _draw_stack(axes, label, table.drop(columns="phase"), table["phase"])
            _mark_peak(axes, total, readable(total.max() * MIB))
            axes.set(xticks=[], ylim=(0, 1.3 * top))
            axes.set_xlabel("births and frees, in order" if panel >= len(steps) - columns else "")
            axes.yaxis.set_major_formatter("{x:,g}")
        for axes in panels[::columns]:
            axes.set_ylabel(ylabel)
        shown = {name for table in steps.values() for name in table.columns}
        legend_below(figure, [name for name in {**FILLS_AT_REST, **FILLS} if name in shown], columns=5)
    plt.close(figure)
    return figure


@needs("storage", "phase", "block", "category", "bytes", each=True)
def lifetimes(timelines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how long what a step makes is held, a row a block: a bar from birth to end for each of its tensors.

    `timelines`: label -> `Trace.timeline`, of which storage, phase, block, category and bytes are drawn. Wide bars are
    activations, narrow ones above and below their middle signals and gradients; the row above the last block has what
    the loss makes, e with it. Single numbers are left out.
    """
    looks = {"activations": (0.0, 0.8), "error": (0.2, 0.3), "gradients": (-0.2, 0.3)}  # middle, height
    shown = {}
    for label, table in timelines.items():
        large = table.groupby("storage")["bytes"].transform("first") > 8
        shown[label] = table[large & table["category"].isin(looks)].reset_index(drop=True)
        if shown[label]["block"].isna().all():
            raise ValueError(f"timelines[{label!r}] has no tensor of a block: it needs a `Trace.timeline` of a step")
    with plt.rc_context(HATCHED):
        figure, panels = two_a_row(len(timelines), 2.6, sharey=True)
        for axes, (label, drawn) in zip(panels, shown.items(), strict=True):
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
        for axes in panels[::2]:
            axes.set_ylabel("block")
        legend_below(figure, list(looks))
    plt.close(figure)
    return figure


def _alive(timeline: pd.DataFrame) -> pd.DataFrame:
    """Return a column a category: the bytes alive after each event."""
    return pd.DataFrame({name: timeline["bytes"].where(timeline["category"] == name, 0).cumsum() for name in FILLS})


def _draw_stack(axes: Any, label: str, held: pd.DataFrame, phases: pd.Series) -> np.ndarray:
    """Draw a column of bytes a category on top of each other, and the phases behind; return the total in MiB."""
    fills = {**FILLS_AT_REST, **FILLS}
    position, total = np.arange(len(held)), np.zeros(len(held))
    for category, alive in held.items():
        (color, hatch), above = fills[str(category)], total + alive.to_numpy() / MIB
        if alive.any():
            axes.fill_between(
                position, total, above, step="post", facecolor=color, hatch=hatch, edgecolor="white", lw=0
            )
            total = above
    _shade_phases(axes, list(phases))
    axes.set(title=label, xlim=(0, len(held) - 1))
    return total


def _mark_peak(axes: Any, total: np.ndarray, text: str) -> None:
    peak = int(total.argmax())
    axes.plot(peak, total[peak], marker="v", color="black", markersize=6, clip_on=False)
    side = "left" if peak < len(total) / 2 else "right"
    axes.annotate(f" {text} ", (peak, total[peak]), ha=side, va="bottom", fontsize=9)


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
    first = next((i for i, span in enumerate(spans) if span[0] in TURNS), len(spans))
    turns = spans[first:]
    if len(turns) > 2:
        names = [name for name in TURNS if name in {turn[0] for turn in turns}]
        turns = [(" + ".join(names), turns[0][1], turns[-1][2])]
    return [*spans[:first], *turns]
