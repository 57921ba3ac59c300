"""Who computes when in a pipeline of machines."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.core.checks import lookup
from memdfa_lab.figures.inputs import draws
from memdfa_lab.figures.style import STYLES, legend, panels

# task -> colour, hatch
TASKS = {
    "forward": ("#56B4E9", ""),
    "recompute": ("#0072B2", "//"),
    "backward": ("#E69F00", "\\\\"),
    "local gradient": ("#D55E00", ".."),
}


@draws("task", "machine batch start end", each=True)
def pipelines(simulations: Mapping[str, pd.DataFrame], batch: int = 1) -> Figure:
    """Draw who computes what when, a panel a rule and a row a machine; one batch is in strong colours.

    `simulations`: rule -> a table of `pipeline.simulate`: machine, task, batch, start, end. Time begins with the batch
    and ends with the next one. Raises ValueError for an unknown rule or task, or if one of the two is missing.
    """
    for rule, table in simulations.items():
        lookup("rule", rule, STYLES)
        for task in table["task"].unique():
            lookup("task", task, TASKS)
        if not {batch, batch + 1} <= set(table["batch"]):
            raise ValueError(f"batch {batch!r} or the one after it is not in simulations[{rule!r}]: choose another")
    figure, all_axes = panels(len(simulations), height=1.7, grid=False)
    duration = 0.0
    for axes, (rule, table) in zip(all_axes, simulations.items(), strict=True):
        table = table.assign(strong=table["batch"] == batch, length=table["end"] - table["start"])
        start = table.loc[table["strong"], "start"].min()
        duration = max(duration, table.loc[table["batch"] == batch + 1, "end"].max() - start)
        for (task, strong), bars in table.groupby(["task", "strong"], sort=False):
            color, hatch = TASKS[str(task)]
            look: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
            look |= {"label": task} if strong else {"alpha": 0.35}
            axes.barh(bars["machine"] + 1, bars["length"], left=bars["start"] - start, **look)
        axes.set(ylabel="machine", yticks=sorted(table["machine"].unique() + 1))
        axes.invert_yaxis()
        axes.set_title(STYLES[rule][0], fontsize=10, loc="left")
    for axes in all_axes:
        axes.set_xlim(0, duration)
    all_axes[-1].set_xlabel("time (forward passes of a micro-batch on one machine)")
    legend(figure, handlelength=1.4)
    return figure
