"""What all figures have in common: each rule's look, the categories' colours, how a figure is written.

Colours are Okabe and Ito's, safe for colour-blind eyes; each rule has its own line style and marker besides, so that a
grey print can be read."""

import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from memdfa_lab.files import written_whole

# rule -> name in a legend, colour, line style, marker. DFA is wide and pale, so that MEM-DFA is seen on top of it.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("BP", {"color": "#000000", "linestyle": "-", "marker": "o"}),
    "fa": ("FA", {"color": "#E69F00", "linestyle": "--", "marker": "s"}),
    "dfa": ("DFA", {"color": "#56B4E9", "linestyle": "-", "marker": "D", "linewidth": 4.5, "markersize": 7}),
    "memdfa": ("MEM-DFA", {"color": "#D55E00", "linestyle": "-.", "marker": "^"}),
    "checkpoint": ("BP, checkpointing", {"color": "#009E73", "linestyle": ":", "marker": "v"}),
    "step_in_backward": ("BP, step in backward", {"color": "#CC79A7", "linestyle": (0, (5, 1)), "marker": "P"}),
    "checkpoint_step_in_backward": ("BP, both of these", {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "X"}),
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


SETTINGS: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "memdfa_lab",  # the same figure gives the same file
    "figure.dpi": 100,
}


MIB = 2**20


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write the figure beside each other as svg and png, whole or not at all; `path` has no suffix."""
    written = [Path(path).with_suffix(f".{kind}") for kind in ("svg", "png")]
    with plt.rc_context(SETTINGS):
        for file in written:
            kind = file.suffix[1:]
            with written_whole(file) as out:
                # A date would make the same figure another file each day.
                figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return written


def picture(figure: Figure, alt: str) -> Any:
    """Return the figure as a picture for a notebook, sharp on any screen, with a text in place of it."""
    from IPython.display import Image

    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    pixels = PIL.Image.open(drawn).convert("RGB")
    pixels.quantize(255, dither=PIL.Image.Dither.NONE).save(data, "png", optimize=True)  # notebooks stay small
    width = round(figure.get_figwidth() * 100)
    return Image(data.getvalue(), width=width, alt=alt)


def legend_below(figure: Figure, categories: list[str]) -> None:
    looks = [FILLS[name] for name in categories]
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor="white") for color, hatch in looks]
    figure.legend(handles, categories, loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=1.4)


def logarithmic(axes: Any, ticks: list[Any], xlabel: str) -> None:
    """Give both axes logarithmic scales with plain numbers, and put the legend beside them."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel)
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, handlelength=3.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
