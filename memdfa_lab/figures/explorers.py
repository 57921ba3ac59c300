"""The figures that the explorers draw at each change of a control."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.core.checks import check_number, check_type, lookup
from memdfa_lab.figures.inputs import categories_in, check_array, draws, require_columns
from memdfa_lab.figures.lines import draw_lines, from_zero, in_units, lines, logarithmic, looks_of, right_angle
from memdfa_lab.figures.peaks import label_ends
from memdfa_lab.figures.profiles import draw_steps
from memdfa_lab.figures.style import FILLS, MIB, legend, legend_of_fills, panels

# The looks of runs that do not differ in their rule: colours are for rules and for kinds of memory.
GREYS: list[dict[str, Any]] = [
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "#555555", "linestyle": "--", "marker": "^"},
    {"color": "#999999", "linestyle": "-.", "marker": "s"},
]


@draws("rule", "depth bytes")
def peak_at_depth(table: pd.DataFrame, depth: int, ylabel: str, budget_bytes: int | None = None) -> Figure:
    """Draw bytes against depth, one line per rule, both axes logarithmic.

    Args:
        table: The columns rule, depth and bytes; each rule has a row at `depth`.
        depth: The number of layers at which each line is marked.
        ylabel: Name of the vertical axis.
        budget_bytes: Where a horizontal line is drawn; None: no line.
    """
    check_number("depth", depth, or_more=False)
    if budget_bytes is not None:
        check_number("budget_bytes", budget_bytes, or_more=False)
    figure, (axes,) = panels(height=2.9)
    for rule, (label, look) in looks_of(table["rule"]).items():
        rows = table[table["rule"] == rule]
        axes.plot(rows["depth"], in_units(rows, "bytes"), label=label, **look | {"markevery": [0, -1]})
        here = rows[rows["depth"] == depth]
        axes.plot(here["depth"], in_units(here, "bytes"), **look | {"markersize": 9, "markeredgecolor": "black"})
    axes.axvline(depth, color="black", linewidth=0.8, zorder=0)
    axes.text(depth, 1.02, f"{depth:,}", transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    if budget_bytes is not None:
        axes.axhline(budget_bytes / MIB, color="black", linewidth=1, linestyle=(0, (8, 4)), label="budget")
    axes.set(xlabel="hidden layers", ylabel=ylabel)
    logarithmic(axes, "xy", [1, 10, 100, 1000])
    label_ends(axes, [line for line in axes.lines if len(line.get_xdata()) > 1])
    return figure


@draws("phase", each=True)
def step_profiles(steps: Mapping[str, pd.DataFrame], ylabel: str) -> Figure:
    """Draw one step of each rule, bytes stacked by category, the peak marked; the vertical axis is shared.

    `steps`: label -> one row per moment, with the column phase, and the bytes of each category as a column.
    """
    for label, table in steps.items():
        for name in table.columns.drop("phase"):
            lookup("category", name, FILLS)
        categories_in(f"steps[{label!r}]", table)
    figure = draw_steps(steps, ylabel, height=2.1)
    for axes in figure.axes:
        axes.set_xticks([])  # only some moments of a deep step are drawn
    legend_of_fills(figure, pd.concat(steps).drop(columns="phase").max())
    return figure


@draws("rule", "step loss accuracy angle_deg")
def live_curves(table: pd.DataFrame) -> Figure:
    """Draw loss, accuracy and angle to BP against steps, one line per rule.

    `table` has the columns rule, step, loss, accuracy (0 to 1) and angle_deg.
    """
    labels = {"step": "steps", "loss": "training loss", "accuracy": "test accuracy (%)"}
    labels |= {"angle_deg": "angle to BP (degrees)"}
    shown = table.assign(accuracy=100 * table["accuracy"])
    figure = lines(shown, "step", ["loss", "accuracy", "angle_deg"], labels=labels)
    loss, accuracy, angle = figure.axes
    from_zero(loss)
    accuracy.set_ylim(0, 100)
    right_angle(angle)
    for axes in figure.axes:
        axes.set_xlim(0, max(100, table["step"].max()))
    return figure


@draws()
def feedback(
    values: np.ndarray,
    own: np.ndarray,
    grid: np.ndarray,
    theory: np.ndarray | None,
    angles: pd.DataFrame,
    title: str,
    steps: int,
) -> Figure:
    """Draw the spectrum of B beside theory (left), and angles to BP against steps (right), one line per run.

    Args:
        values: Singular values of B and of matrices sampled like it, over the entries' deviation times sqrt(n), (N,).
        own: Those of B only, (M,).
        grid: Where the theory is evaluated, (K,).
        theory: Density of the singular values on `grid`, (K,); None if all are equal in theory.
        angles: The columns run, step and angle_deg, or an empty table.
        title: Title of the spectrum.
        steps: Where the axis of the steps ends.
    """
    for what, numbers in (("values", values), ("own", own), ("grid", grid)):
        check_array(what, numbers, "N")
    check_type("angles", angles, pd.DataFrame, "a pandas table")
    figure, (spectrum, angle) = panels(2, columns=2, height=2.9)
    if theory is None:
        spectrum.axvline(values.mean(), color="#cccccc", linewidth=6, label="orthogonal: all equal")
        top = 1.0
    else:
        spectrum.fill_between(grid, theory, color="#cccccc", lw=0, label="Marchenko–Pastur")
        look: Any = {"histtype": "step", "color": "#666666", "linewidth": 1.6, "label": "sampled"}
        heights, _, _ = spectrum.hist(values, np.linspace(0, grid[-1], 40), density=True, **look)
        top = 1.3 * max(heights.max(), theory.max())
    spectrum.plot(own, np.full(len(own), 0.03 * top), "|", color="black", markersize=12, label="this B")
    spectrum.set(xlabel="singular value of B / (σ √n)", ylabel="density", xlim=(0, grid[-1]), ylim=(0, top))
    spectrum.set_title(title, fontsize=10)
    spectrum.legend(frameon=False, fontsize=8, loc="upper left")
    if len(angles):
        require_columns("angles", angles, ["run"], ["step", "angle_deg"])
        looks = zip(angles["run"].unique(), GREYS, strict=False)
        draw_lines(angle, angles, "step", "angle_deg", by="run", looks={run: (str(run), look) for run, look in looks})
    right_angle(angle, 119)
    angle.set(xlabel="steps", ylabel="angle to BP (degrees)", xlim=(0, steps))
    legend(figure, [angle])
    return figure


def marchenko_pastur(v: Any, C: int, n: int) -> Any:
    """Return the density of the min(C, n) singular values of a large random matrix B, (C, n); its area is 1.

    The entries are independent, with mean 0 and the same standard deviation σ. Source: Marchenko and Pastur 1967, who
    give it for the eigenvalues of B Bᵀ, the squares of the singular values.

    Args:
        v: Singular values over σ √n, of any shape.
        C: Rows of B.
        n: Columns of B.

    Returns:
        The density at each v, in the shape of v.
    """
    ratio = C / n
    low, high = abs(1 - math.sqrt(ratio)), 1 + math.sqrt(ratio)
    inside = np.maximum((high**2 - v**2) * (v**2 - low**2), 0)
    return np.sqrt(inside) / (np.pi * min(ratio, 1) * np.maximum(v, 1e-9))
