"""What came of many runs."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from pandas.api.types import is_numeric_dtype

from memdfa_lab.core.checks import check_type, lookup
from memdfa_lab.figures.needs import needs
from memdfa_lab.figures.signals import LOOKS, _draw_band
from memdfa_lab.figures.style import BELOW, SETTINGS, STYLES

MOST_LINES = 8  # of one look each
MOST_TICKS = 10


@needs("run")
def sweep_summary(table: pd.DataFrame, varied: list[str]) -> Figure | None:
    """Draw what runs ended with against the parameters that were varied; None if no result has numbers.

    `table` has the columns run, parameters, results (`ml.sweep.collect`); where there are epochs, the last ones count.
    Drawn is test_accuracy, or the last result with numbers; against the number that took the most values (not the
    seed), a line for each rule, or for each value of another parameter. Means over the rest, in a band from the least
    to the largest.
    """
    check_type("varied", varied, (list, tuple), "a list of parameters' names, such as ['lr', 'rule']")
    named = (f"parameter_{name}" if f"parameter_{name}" in table else name for name in varied)
    varied = [name for name in named if name in table]  # else no run that was given it was finished
    numbers = [str(name) for name in table if is_numeric_dtype(table[name]) and name not in varied]
    value = next(
        (name for name in ["test_accuracy", *reversed(numbers)] if name in numbers and name != "seconds"), None
    )
    if value is None:
        return None
    if "epoch" in table:
        one = [name for name in ("run", "rule", "seed") if name in table]
        table = table[table["epoch"] == table.groupby(one)["epoch"].transform("max")]
    told = [name for name in varied if name != "seed" and table[name].nunique() > 1]
    along = max(
        (name for name in told if is_numeric_dtype(table[name])), key=lambda name: table[name].nunique(), default=None
    )
    lines = [name for name in dict.fromkeys(["rule", *told]) if name in table and name != along]
    by = next((name for name in lines if 1 < table[name].nunique() <= MOST_LINES), None)
    table = table.assign(value=table[value] * 100 if value.endswith("accuracy") else table[value])
    for rule in table["rule"].unique() if by == "rule" else ():
        lookup("rule", rule, STYLES)
    ylabel = value.replace("_", " ") + " (%)" * value.endswith("accuracy")

    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
        groups = list(table.groupby(by)) if by else [("", table)]
        if by == "rule":  # in the order of legends everywhere
            groups.sort(key=lambda group: list(STYLES).index(str(group[0])))
        for place, (name, runs) in enumerate(groups):
            label, look = STYLES[str(name)] if by == "rule" else (f"{by} {name!s}" * bool(by), _look(place))
            if along:
                _draw_band(axes, runs.set_index(along)["value"], label, look)
            else:
                mean = runs["value"].mean()
                spread = [[mean - runs["value"].min()], [runs["value"].max() - mean]]
                axes.errorbar([place], [mean], yerr=spread, capsize=4, **look)
        axes.set(ylabel=ylabel)
        if along:
            _ticks(axes, sorted(set(table[along].dropna())))
            axes.set_xlabel(along.replace("_", " "))
            if by:
                figure.legend(ncols=4, handlelength=3.5, **{**BELOW, "fontsize": 9})
        else:
            labels = [STYLES[str(name)][0] if by == "rule" else str(name) for name, _ in groups]
            axes.set_xticks(range(len(groups)), labels=labels if by else ["all runs"])
            axes.set_xlabel(by or "")
            axes.margins(x=0.2)
    plt.close(figure)
    return figure


def _look(place: int) -> dict[str, Any]:
    if place < len(LOOKS):
        return LOOKS[place]
    return list(STYLES.values())[place][1]


def _ticks(axes: Any, values: list[float]) -> None:
    if values[0] > 0 and values[-1] >= 8 * values[0]:
        axes.set_xscale("log")
    if len(values) <= MOST_TICKS:
        axes.set_xticks(values, labels=[f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
