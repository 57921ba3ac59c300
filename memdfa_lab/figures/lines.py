"""Line plots of any table: a line for each rule or other group, in one panel or more, with a band over seeds."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from pandas.api.types import is_integer_dtype, is_numeric_dtype

from memdfa_lab.figures.inputs import draws, require_columns
from memdfa_lab.figures.style import LOOKS, MIB, STYLES, legend, panels

Looks = Mapping[Any, tuple[str, dict[str, Any]]]  # name -> (name in the legend, look)
RING = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": "black"}
CROSS = {"marker": "x", "markersize": 6, "markeredgewidth": 1.2, "markeredgecolor": "black"}


@draws()
def lines(
    table: pd.DataFrame,
    x: str | Sequence[str],
    y: str | Sequence[str],
    by: str = "rule",
    panel: str | None = None,
    labels: Mapping[str, str] | None = None,
    log: str = "",
    marks: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Draw y against x, one line for each value of `by`: the mean at each x, in a band from smallest to largest.

    Columns whose name ends in "bytes" are drawn in MiB.

    Args:
        table: One row per point, or per point and seed.
        x: The column on the horizontal axis, or a list with one for each of `y`.
        y: The column on the vertical axis; a list of them gets a panel each.
        by: The column whose values get a line each. Rules have their own looks, other values those of LOOKS in order.
        panel: A column whose values get a panel each, or a row of panels if there are several y.
        labels: Column -> name of its axis, if it is not the column's name.
        log: The axes that are logarithmic: "x", "y" or "xy".
        marks: Label -> a table with x, y and panel, drawn as rings (the first) or crosses (the second).

    Raises:
        TypeError: If a table is not a pandas table.
        ValueError: If a table has no row, lacks a column, or has text in place of numbers.
    """
    ys = [y] if isinstance(y, str) else list(y)
    xs = [x] * len(ys) if isinstance(x, str) else list(x)
    groups = [] if panel is None else [panel]
    require_columns("table", table, [by, *groups], [*xs, *ys])
    for label, marked in (marks or {}).items():
        require_columns(label, marked, groups, [*xs, *ys])
    names = {name: name.replace("_", " ") + " (MiB)" * name.endswith("bytes") for name in [*xs, *ys]} | dict(
        labels or {}
    )
    looks = looks_of(table[by])
    parts = [("", table)] if panel is None else list(table.groupby(panel, sort=is_numeric_dtype(table[panel])))
    places = [(name, rows, *column) for name, rows in parts for column in zip(xs, ys, strict=True)]
    columns = len(ys) if len(ys) > 1 else min(3, len(places))
    figure, all_axes = panels(len(places), columns, 4 if len(places) == 1 else 2.7, sharey=len(ys) == 1)
    for place, (axes, (name, rows, across, up)) in enumerate(zip(all_axes, places, strict=True)):
        draw_lines(axes, rows, across, up, by, looks)
        for (label, marked), look in zip((marks or {}).items(), (RING, CROSS), strict=False):
            here = marked if panel is None else marked[marked[panel] == name]
            axes.plot(in_units(here, across), in_units(here, up), label=label, linestyle="", zorder=5, **look)
        axes.set_title(f"{panel} {name}" if panel and is_numeric_dtype(table[panel]) else str(name), fontsize=10)
        axes.set(xlabel=names[across], ylabel=names[up] if len(ys) > 1 or place % columns == 0 else "")
        logarithmic(axes, log, in_units(rows, across), 14 // columns)
        if is_integer_dtype(table[across]) and "x" not in log:
            axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure)
    return figure


def draw_lines(axes: Any, table: pd.DataFrame, x: str, y: str, by: str, looks: Looks | None = None) -> None:
    """Draw one line for each value of `by`: the mean at each x, in a band from smallest to largest.

    Args:
        axes: Where the lines are drawn.
        table: One row per point, or per point and seed.
        x: The column on the horizontal axis.
        y: The column on the vertical axis.
        by: The column whose values get a line each.
        looks: What `looks_of` returns; several panels can share it.
    """
    for name, (label, look) in (looks or looks_of(table[by])).items():
        rows = table[table[by] == name]
        at = in_units(rows, y).groupby(in_units(rows, x))
        mean = at.mean()
        axes.plot(mean, label=label, **{"markevery": max(1, len(mean) // 10)} | look)
        if len(mean) < len(rows):
            axes.fill_between(mean.index, at.min(), at.max(), color=look["color"], alpha=0.15, lw=0)


def looks_of(names: Iterable[Any]) -> Looks:
    """Return name -> (label, look) for each name, in order: a rule's own, or the next of LOOKS."""
    others = itertools.cycle(LOOKS)
    return {name: STYLES[name] if name in STYLES else (str(name), next(others)) for name in dict.fromkeys(names)}


def in_units(table: pd.DataFrame, column: str) -> "pd.Series[float]":
    """Return the column, in MiB if it is of bytes."""
    return table[column] / MIB if column.endswith("bytes") else table[column]


def logarithmic(axes: Any, which: str, values: Iterable[float] = (), most: int = 14) -> None:
    """Make x, y or both logarithmic, with ticks at 1, 2, 5, 10 and so on; those of x at up to `most` values, if any."""
    for name in which:
        axis, ticks = getattr(axes, f"{name}axis"), sorted(set(values))
        axes.set(**{f"{name}scale": "log"})
        if name == "x" and ticks:
            ticks = ticks[:: math.ceil(len(ticks) / most)]
            axis.set_ticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
        else:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def right_angle(axes: Any, largest: float = 0) -> None:
    """Draw a line at 90 degrees; put ticks every 30 degrees, on an axis up to 100 or the largest angle."""
    axes.axhline(90, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.set_yticks(range(0, 181, 30))
    axes.set_ylim(-4, max(100, 5 + largest))


def from_zero(axes: Any) -> None:
    """Let the vertical axis begin at zero and end above the largest value, even if all are equal."""
    axes.set_ylim(0, max(1.05 * axes.dataLim.ymax, axes.get_ylim()[1]))
