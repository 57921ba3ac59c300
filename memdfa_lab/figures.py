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
import PIL.Image
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from memdfa_lab.files import written_whole
from memdfa_lab.memory.trace import readable

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

    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    pixels = PIL.Image.open(drawn).convert("RGB")
    pixels.quantize(255, dither=PIL.Image.Dither.NONE).save(data, "png", optimize=True)  # notebooks stay small
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
# What rests between steps, and beside it what a rule's step adds: column -> label, look
RESTING: dict[str, tuple[str, dict[str, Any]]] = {
    "parameters": ("weights and biases", {"color": "#0072B2", "linestyle": "--", "marker": "P"}),
    "optimizer state": ("optimizer state", {"color": "#999999", "linestyle": (0, (5, 1)), "marker": "X"}),
    "feedback": ("stored B", {"color": "#CC79A7", "linestyle": ":", "marker": "*"}),
    **{f"peak {rule}": (f"peak above rest, {label}", style) for rule, (label, style) in STYLES.items()},
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
        panels[0][0].set_ylim(bottom=0)  # once all are drawn: it also fixes the top of the axis they share
        for row in panels:
            row[0].set_ylabel("above rest (MiB)")
        together = pd.concat({label: _alive(table) for label, table in timelines.items()})
        _legend_below(figure, _visible(together.max(), max(table["total_bytes"].max() for table in timelines.values())))
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
        _legend_below(figure, list(looks))
    plt.close(figure)
    return figure


def _legend_below(figure: Figure, categories: list[str]) -> None:
    looks = [FILLS[name] for name in categories]
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor="white") for color, hatch in looks]
    figure.legend(handles, categories, loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=1.4)


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
        _logarithmic(axes, sorted(set(table[x])), xlabel)
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
        _logarithmic(axes, list(table[x]), xlabel)
    plt.close(figure)
    return figure


def _logarithmic(axes: Any, ticks: list[Any], xlabel: str) -> None:
    """Give both axes logarithmic scales with plain numbers, and put the legend beside them."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel)
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, handlelength=3.5, loc="center left", bbox_to_anchor=(1.0, 0.5))


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
        _legend_below(figure, _visible(parts.max(), parts.sum(axis=1).max()))
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
            axes.set(title=f"{network}, batch {batch_size}", xscale="log")
            axes.set(xlabel="peak above rest (MiB)", ylabel="step time / BP's")
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


# --------------------------------------------------------------------------------------------------- explorer

# What rests, below what a step adds
FILLS_AT_REST = {
    "parameters": ("#dddddd", ""),
    "buffers": ("#bbbbbb", "||"),
    "optimizer state": FILLS["optimizer state"],
    "feedback": FILLS["feedback"],
    "input": ("#009E73", "--"),
}


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
        _logarithmic(axes, [1, 10, 100, 1000], "hidden layers")
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


# -------------------------------------------------------------------------------------- convolutional networks


def signal_images(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw feature maps as grey images, a row a label and a column a channel; zero is the middle grey.

    `rows`: label -> array (channels, H, W). Each row has its own scale, from -1 to 1 times its largest number.
    """
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        channels = max(map(len, rows.values()))
        size = (8, 8 / (channels + 1.5) * len(rows) + 0.3)
        figure, panels = plt.subplots(len(rows), channels, figsize=size, layout="constrained", squeeze=False)
        for line, (label, maps) in zip(panels, rows.items(), strict=True):
            largest = float(np.abs(maps).max())
            for channel, axes in enumerate(line):
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if channel < len(maps):
                    axes.imshow(maps[channel], cmap="gray", vmin=-largest, vmax=largest, interpolation="nearest")
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for channel, axes in enumerate(panels[0], 1):
            axes.set_title(f"channel {channel}", fontsize=9)
    plt.close(figure)
    return figure


def block_angles(table: pd.DataFrame) -> Figure:
    """Draw an angle for each block, a panel a network and a mark a rule, hollow before training and filled after it.

    `table` has the columns network, rule, block, layer (what the block begins with), before_deg and after_deg.
    """
    with plt.rc_context(SETTINGS):
        networks = list(table.groupby("network", sort=False))
        figure, panels = plt.subplots(
            1, len(networks), figsize=(8, 3.4), layout="constrained", squeeze=False, sharey=True
        )
        for axes, (network, rows) in zip(panels.flat, networks, strict=True):
            rules = list(rows.groupby("rule", sort=False))
            for at, (rule, blocks) in enumerate(rules):
                label, style = STYLES[str(rule)]
                look: Any = {"color": style["color"], "marker": style["marker"], "markersize": 8, "linestyle": ""}
                x = blocks["block"] + 0.22 * (at - (len(rules) - 1) / 2)
                axes.vlines(x, blocks["after_deg"], blocks["before_deg"], color=style["color"], lw=1.5)
                axes.plot(x, blocks["before_deg"], markerfacecolor="white", label=f"{label}, before", **look)
                axes.plot(x, blocks["after_deg"], label=f"{label}, after", **look)
            axes.axhline(90, color="black", lw=1, ls=":")
            ticks = rows.drop_duplicates("block")
            axes.set_xticks(ticks["block"], labels=ticks["block"].astype(str) + "\n" + ticks["layer"])
            axes.set(title=network, xlabel="block", xlim=(0.5, ticks["block"].max() + 0.5), ylim=(-4, 100))
        panels[0][0].set_ylabel("angle to BP's signal (degrees)")
        panels[0][0].legend(frameon=False, fontsize=9, loc="lower left")
    plt.close(figure)
    return figure


# --------------------------------------------------------------------------------------------------- feedback

LOOKS: list[dict[str, Any]] = [  # for what is no rule, in the order in which it comes
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "^"},
    {"color": "#009E73", "linestyle": "-.", "marker": "s"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
]


def alignment(table: pd.DataFrame, angle: str = "gradient_deg", xlabel: str = "steps") -> Figure:
    """Draw angles to BP against steps, a panel a block: the mean over seeds in a band from the least to the largest.

    `table` has the columns rule (or any other name of a run), seed, step, block, and the one named by `angle`.
    """
    with plt.rc_context(SETTINGS):
        blocks = list(table.groupby("block"))
        columns = min(len(blocks), 3)
        rows = math.ceil(len(blocks) / columns)
        size = (8, 2.7 * rows + 0.5)
        figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes in panels.flat[len(blocks) :]:
            axes.remove()
        runs = list(dict.fromkeys(table["rule"]))
        styles = {run: STYLES.get(run, (run, LOOKS[at % len(LOOKS)])) for at, run in enumerate(runs)}
        for axes, (block, taught) in zip(panels.flat, blocks, strict=False):
            for run in runs:
                label, style = styles[run]
                _draw_band(axes, taught[taught["rule"] == run].set_index("step")[angle], label, style)
            axes.axhline(90, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            axes.set(title=f"block {block}", xlabel=xlabel)
            axes.set_yticks([0, 30, 60, 90, 120, 150, 180])
        panels[0][0].set_ylim(-4, max(100, 5 + table[angle].max()))
        for row in panels:
            row[0].set_ylabel("angle to BP (degrees)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False, "handlelength": 3.5}
        figure.legend(handles, labels, **place)
    plt.close(figure)
    return figure


def _draw_band(axes: Any, values: "pd.Series[float]", label: str, style: dict[str, Any]) -> None:
    """Draw the mean of the values at each place of the index, in a band from the least to the largest."""
    at = values.groupby(level=0)
    axes.plot(at.mean(), label=label, **style)
    axes.fill_between(at.min().index, at.min(), at.max(), color=style["color"], alpha=0.15, lw=0)


def balance(table: pd.DataFrame) -> Figure:
    """Draw the linear network by hand: what is balanced, the angle of the signals and the loss, against steps.

    `table` has the columns start (the size of the first weights), step, product and norm (what has come to 2 <W_2, B>
    and to |W_1|^2 since step 0), angle_deg and loss.
    """
    with plt.rc_context(SETTINGS):
        figure, panels = plt.subplots(1, 3, figsize=(8, 3.2), layout="constrained")
        for look, (start, run) in zip(LOOKS, table.groupby("start"), strict=False):
            style = {name: value for name, value in look.items() if name != "marker"}
            rings: Any = {
                "marker": "o",
                "markevery": max(1, len(run) // 10),
                "markerfacecolor": "none",
                "linestyle": "",
            }
            panels[0].plot(run["step"], run["product"], **style)
            panels[0].plot(run["step"], run["norm"], color=style["color"], **rings)
            panels[1].plot(run["step"], run["angle_deg"], **style)
            panels[2].plot(run["step"], run["loss"], label=f"first weights × {start:g}", **style)
        panels[0].set(title="lines: 2⟨W₂, B⟩, rings: |W₁|²", ylabel="since the first step")
        panels[1].set(title="between e B and e W₂", ylabel="angle (degrees)", ylim=(0, 100))
        panels[1].axhline(90, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        panels[1].set_yticks([0, 30, 60, 90])
        panels[2].set(title="loss", yscale="log")
        for axes in panels:
            axes.set_xlabel("steps")
            axes.title.set_fontsize(10)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, handlelength=3.5)
    plt.close(figure)
    return figure


def spectrum(table: pd.DataFrame, classes: int, width: int) -> Figure:
    """Draw singular values of B, C x n, over sqrt(n) and the entries' standard deviation; grey: Marchenko and Pastur.

    Left, how they are spread at n = `width`; right, the least and the largest (means over the draws) against n.
    `table` has the columns distribution, width, draw and value.
    """
    with plt.rc_context(SETTINGS):
        figure, (spread, edges) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
        # of values v = sqrt(l), l an eigenvalue of B B^T / (n variance): density 2 v p(l), l in (1 +- sqrt(C / n))^2
        ratio = classes / width
        low, high = 1 - math.sqrt(ratio), 1 + math.sqrt(ratio)
        v = np.linspace(max(low, 1e-9), high, 400)
        density = np.sqrt(np.maximum((high**2 - v**2) * (v**2 - low**2), 0)) / (np.pi * ratio * v)
        spread.fill_between(v, density, color="#cccccc", lw=0)
        widths = np.geomspace(table["width"].min(), table["width"].max(), 100)
        edges.fill_between(widths, 1 - np.sqrt(classes / widths), 1 + np.sqrt(classes / widths), color="#cccccc", lw=0)
        for look, (name, drawn) in zip(LOOKS, table.groupby("distribution", sort=False), strict=False):
            values = drawn.loc[drawn["width"] == width, "value"]
            line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.4}
            if np.ptp(values) < 1e-3:
                spread.axvline(values.mean(), **line)  # all alike
            else:
                heights, bins = np.histogram(values, np.arange(0, values.max() + 0.04, 0.04), density=True)
                spread.stairs(heights, bins, baseline=None, **line)
            extremes = drawn.groupby(["width", "draw"])["value"].agg(["min", "max"]).groupby("width").mean()
            edges.plot(extremes["max"], label=name, **look)
            edges.plot(extremes["min"], **look)
        spread.set(xlabel="singular value of B / (σ √n)", ylabel="density", title=f"C = {classes}, n = {width}")
        spread.set_xlim(max(0, low - 0.2), high + 0.2)
        edges.set(xlabel="n, outputs of the block", ylabel="least and largest / (σ √n)", xscale="log", ylim=(0, None))
        ticks = sorted(set(table["width"]))
        edges.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        edges.xaxis.set_minor_locator(NullLocator())
        edges.set_title(f"C = {classes}")
        handles, labels = edges.get_legend_handles_labels()
        handles.append(Rectangle((0, 0), 1, 1, facecolor="#cccccc"))
        place: Any = {"loc": "outside lower center", "ncols": 5, "frameon": False, "handlelength": 2.5, "fontsize": 9}
        figure.legend(handles, [*labels, "Marchenko–Pastur"], **place)
    plt.close(figure)
    return figure


def against_scale(table: pd.DataFrame, references: Mapping[str, float]) -> Figure:
    """Draw accuracy (left) and each block's angle to BP (right) against the scale of B.

    Means over seeds, in a band from the least to the largest. `table` has the columns scale, seed, block, gradient_deg
    and accuracy, the same in all rows of a run; `references`: label -> accuracy, drawn as level lines.
    """
    with plt.rc_context(SETTINGS):
        figure, (right, angle) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
        runs = table.drop_duplicates(["scale", "seed"])
        _draw_band(right, 100 * runs.set_index("scale")["accuracy"], "", {**LOOKS[0], "color": "black"})
        for label, accuracy in references.items():
            right.axhline(100 * accuracy, color="#777777", linewidth=1.2, linestyle=(0, (4, 2)))
            place: Any = {"xycoords": ("axes fraction", "data"), "va": "top", "fontsize": 9}
            right.annotate(label, (0.08, 100 * accuracy - 1), **place)
        for look, (block, taught) in zip(LOOKS, table.groupby("block"), strict=False):
            _draw_band(angle, taught.set_index("scale")["gradient_deg"], f"block {block}", look)
        angle.axhline(90, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        angle.set_yticks([0, 30, 60, 90, 120, 150, 180])
        angle.set_ylim(0, max(100, 5 + table["gradient_deg"].max()))
        right.set(xscale="log", xlabel="scale of B", ylabel="accuracy (%)", ylim=(0, 100))
        angle.set(xscale="log", xlabel="scale of B", ylabel="angle to BP (degrees)")
        angle.legend(frameon=False, handlelength=3.5, fontsize=9)
    plt.close(figure)
    return figure


# ------------------------------------------------------------------------------------------------------ paper


def training_curves(table: pd.DataFrame) -> Figure:
    """Draw a row an experiment: loss and test error against epochs, test error against seconds of training.

    Means over seeds, in a band from the least to the largest. `table` has the columns experiment, rule, seed, epoch,
    loss, test_accuracy and seconds (of the epoch).
    """
    with plt.rc_context(SETTINGS):
        experiments = list(table.groupby("experiment", sort=False))
        size = (8, 2.5 * len(experiments) + 0.5)
        figure, panels = plt.subplots(len(experiments), 3, figsize=size, layout="constrained", squeeze=False)
        handles: dict[Any, Any] = {}
        for row, (experiment, runs) in zip(panels, experiments, strict=True):
            runs = runs.assign(error=100 * (1 - runs["test_accuracy"]))
            runs = runs.assign(elapsed=runs.groupby(["rule", "seed"])["seconds"].cumsum())
            for rule, rows in runs.groupby("rule", sort=False):
                label, style = STYLES[str(rule)]
                style = style | {"markevery": max(1, rows["epoch"].max() // 6)}
                _draw_band(row[0], rows.set_index("epoch")["loss"], label, style)
                _draw_band(row[1], rows.set_index("epoch")["error"], label, style)
                means = rows.groupby("epoch")[["elapsed", "error"]].mean()
                row[2].plot(means["elapsed"], means["error"], label=label, **style)
            handles |= {line.get_label(): line for line in row[0].lines}
            row[0].set(title=experiment, xlabel="epoch", ylabel="training loss")
            row[1].set(xlabel="epoch", ylabel="test error (%)")
            row[2].set(xlabel="seconds of training", ylabel="test error (%)")
            for axes in row:
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.set_ylim(bottom=0)
                axes.title.set_fontsize(10)
        names = [label for label, _ in STYLES.values() if label in handles]
        place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False, "handlelength": 3.5}
        figure.legend([handles[name] for name in names], names, **place)
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
            _logarithmic(axes, [2, 20, 200], "layers")
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
