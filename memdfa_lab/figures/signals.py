"""Feedback and what comes of it: B and signals as images, spectra, angles to BP's gradient."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from memdfa_lab.core.checks import check_int, check_number, check_type
from memdfa_lab.figures.needs import check_numbers, check_table, labelled, needs
from memdfa_lab.figures.style import BELOW, SETTINGS, STYLES

LOOKS: list[dict[str, Any]] = [  # for what is no rule, in the order in which it comes
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "^"},
    {"color": "#009E73", "linestyle": "-.", "marker": "s"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
]


def signal_images(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw feature maps as grey images, a row a label and a column a channel; zero is the middle grey.

    `rows`: label -> array (channels, H, W). Each row has its own scale, from -1 to 1 times its largest number.
    """
    for label, maps in labelled("rows", rows).items():
        check_numbers(f"rows[{label!r}]", maps, "channels", "H", "W")
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


@needs("network", "rule", "block", "layer", "before_deg", "after_deg")
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
            axes.set_xticks(ticks["block"], labels=ticks["block"].astype(str) + "\n" + ticks["layer"].astype(str))
            axes.set(title=network, xlabel="block", xlim=(0.5, ticks["block"].max() + 0.5), ylim=(-4, 100))
        panels[0][0].set_ylabel("angle to BP's signal (degrees)")
        panels[0][0].legend(frameon=False, fontsize=9, loc="lower left")
    plt.close(figure)
    return figure


@needs("rule", "step", "block", "{angle}", rules={})
def alignment(table: pd.DataFrame, angle: str = "gradient_deg", xlabel: str = "steps") -> Figure:
    """Draw angles to BP against steps, a panel a block: the mean over seeds in a band from the least to the largest.

    `table` has the columns rule (or any other name of a run), step, block, and the one named by `angle`.
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
            axes.xaxis.get_major_locator().set_params(integer=True)
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


@needs("start", "step", "product", "norm", "angle_deg", "loss")
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


@needs("distribution", "width", "draw", "value")
def spectrum(table: pd.DataFrame, classes: int, width: int) -> Figure:
    """Draw singular values of B, C x n, over sqrt(n) and the entries' standard deviation; grey: Marchenko and Pastur.

    Left, how they are spread at n = `width`; right, the least and the largest (means over the draws) against n.
    `table` has the columns distribution, width, draw and value. Raises ValueError if a distribution lacks that width.
    """
    check_int("classes", classes)
    check_int("width", width)
    for name, drawn in table.groupby("distribution"):
        if width not in set(drawn["width"]):
            raise ValueError(f"table has no row of {name} with width {width}: choose a width that all are drawn at")
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


def feedback(
    values: np.ndarray,
    own: np.ndarray,
    grid: np.ndarray,
    theory: np.ndarray | None,
    angles: pd.DataFrame,
    title: str,
    steps: int,
) -> Figure:
    """Draw the spectrum of B beside theory (left), and angles to BP against steps (right), a line a run.

    `values`: singular values of B and others drawn as it is, `own` those of B, both over the entries' deviation and
    root of n; `theory`: their density on `grid`, None if all are to be alike. `angles` has the columns run, step and
    angle_deg, or is empty; its axis goes to `steps`.
    """
    for what, numbers in (("values", values), ("own", own), ("grid", grid)):
        check_numbers(what, numbers, "N")
    check_type("angles", angles, pd.DataFrame, "a pandas table")
    if len(angles):
        check_table("angles", angles, ["run", "step", "angle_deg"])
    with plt.rc_context(SETTINGS):
        figure, (spread, angle) = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
        if theory is not None:
            spread.fill_between(grid, theory, color="#cccccc", lw=0, label="Marchenko–Pastur")
            heights, bins = np.histogram(values, np.linspace(0, grid[-1], 40), density=True)
            spread.stairs(heights, bins, baseline=None, color="#0072B2", linewidth=1.6, label="drawn")
            top = 1.3 * max(heights.max(), theory.max())
        else:
            spread.axvline(values.mean(), color="#cccccc", linewidth=6, label="orthogonal: all alike")
            top = 1.0
        spread.plot(own, np.full(len(own), 0.03 * top), "|", color="#D55E00", markersize=12, label="this B")
        spread.set(xlabel="singular value of B / (σ √n)", ylabel="density", title=title, xlim=(0, grid[-1]))
        spread.set_ylim(0, top)
        spread.title.set_fontsize(10)
        spread.legend(frameon=False, fontsize=8, loc="upper left")
        for look, (run, rows) in zip(LOOKS, angles.groupby("run", sort=False) if len(angles) else (), strict=False):
            angle.plot(rows["step"], rows["angle_deg"], label=run, **look | {"markevery": 4})
        angle.axhline(90, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        angle.set(xlabel="steps", ylabel="angle to BP (degrees)", xlim=(0, steps), ylim=(-4, 124))
        angle.set_yticks([0, 30, 60, 90, 120])
        handles, labels = angle.get_legend_handles_labels()
        figure.legend(handles, labels, ncols=3, handlelength=3, **BELOW)
    plt.close(figure)
    return figure


@needs("scale", "seed", "block", "gradient_deg", "accuracy")
def against_scale(table: pd.DataFrame, references: Mapping[str, float]) -> Figure:
    """Draw accuracy (left) and each block's angle to BP (right) against the scale of B.

    Means over seeds, in a band from the least to the largest. `table` has the columns scale, seed, block, gradient_deg
    and accuracy, the same in all rows of a run; `references`: label -> accuracy, drawn as level lines.
    """
    check_type("references", references, Mapping, "a dict, label -> accuracy")
    for label, accuracy in references.items():
        check_number(f"references[{label!r}]", accuracy)
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
