"""Peaks of a step: what fills them, and what time they cost."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.figures.inputs import categories_in, draws
from memdfa_lab.figures.lines import in_units
from memdfa_lab.figures.style import FILLS, MIB, STYLES, legend, legend_of_fills, panels


@draws("rule")
def peak_fillings(table: pd.DataFrame) -> Figure:
    """Draw what fills each rule's peak, a stacked bar a rule.

    `table` has a column rule, and a column of bytes a category.
    """
    parts = table[categories_in("table", table)].fillna(0) / MIB
    figure, (axes,) = panels(height=0.45 * len(table) + 0.7, grid=False)
    ends, places = parts.cumsum(axis=1), range(len(table))
    for name in map(str, parts):
        color, hatch = FILLS[name]
        look: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
        axes.barh(places, parts[name], left=ends[name] - parts[name], **look)
    totals = parts.sum(axis=1)
    for place, total in zip(places, totals, strict=True):
        axes.text(total, place, f" {total:.2f}", va="center", fontsize=9)
    axes.set_yticks(places, labels=[STYLES[rule][0] for rule in table["rule"]])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("at the peak, above rest (MiB)")
    legend_of_fills(figure, parts.max(), totals.max() / 300)  # less cannot be seen
    return figure


@draws("network batch_size rule feedback", "ratio ratio_low ratio_high peak_bytes")
def frontier(table: pd.DataFrame) -> Figure:
    """Draw time against memory, a panel a network and a point a contender of `bench`: down and left is better.

    `table` has the columns network, batch_size, rule, feedback, ratio, ratio_low, ratio_high, peak_bytes. Points of one
    rule that differ in their setting are joined; open markers are rules whose feedback is stored.
    """
    networks = list(table.groupby(["network", "batch_size"], sort=False))
    figure, all_axes = panels(len(networks), columns=2, height=3)
    for axes, ((network, batch_size), contenders) in zip(all_axes, networks, strict=True):
        for (rule, feedback), points in contenders.groupby(["rule", "feedback"], sort=False):
            label, style = STYLES[str(rule)]
            look = {"color": style["color"], "marker": style["marker"], "markersize": 7, "elinewidth": 1}
            look |= {"linestyle": style["linestyle"] if len(points) > 1 else "", "linewidth": 1.2}
            if feedback == "stored":
                label, look = f"{label}, B stored", look | {"markerfacecolor": "white"}
            spread = points["ratio"] - points["ratio_low"], points["ratio_high"] - points["ratio"]
            axes.errorbar(in_units(points, "peak_bytes"), points["ratio"], yerr=spread, label=label, **look)
        axes.set_title(f"{network}, batch {batch_size}", fontsize=10)
        axes.set(xlabel="peak above rest (MiB)", ylabel="step time / BP's")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    legend(figure, handlelength=2)
    return figure
