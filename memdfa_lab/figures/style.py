"""What all figures have in common: each rule's look, the categories' colours, how a figure is written.

Colours are Okabe and Ito's, safe for colour-blind eyes; each rule has its own line style and marker besides, so that a
grey print can be read."""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from memdfa_lab.core.checks import check_type
from memdfa_lab.lab.files import write_whole

# rule -> name in a legend, colour, line style, marker. DFA is wide and pale, so that MEM-DFA is seen on top of it.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("BP", {"color": "#000000", "linestyle": "-", "marker": "o"}),
    "fa": ("FA", {"color": "#E69F00", "linestyle": "--", "marker": "s"}),
    "dfa": ("DFA", {"color": "#56B4E9", "linestyle": "-", "marker": "D", "linewidth": 4.5, "markersize": 7}),
    "memdfa": ("MEM-DFA", {"color": "#D55E00", "linestyle": "-.", "marker": "^"}),
    "checkpoint": ("BP, checkpointing", {"color": "#009E73", "linestyle": ":", "marker": "v"}),
    "step_in_backward": ("BP, step in backward", {"color": "#CC79A7", "linestyle": (0, (5, 1)), "marker": "P"}),
    "checkpoint_step_in_backward": (
        "BP, checkpointing + step in backward",
        {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "X"},
    ),
    "last_layer": ("last layer only", {"color": "#999999", "linestyle": "--", "marker": "*"}),
}


# category -> colour (Okabe and Ito) and hatch, in the order in which they are stacked
FILLS = {
    "optimizer state": ("#999999", ""),
    "feedback": ("#F0E442", "xx"),
    "activations": ("#0072B2", ""),
    "error": ("#E69F00", "//"),
    "gradients": ("#D55E00", "\\\\"),
    "workspace": ("#CC79A7", ".."),
}

# What rests, below what a step adds
FILLS_AT_REST = {
    "parameters": ("#dddddd", ""),
    "buffers": ("#bbbbbb", "||"),
    "optimizer state": FILLS["optimizer state"],
    "feedback": FILLS["feedback"],
    "input": ("#009E73", "--"),
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
    "axes.titley": 1.0,  # looking for a free place takes a third of the time to draw
    "figure.dpi": 100,
}
HATCHED: Any = {**SETTINGS, "axes.grid": False, "hatch.linewidth": 0.4}
BELOW: Any = {"loc": "outside lower center", "frameon": False, "fontsize": 9}  # where a figure's legend is


MIB = 2**20


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write the figure beside each other as svg and png, whole or not at all; `path` has no suffix."""
    check_type("figure", figure, Figure, "a matplotlib Figure")
    written = [Path(path).with_suffix(f".{kind}") for kind in ("svg", "png")]
    with plt.rc_context(SETTINGS):
        for file in written:
            kind = file.suffix[1:]
            # A date would make the same figure another file each day.
            given: Any = {"format": kind, "dpi": 150, "metadata": {"Date": None} if kind == "svg" else None}
            write_whole(file, partial(figure.savefig, **given))
    return written


def picture(figure: Figure, alt: str) -> Any:
    """Return the figure as a picture for a notebook, sharp on any screen, with a text in place of it."""
    from IPython.display import Image

    check_type("figure", figure, Figure, "a matplotlib Figure")
    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    pixels = PIL.Image.open(drawn).convert("RGB")
    pixels.quantize(255, dither=PIL.Image.Dither.NONE).save(data, "png", optimize=True)  # notebooks stay small
    width = round(figure.get_figwidth() * 100)
    return Image(data.getvalue(), width=width, alt=alt)


def two_a_row(
    number: int, height: float, columns: int = 2, width: float = 8, legend: float = 0.5, **options: Any
) -> tuple[Figure, list[Any]]:
    """Return a figure with as many panels, row by row; `height` is of a row, in inches, `legend` of what is below."""
    rows = math.ceil(number / columns)
    size = (width, height * rows + legend)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axes in panels.flat[number:]:
        axes.remove()
    return figure, list(panels.flat[:number])


def visible(most: pd.Series, total: float) -> list[str]:
    """Return the categories that can be seen where `total` bytes are drawn, by the most that each holds."""
    return [str(name) for name, held in most.items() if held > total / 300]


def legend_below(figure: Figure, categories: list[str], columns: int = 6) -> None:
    looks = [{**FILLS_AT_REST, **FILLS}[name] for name in categories]
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor="white") for color, hatch in looks]
    figure.legend(handles, categories, ncols=columns, handlelength=1.4, **BELOW)


def logarithmic(axes: Any, ticks: list[Any], xlabel: str) -> None:
    """Give both axes logarithmic scales with plain numbers, and put the legend beside them."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel)
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, handlelength=3.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
