"""The results of a sweep's runs against what was varied."""

import pandas as pd
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype

from memdfa_lab.core.checks import check_type, lookup
from memdfa_lab.figures.inputs import draws
from memdfa_lab.figures.lines import draw_lines, logarithmic, looks_of
from memdfa_lab.figures.style import LOOKS, STYLES, legend, panels


@draws("run")
def sweep_summary(table: pd.DataFrame, varied: list[str]) -> Figure | None:
    """Draw the runs' last results against what was varied: means, with the smallest and the largest.

    The vertical axis has test_accuracy, or else the last numeric result. The horizontal axis has the numeric parameter
    with the most values, except the seed. There is one line per rule, or per value of another parameter. None is
    returned if no result is numeric. `table` has the columns run, parameters and results (`ml.sweep.collect`); if it
    has epochs, the last ones are drawn.
    """
    check_type("varied", varied, (list, tuple), "a list of parameters' names, such as ['lr', 'rule']")
    named = [f"parameter_{name}" if f"parameter_{name}" in table else name for name in varied]
    varied = [name for name in named if name in table]  # others were given only to runs that are not finished
    numbers = [name for name in table if is_numeric_dtype(table[name]) and table[name].notna().any()]
    results = [str(name) for name in numbers if name not in [*varied, "seconds"]]
    if not results:
        return None
    value = "test_accuracy" if "test_accuracy" in results else results[-1]
    if "epoch" in table:
        training = [name for name in ("run", "rule", "seed") if name in table]
        table = table[table["epoch"] == table.groupby(training)["epoch"].transform("max")]
    table = table.assign(value=table[value] * (100 if value.endswith("accuracy") else 1), **{"all runs": "all runs"})
    several = {name: table[name].nunique() for name in varied if name != "seed" and table[name].nunique() > 1}
    across = max((name for name in several if is_numeric_dtype(table[name])), key=several.__getitem__, default=None)
    others = [name for name in ["rule", *several] if name in table and name != across]
    by = next((name for name in others if 1 < table[name].nunique() <= len(LOOKS)), "all runs")
    for rule in table["rule"].unique() if by == "rule" else ():
        lookup("rule", rule, STYLES)

    names = [name for name in STYLES if name in set(table[by])] if by == "rule" else sorted(table[by].unique())
    looks = looks_of(names)
    figure, (axes,) = panels()
    if across is None:
        for place, (name, (_, look)) in enumerate(looks.items()):
            found = table.loc[table[by] == name, "value"]
            below, above = found.mean() - found.min(), found.max() - found.mean()
            axes.errorbar(place, found.mean(), [[below], [above]], capsize=4, **look)
        axes.set_xticks(range(len(names)), labels=[label for label, _ in looks.values()])
        axes.margins(x=0.2)
    else:
        prefix = "" if by == "rule" else f"{by} "
        draw_lines(
            axes, table, across, "value", by, {name: (prefix + looks[name][0], looks[name][1]) for name in names}
        )
        ticks = sorted(table[across].dropna().unique())
        if ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]:
            logarithmic(axes, "x", ticks)
        elif len(ticks) <= 10:
            axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        if by != "all runs":
            legend(figure)
    axes.set(xlabel=(across or by).replace("_", " "))
    axes.set(ylabel=value.replace("_", " ") + " (%)" * value.endswith("accuracy"))
    return figure
