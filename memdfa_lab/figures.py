"""One function a figure; each takes plain tables and returns a matplotlib Figure. Units are on the axes.

Colours are Okabe and Ito's, safe for colour-blind eyes; each rule has its own line style and marker besides, so that a
grey print can be read.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from memdfa_lab.files import written_whole

# rule -> name in a legend, colour, line style, marker. DFA is wide and pale, so that MEM-DFA is seen on top of it.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("BP", {"color": "#000000", "linestyle": "-", "marker": "o"}),
    "fa": ("FA", {"color": "#E69F00", "linestyle": "--", "marker": "s"}),
    "dfa": ("DFA", {"color": "#56B4E9", "linestyle": "-", "marker": "D", "linewidth": 4.5, "markersize": 7}),
    "memdfa": ("MEM-DFA", {"color": "#D55E00", "linestyle": "-.", "marker": "^"}),
    "checkpoint": ("BP, checkpointing", {"color": "#009E73", "linestyle": ":", "marker": "v"}),
    "step_in_backward": ("BP, step in backward", {"color": "#CC79A7", "linestyle": (0, (5, 1)), "marker": "P"}),
    "checkpoint_step_in_backward": ("BP, both of these", {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "X"}),
    "last_layer": ("last layer only", {"color": "#999999", "linestyle": "--", "marker": "*"}),
}
SETTINGS: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "memdfa_lab",  # the same figure gives the same file
    "figure.dpi": 100,
}


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write the figure beside each other as svg and png, whole or not at all; `path` has no suffix."""
    written = [Path(path).with_suffix(f".{kind}") for kind in ("svg", "png")]
    with plt.rc_context(SETTINGS):
        for file in written:
            kind = file.suffix[1:]
            with written_whole(file) as out:
                # A date would make the same figure another file each day.
                figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return written


def picture(figure: Figure, alt: str) -> Any:
    """Return the figure as a picture for a notebook, sharp on any screen, with a text in place of it."""
    from IPython.display import Image

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    width = round(figure.get_figwidth() * 100)
    return Image(data.getvalue(), width=width, alt=alt)


def images(data: Any) -> Figure:
    """Draw the first training image of each class, as it was before normalisation (`data`: `ml.datasets.Data`)."""
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        figure, panels = plt.subplots(1, data.classes, figsize=(8, 1.1), layout="constrained")
        for label, axes in enumerate(panels):
            image = data.x_train[data.y_train == label][0] + data.mean / data.pixel_range
            low, high = image.min(), image.max()
            axes.imshow(((image - low) / (high - low)).movedim(0, -1).squeeze(-1), cmap="gray")
            axes.set_title(label)
            axes.axis("off")
    plt.close(figure)
    return figure


def learning_curves(table: pd.DataFrame) -> Figure:
    """Draw training loss and test error against epochs, the mean over seeds in a band from the least to the largest.

    `table` has the columns rule, seed, epoch, loss, test_accuracy (`ml.experiments.compare`).
    """
    with plt.rc_context(SETTINGS):
        figure, (loss, error) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        table = table.assign(error=100 * (1 - table["test_accuracy"]))
        for rule, runs in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            for axes, column in ((loss, "loss"), (error, "error")):
                epochs = runs.groupby("epoch")[column]
                axes.plot(epochs.mean(), label=label, **style)
                axes.fill_between(
                    epochs.min().index, epochs.min(), epochs.max(), color=style["color"], alpha=0.15, lw=0
                )
        loss.set(xlabel="epoch", ylabel="training loss (mean over the epoch)")
        error.set(xlabel="epoch", ylabel="test error (%)")
        for axes in (loss, error):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(bottom=0)
        loss.legend(frameon=False, handlelength=3.5)
    plt.close(figure)
    return figure


def confusion(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Draw one confusion matrix a rule, counts with true classes down; the diagonal is left out of the colours."""
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        rows = math.ceil(len(matrices) / 2)
        figure, panels = plt.subplots(rows, 2, figsize=(8, 4 * rows), layout="constrained", squeeze=False)
        for axes in panels.flat[len(matrices) :]:
            axes.remove()
        wrong = {rule: matrix - np.diag(np.diag(matrix)) for rule, matrix in matrices.items()}
        top = max(1, *(int(matrix.max()) for matrix in wrong.values()))
        for axes, (rule, matrix) in zip(panels.flat, matrices.items(), strict=False):
            sns.heatmap(
                wrong[rule],
                ax=axes,
                cmap="Greys",
                vmin=0,
                vmax=top,
                cbar=False,
                square=True,
                annot=matrix,
                fmt="d",
                annot_kws={"size": 8},
                linewidths=0.5,
                linecolor="#dddddd",
            )
            axes.set_title(STYLES[rule][0])
            axes.set(xlabel="predicted digit", ylabel="true digit")
            axes.tick_params(length=0)
    plt.close(figure)
    return figure


# ----------------------------------------------------------------------------------------------------- memory

# category -> colour (Okabe and Ito) and hatch, in the order in which they are stacked
FILLS = {
    "optimizer state": ("#999999", ""),
    "feedback": ("#F0E442", "xx"),
    "activations": ("#0072B2", ""),
    "error": ("#E69F00", "//"),
    "gradients": ("#D55E00", "\\\\"),
    "workspace": ("#CC79A7", ".."),
}
MIB = 2**20


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
        for row in panels:
            row[0].set_ylabel("above rest (MiB)")
        handles = [Rectangle((0, 0), 1, 1, facecolor=c, hatch=h, edgecolor="white") for c, h in FILLS.values()]
        figure.legend(handles, FILLS, loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=1.4)
    plt.close(figure)
    return figure


def _draw_profile(axes: Any, label: str, table: pd.DataFrame) -> None:
    position = np.arange(len(table))
    bottom = np.zeros(len(table))
    for category, (color, hatch) in FILLS.items():
        alive = table["bytes"].where(table["category"] == category, 0).cumsum().to_numpy() / MIB
        if alive.any():
            top = bottom + alive
            axes.fill_between(position, bottom, top, step="post", facecolor=color, hatch=hatch, edgecolor="white", lw=0)
            bottom = top
    total = table["total_bytes"].to_numpy() / MIB
    peak = int(total.argmax())
    axes.plot(peak, total[peak], marker="v", color="black", markersize=6, clip_on=False)
    side = "left" if peak < len(table) / 2 else "right"
    axes.annotate(f" {total[peak]:.2f} MiB ", (peak, total[peak]), ha=side, va="bottom", fontsize=9)
    shades = {"forward": "#eeeeee", "error": "#bbbbbb", "update": "#e4e4e4"}
    for name, start, stop in _spans(list(table["phase"])):
        axes.axvspan(start, stop, color=shades.get(name, "#f8f8f8"), zorder=-2, lw=0)
        if stop - start > len(table) / 9:
            middle = (start + stop) / 2
            axes.text(middle, 0.98, name, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    axes.set(title=label, xlabel="births and frees, in order", xlim=(0, len(table) - 1))
    axes.margins(y=0.25)
    axes.set_ylim(bottom=0)


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


def peak_against(table: pd.DataFrame, x: str, xlabel: str) -> Figure:
    """Draw peaks above rest against depth, batch or width, a line a rule, both axes logarithmic.

    `table` has the columns rule, peak_bytes and the one named by `x`.
    """
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            axes.plot(rows[x], rows["peak_bytes"] / MIB, label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="peak above rest (MiB)")
        axes.legend(frameon=False, fontsize=9, handlelength=3.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
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
        for category, (color, hatch) in FILLS.items():
            if category in table and table[category].any():
                width = table[category].fillna(0).to_numpy() / MIB
                axes.barh(labels, width, left=left, color=color, hatch=hatch, edgecolor="white", label=category)
                left += width
        for at, total in enumerate(left):
            axes.text(total, at, f" {total:.2f}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("at the peak, above rest (MiB)")
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=1.4)
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
                label, style = STYLES[rule]
                label += ", B stored" if feedback == "stored" else ""
                error = [points["ratio"] - points["ratio_low"], points["ratio_high"] - points["ratio"]]
                look = {"color": style["color"], "marker": style["marker"], "markersize": 7, "elinewidth": 1}
                look |= {"linestyle": style["linestyle"] if len(points) > 1 else "", "linewidth": 1.2}
                look |= {"markerfacecolor": "white"} if feedback == "stored" else {}
                handles[label] = axes.errorbar(points["peak_bytes"] / MIB, points["ratio"], yerr=error, **look)
            axes.set(title=f"{network}, batch {batch_size}", xscale="log")
            axes.set(xlabel="peak above rest (MiB)", ylabel="step time / BP's")
            axes.set_ylim(bottom=0)
            axes.title.set_fontsize(10)
        place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}
        figure.legend(handles.values(), handles.keys(), **place)
    plt.close(figure)
    return figure


def keep_frontier(table: pd.DataFrame) -> Figure:
    """Draw step time against peak as MEM-DFA keeps more, beside checkpointing with more segments.

    `table` has the columns rule, setting, peak_bytes and ratio (to BP's time).
    """
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            axes.plot(rows["peak_bytes"] / MIB, rows["ratio"], label=label, **style)
        axes.set(xscale="log", xlabel="peak above rest (MiB)", ylabel="step time / BP's")
        axes.legend(frameon=False, fontsize=9, handlelength=3.5)
    plt.close(figure)
    return figure
