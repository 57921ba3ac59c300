"""One function a figure; each takes plain tables and returns a matplotlib Figure. Units are on the axes.

Colours are Okabe and Ito's, safe for colour-blind eyes; each rule has its own line style and marker besides, so that a
grey print can be read.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from memdfa_lab.files import written_whole

# rule -> name in a legend, colour, line style, marker. DFA is wide and pale, so that MEM-DFA is seen on top of it.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("BP", {"color": "#000000", "linestyle": "-", "marker": "o"}),
    "fa": ("FA", {"color": "#E69F00", "linestyle": "--", "marker": "s"}),
    "dfa": ("DFA", {"color": "#56B4E9", "linestyle": "-", "marker": "D", "linewidth": 4.5, "markersize": 7}),
    "memdfa": ("MEM-DFA", {"color": "#D55E00", "linestyle": "-.", "marker": "^"}),
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

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    width = round(figure.get_figwidth() * 100)
    return Image(data.getvalue(), width=width, alt=alt)


def images(data: Any) -> Figure:
    """Draw the first training image of each class, as it was before normalisation (`data`: `ml.datasets.Data`)."""
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        figure, panels = plt.subplots(1, data.classes, figsize=(8, 1.1), layout="constrained")
        for label, axes in enumerate(panels):
            image = data.x_train[data.y_train == label][0] + data.mean / data.pixel_range
            low, high = image.min(), image.max()
            axes.imshow(((image - low) / (high - low)).movedim(0, -1).squeeze(-1), cmap="gray")
            axes.set_title(label)
            axes.axis("off")
    plt.close(figure)
    return figure


def learning_curves(table: pd.DataFrame) -> Figure:
    """Draw training loss and test error against epochs, the mean over seeds in a band from the least to the largest.

    `table` has the columns rule, seed, epoch, loss, test_accuracy (`ml.experiments.compare`).
    """
    with plt.rc_context(SETTINGS):
        figure, (loss, error) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        table = table.assign(error=100 * (1 - table["test_accuracy"]))
        for rule, runs in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            for axes, column in ((loss, "loss"), (error, "error")):
                epochs = runs.groupby("epoch")[column]
                axes.plot(epochs.mean(), label=label, **style)
                axes.fill_between(
                    epochs.min().index, epochs.min(), epochs.max(), color=style["color"], alpha=0.15, lw=0
                )
        loss.set(xlabel="epoch", ylabel="training loss (mean over the epoch)")
        error.set(xlabel="epoch", ylabel="test error (%)")
        for axes in (loss, error):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(bottom=0)
        loss.legend(frameon=False, handlelength=3.5)
    plt.close(figure)
    return figure


def confusion(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Draw one confusion matrix a rule, counts with true classes down; the diagonal is left out of the colours."""
    with plt.rc_context({**SETTINGS, "axes.grid": False}):
        rows = math.ceil(len(matrices) / 2)
        figure, panels = plt.subplots(rows, 2, figsize=(8, 4 * rows), layout="constrained", squeeze=False)
        for axes in panels.flat[len(matrices) :]:
            axes.remove()
        wrong = {rule: matrix - np.diag(np.diag(matrix)) for rule, matrix in matrices.items()}
        top = max(1, *(int(matrix.max()) for matrix in wrong.values()))
        for axes, (rule, matrix) in zip(panels.flat, matrices.items(), strict=False):
            sns.heatmap(
                wrong[rule],
                ax=axes,
                cmap="Greys",
                vmin=0,
                vmax=top,
                cbar=False,
                square=True,
                annot=matrix,
                fmt="d",
                annot_kws={"size": 8},
                linewidths=0.5,
                linecolor="#dddddd",
            )
            axes.set_title(STYLES[rule][0])
            axes.set(xlabel="predicted digit", ylabel="true digit")
            axes.tick_params(length=0)
    plt.close(figure)
    return figure
