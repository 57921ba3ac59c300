"""Images, of data and of signals; the angles of signals; the spectrum of random feedback."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.core.checks import check_int
from memdfa_lab.figures.inputs import check_array, check_dict, draws
from memdfa_lab.figures.lines import draw_lines, logarithmic, looks_of, right_angle
from memdfa_lab.figures.style import STYLES, legend, panels
from memdfa_lab.lab.datasets import check_data


@draws()
def images(data: Any) -> Figure:
    """Draw the first training image of each class, as it was before normalisation (`data`: `ml.datasets.Data`).

    Raises ValueError if a class has none.
    """
    check_data("images", data)
    for label in range(data.classes):
        if not (data.y_train == label).any():
            raise ValueError(f"there is no training image of class {label}: take a larger part of the data")
    figure, all_axes = panels(data.classes, data.classes, height=0.6, grid=False)
    for label, axes in enumerate(all_axes):
        image = data.x_train[data.y_train == label][0] + data.mean / data.pixel_range
        low, high = image.min(), image.max()
        axes.imshow(((image - low) / (high - low)).movedim(0, -1).squeeze(-1), cmap="gray")
        axes.set_title(label)
        axes.axis("off")
    return figure


@draws()
def signal_images(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw feature maps as grey images, a row a label and a column a channel; zero is the middle grey.

    `rows`: label -> array (channels, H, W). Each row has its own scale, from -1 to 1 times its largest number.
    """
    for label, maps in check_dict("rows", rows).items():
        check_array(f"rows[{label!r}]", maps, "channels", "H", "W")
    columns = max(map(len, rows.values()))
    figure, all_axes = panels(len(rows) * columns, columns, height=8 / (columns + 1.5), grid=False)
    for axes in all_axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for row, (label, maps) in enumerate(rows.items()):
        largest = float(np.abs(maps).max())
        line = all_axes[row * columns : (row + 1) * columns]
        for axes, image in zip(line, maps, strict=False):
            axes.imshow(image, cmap="gray", vmin=-largest, vmax=largest, interpolation="nearest")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for channel, axes in enumerate(all_axes[:columns], 1):
        axes.set_title(f"channel {channel}", fontsize=9)
    return figure


@draws("network rule layer", "block before_deg after_deg")
def block_angles(table: pd.DataFrame) -> Figure:
    """Draw an angle for each block, a panel a network and a mark a rule, hollow before training and filled after it.

    `table` has the columns network, rule, block, layer (what the block begins with), before_deg and after_deg.
    """
    networks = list(table.groupby("network", sort=False))
    figure, all_axes = panels(len(networks), len(networks), height=3, sharey=True)
    for axes, (network, rows) in zip(all_axes, networks, strict=True):
        rules = rows["rule"].unique()
        for place, rule in enumerate(rules):
            blocks, (label, style) = rows[rows["rule"] == rule], STYLES[rule]
            look: Any = {"color": style["color"], "marker": style["marker"], "markersize": 8, "linestyle": ""}
            x = blocks["block"] + 0.22 * (place - (len(rules) - 1) / 2)
            axes.vlines(x, blocks["after_deg"], blocks["before_deg"], color=style["color"], linewidth=1.5)
            axes.plot(x, blocks["before_deg"], markerfacecolor="white", label=f"{label}, before", **look)
            axes.plot(x, blocks["after_deg"], label=f"{label}, after", **look)
        right_angle(axes)
        ticks = rows.drop_duplicates("block")
        axes.set_xticks(ticks["block"], labels=ticks["block"].astype(str) + "\n" + ticks["layer"].astype(str))
        axes.set(title=network, xlabel="block", xlim=(0.5, ticks["block"].max() + 0.5))
    all_axes[0].set_ylabel("angle to BP's signal (degrees)")
    legend(figure, handlelength=2)
    return figure


def marchenko_pastur(v: Any, C: int, n: int) -> Any:
    """Return the density of the min(C, n) singular values of a large random matrix B, (C, n); its area is 1.

    The entries are independent, with mean 0 and the same standard deviation σ. Source: Marchenko and Pastur 1967, who
    give it for the eigenvalues of B Bᵀ, the squares of the singular values.

    Args:
        v: Where the density is asked for: singular values over σ √n, of any shape.
        C: Rows of B.
        n: Columns of B.

    Returns:
        The density at each v, in the shape of v.
    """
    ratio = C / n
    low, high = abs(1 - math.sqrt(ratio)), 1 + math.sqrt(ratio)
    inside = np.maximum((high**2 - v**2) * (v**2 - low**2), 0)
    return np.sqrt(inside) / (np.pi * min(ratio, 1) * np.maximum(v, 1e-9))


@draws("distribution", "width draw value")
def spectrum(table: pd.DataFrame, classes: int, width: int) -> Figure:
    """Draw singular values of B, C x n, over sqrt(n) and the entries' standard deviation; grey: Marchenko and Pastur.

    Left, how they are spread at one n; right, the least and the largest (means over the draws) against n.

    Args:
        table: The columns distribution, width (n), draw and value.
        classes: C.
        width: The n of the left panel.

    Raises:
        ValueError: If a distribution has no row of that width.
    """
    check_int("classes", classes)
    check_int("width", width)
    for name, drawn in table.groupby("distribution"):
        if width not in set(drawn["width"]):
            raise ValueError(f"table has no row of {name} with width {width}: choose a width that all are drawn at")
    figure, (spread, edges) = panels(2, columns=2, height=3)
    looks = looks_of(table["distribution"])
    v = np.linspace(0, 1.2 + math.sqrt(classes / width), 401)
    n = np.geomspace(table["width"].min(), table["width"].max(), 100)
    spread.fill_between(v, marchenko_pastur(v, classes, width), color="#cccccc", lw=0, label="Marchenko–Pastur")
    edges.fill_between(n, np.abs(1 - np.sqrt(classes / n)), 1 + np.sqrt(classes / n), color="#cccccc", lw=0)
    for name, values in table[table["width"] == width].groupby("distribution")["value"]:
        look: Any = {key: looks[name][1][key] for key in ("color", "linestyle")}
        if np.ptp(values) < 1e-3:
            spread.axvline(values.mean(), **look)  # all alike
        else:
            spread.hist(values, v[::10], density=True, histtype="step", linewidth=1.4, **look)
    extremes = table.groupby(["distribution", "width", "draw"])["value"].agg(["min", "max"])
    extremes = extremes.groupby(["distribution", "width"]).mean().reset_index()
    for end in ("min", "max"):
        draw_lines(edges, extremes, "width", end, "distribution", looks)
    spread.set(xlabel="singular value of B / (σ √n)", ylabel="density", title=f"C = {classes}, n = {width}")
    spread.set_xlim(max(0, abs(1 - math.sqrt(classes / width)) - 0.2), v[-1])
    edges.set(xlabel="n, outputs of the block", ylabel="least and largest / (σ √n)", title=f"C = {classes}")
    logarithmic(edges, "x", table["width"])
    legend(figure)
    return figure
