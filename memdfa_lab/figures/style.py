"""What all figures share: the styles of rules and of memory categories, settings, panels, legends, and saving.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Each rule also has its own line style and
marker, so that a grey print can be read.
"""

import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from memdfa_lab.core.checks import check_type
from memdfa_lab.lab.files import write_whole

MIB = 2**20

# rule -> name in a legend, look. DFA is wide, pale and below the others, so that MEM-DFA is seen on top of it.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("BP", {"color": "#000000", "linestyle": "-", "marker": "o"}),
    "fa": ("FA", {"color": "#E69F00", "linestyle": "--", "marker": "s"}),
    "dfa": (
        "DFA",
        {"color": "#56B4E9", "linestyle": "-", "marker": "D", "linewidth": 4.5, "markersize": 7, "zorder": 1.9},
    ),
    "memdfa": ("MEM-DFA", {"color": "#D55E00", "linestyle": "-.", "marker": "^"}),
    "checkpoint": ("BP, checkpointing", {"color": "#009E73", "linestyle": ":", "marker": "v"}),
    "step_in_backward": ("BP, step in backward", {"color": "#CC79A7", "linestyle": (0, (5, 1)), "marker": "P"}),
    "checkpoint_step_in_backward": (
        "BP, checkpointing + step in backward",
        {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "X"},
    ),
    "binomial": ("BP, binomial checkpointing", {"color": "#332288", "linestyle": (0, (8, 2)), "marker": ">"}),
    "reversible": ("BP, reversible", {"color": "#44AA99", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "p"}),
    "activation_offload": ("BP, activations on disk", {"color": "#AA4499", "linestyle": ":", "marker": "d"}),
    "mezo": ("MeZO", {"color": "#999933", "linestyle": "-.", "marker": "H"}),
    "last_layer": ("last layer only", {"color": "#999999", "linestyle": "--", "marker": "*"}),
    "local_readout": ("local readouts", {"color": "#117733", "linestyle": "-", "marker": "h"}),
    "drtp": ("DRTP", {"color": "#882255", "linestyle": (0, (3, 1, 1, 1)), "marker": "<"}),
}
# The looks of lines that do not stand for rules, in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")
DASHES: Any = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
LOOKS: list[dict[str, Any]] = [
    {"color": color, "linestyle": dashes, "marker": marker}
    for color, dashes, marker in zip(COLOURS, DASHES, "o^sDvPX*", strict=True)
]
# category of memory -> colour and hatch, in the order in which they are stacked. No rule has one of these colours.
FILLS = {
    "parameters": ("#dddddd", ""),
    "buffers": ("#bbbbbb", "||"),
    "optimizer state": ("#888888", ""),
    "feedback": ("#F0E442", "xx"),
    "input": ("#BBCC33", "--"),
    "activations": ("#004488", ""),
    "error": ("#A6761D", "//"),
    "gradients": ("#994455", "\\\\"),
    "workspace": ("#FFAABB", ".."),
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
    "axes.titley": 1.0,  # searching a free place takes a third of the drawing time
    "figure.dpi": 100,
    "hatch.linewidth": 0.4,
}
BELOW: Any = {"loc": "outside lower center", "frameon": False, "fontsize": 9}  # where a figure's legend is


def label(rule: str) -> str:
    """Return the usual name of a rule: "MEM-DFA" for memdfa. Any other name is returned as it is."""
    return STYLES[rule][0] if rule in STYLES else rule


def panels(
    number: int = 1, columns: int = 1, height: float = 3.5, sharey: bool = False, grid: bool = True
) -> tuple[Figure, list[Any]]:
    """Return a new figure, 8 inches wide, and its axes, one per panel, row by row.

    Args:
        number: How many panels there are.
        columns: How many panels a row has.
        height: Height of a row in inches; half an inch is added for a legend below.
        sharey: Whether the panels share their vertical axis.
        grid: Whether grid lines are drawn.
    """
    rows = math.ceil(number / columns)
    size = (8, height * rows + 0.5)
    with plt.rc_context({**SETTINGS, "axes.grid": grid}):
        figure, all_axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=sharey)
    plt.close(figure)  # or pyplot would keep it, and a notebook would show it twice
    for axes in all_axes.flat[number:]:
        axes.remove()
    return figure, list(all_axes.flat[:number])


def legend(figure: Figure, of: Sequence[Any] = (), handlelength: float = 3.5) -> None:
    """Name each line once below the panels, in as many columns as there is room for; rules are in the order of STYLES.

    Args:
        figure: Where the legend is drawn.
        of: The axes whose lines are named; all of the figure, if there are none.
        handlelength: Length of the piece of line beside a name, over the font size.
    """
    handles: dict[str, Any] = {}
    for axes in of or figure.axes:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [name for name, _ in STYLES.values()]
    labels = sorted(handles, key=lambda name: order.index(name) if name in order else len(order))
    size, columns = BELOW["fontsize"], max(1, len(labels))
    widths = [TextPath((0, 0), name, size).get_extents().width + (handlelength + 3) * size for name in labels]
    while columns > 1 and sum(map(max, np.array_split(widths, columns))) > 72 * figure.get_figwidth():
        columns -= 1
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))  # there is room for one
    figure.legend([handles[label] for label in labels], labels, ncols=columns, handlelength=handlelength, **BELOW)


def legend_of_fills(figure: Figure, largest: "pd.Series[float]", above: float = 0) -> None:
    """Name the colours and hatches of the categories whose largest size is above a size, below the panels."""
    names = [name for name in FILLS if largest.get(name, 0) > above]
    boxes = [Rectangle((0, 0), 1, 1, facecolor=FILLS[n][0], hatch=FILLS[n][1], edgecolor="white") for n in names]
    figure.legend(boxes, names, ncols=6, handlelength=1.4, **BELOW)


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write the figure as PATH.svg and PATH.png, each whole or not at all, and return the two paths.

    A suffix of .svg or .png is replaced; any other dot belongs to the name.
    """
    check_type("figure", figure, Figure, "a matplotlib Figure")
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    svg, png = (path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png"))
    with plt.rc_context(SETTINGS):
        # With a date, the same figure would give another file each day.
        write_whole(svg, partial(figure.savefig, format="svg", metadata={"Date": None}))
        write_whole(png, partial(figure.savefig, format="png", dpi=150))
    return [svg, png]


def picture(figure: Figure, alt: str) -> Any:
    """Return the figure as a picture for a notebook, sharp on any screen, with `alt` as its text."""
    from IPython.display import Image

    check_type("figure", figure, Figure, "a matplotlib Figure")
    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    pixels = PIL.Image.open(drawn).convert("RGB")
    pixels.quantize(255, dither=PIL.Image.Dither.NONE).save(data, "png", optimize=True)  # notebooks stay small
    return Image(data.getvalue(), width=round(figure.get_figwidth() * 100), alt=alt)
