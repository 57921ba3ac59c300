"""Peaks of a step: what they consist of, and the time that a lower peak costs."""

from operator import itemgetter
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.figures.inputs import categories_in, draws, require_columns
from memdfa_lab.figures.lines import in_units, logarithmic
from memdfa_lab.figures.style import FILLS, MIB, STYLES, label, legend, legend_of_fills, panels


@draws("rule")
def peak_fillings(
    table: pd.DataFrame, panel: str | None = None, of: str | None = None, xlabel: str = "at the peak, above rest (MiB)"
) -> Figure:
    """Draw memory by category, a stacked bar for each row, in the order of the rows.

    Args:
        table: The column rule, and the bytes of each category as a column.
        panel: A column whose values get a panel each, side by side; all panels have rows of the same names.
        of: A column whose text is written after the rule's name.
        xlabel: Name of the horizontal axis.

    Raises:
        TypeError: If the table is not a pandas table.
        ValueError: If it has no row, lacks a column, or has an unknown rule or text in place of numbers.
    """
    require_columns("table", table, [name for name in (panel, of) if name], [])
    categories = categories_in("table", table)
    parts = [("", table)] if panel is None else list(table.groupby(panel, sort=False))
    rows = max((part for _, part in parts), key=len)
    figure, all_axes = panels(len(parts), len(parts), height=0.34 * len(rows) + 0.8, sharey=True, grid=False)
    for axes, (title, part) in zip(all_axes, parts, strict=True):
        sizes = part[categories].fillna(0) / MIB
        ends, places, totals = sizes.cumsum(axis=1), range(len(part)), sizes.sum(axis=1)
        for name in categories:
            color, hatch = FILLS[name]
            look: Any = {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axes.barh(places, sizes[name], left=ends[name] - sizes[name], **look)
        for place, total in zip(places, totals, strict=True):
            axes.text(total, place, f" {total:.3g}" if total < 1000 else f" {total:,.0f}", va="center", fontsize=9)
        axes.set_xlim(0, 1.17 * max(totals.max(), 1e-6))  # with room for the numbers
        axes.set_title(str(title), fontsize=10)
        axes.set_xlabel(xlabel)
    names = [label(rule).replace(" + ", "\n+ ") for rule in rows["rule"]]
    if of is not None:
        names = [f"{name}, {text}" for name, text in zip(names, rows[of], strict=True)]
    all_axes[0].set_yticks(range(len(rows)), labels=names)
    all_axes[0].invert_yaxis()
    seen = table[categories].fillna(0)
    legend_of_fills(figure, seen.max() / MIB, seen.sum(axis=1).max() / MIB / 300)  # smaller parts cannot be seen
    return figure


def direct_labels(figure: Figure) -> Figure:
    """Write the name of each line at its right end, in place of the legend, and return the figure.

    Lines that end at the same height share a text. Marks without a line are named in a legend within the panel.
    """
    for old in list(figure.legends):
        old.remove()
    for axes in figure.axes:
        marks = [
            one for one in axes.lines if one.get_linestyle() == "None" and not str(one.get_label()).startswith("_")
        ]
        if marks:
            axes.legend(handles=marks, frameon=False, fontsize=9, loc="upper left")
        label_ends(axes, [line for line in axes.lines if line.get_linestyle() != "None"])
    return figure


def label_ends(axes: Any, lines: Any) -> None:
    """Write the name of each of these lines at its right end; the limits of the panel must be final."""
    axes.get_xlim(), axes.get_ylim()  # so that they follow from the lines
    to_panel = axes.transData + axes.transAxes.inverted()
    named = [line for line in lines if len(line.get_xdata()) and not str(line.get_label()).startswith("_")]
    ends = [(float(to_panel.transform(line.get_xydata()[-1])[1]), line) for line in named]
    groups: list[tuple[float, list[Any]]] = []
    for height, line in sorted(ends, key=itemgetter(0)):
        if groups and height - groups[-1][0] < 0.012:
            groups[-1][1].append(line)
        else:
            groups.append((height, [line]))
    names = [[line.get_label() for line in named if line in group] for _, group in groups]
    texts = [(" · " if len(" · ".join(each)) < 15 else "\n").join(each).replace(" + ", "\n+ ") for each in names]
    row = 0.092 * axes.figure.dpi / axes.bbox.height  # half the height of a line of text, in heights of the panel
    tall = [row * len(text.split("\n")) for text in texts]
    at = [height for height, _ in groups]
    for i in range(1, len(at)):  # upwards, and then down again from the top
        at[i] = max(at[i], at[i - 1] + tall[i - 1] + tall[i])
    for i in reversed(range(len(at))):
        at[i] = min(at[i], 1.02 if i == len(at) - 1 else at[i + 1] - tall[i + 1] - tall[i])
    for text, height, (end, group) in zip(texts, at, groups, strict=True):
        look: Any = {"arrowstyle": "-", "color": group[-1].get_color(), "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
        look |= {"relpos": (0, 0.5)}
        where: Any = {"xycoords": "axes fraction", "annotation_clip": False}
        axes.annotate(text, (1, end), (1.03, height), va="center", fontsize=9, arrowprops=look, **where)


@draws("network batch_size rule feedback", "ratio ratio_low ratio_high peak_bytes")
def frontier(table: pd.DataFrame) -> Figure:
    """Draw time against memory, one panel per network, one point per contender of `bench`: lower left is better.

    `table` has the columns network, batch_size, rule, feedback, ratio, ratio_low, ratio_high, peak_bytes, and if wanted
    pass1. Points of one rule that differ in their setting are joined in the order of their peaks; open markers are
    rules with stored feedback, small ones those with a cheap pass 1.
    """
    table = table.assign(pass1=table.get("pass1", "")).fillna({"pass1": ""})
    networks = list(table.groupby(["network", "batch_size"], sort=False))
    figure, all_axes = panels(len(networks), columns=2, height=3)
    for axes, ((network, batch_size), contenders) in zip(all_axes, networks, strict=True):
        for (rule, feedback, pass1), unsorted in contenders.groupby(["rule", "feedback", "pass1"], sort=False):
            points = unsorted.sort_values("peak_bytes")
            name, style = STYLES[str(rule)]
            look = {"color": style["color"], "marker": style["marker"], "markersize": 7, "elinewidth": 1}
            look |= {"linestyle": style["linestyle"] if len(points) > 1 else "", "linewidth": 1.2}
            if feedback == "stored":
                name, look = f"{name}, B stored", look | {"markerfacecolor": "white"}
            if pass1:
                name, look = f"{name}, pass 1 in {pass1}", look | {"markersize": 4, "linestyle": ":"}
            spread = points[["ratio_low", "ratio_high"]].sub(points["ratio"], axis=0).abs().T.to_numpy()
            axes.errorbar(in_units(points, "peak_bytes"), points["ratio"], yerr=spread, label=name, **look)
        axes.set_title(f"{network}, batch {batch_size}", fontsize=10)
        axes.set(xlabel="peak above rest (MiB)", ylabel="step time / BP's")
        logarithmic(axes, "x")
        axes.set_ylim(0, 1.08 * contenders["ratio_high"].max())
    legend(figure, handlelength=2)
    return figure
