"""Curves of training and of peaks: loss, error and angles against steps, bytes against depth, batch or width."""

import pandas as pd
from matplotlib.figure import Figure

from memdfa_lab.figures.inputs import draws
from memdfa_lab.figures.lines import from_zero, lines, right_angle


@draws("rule", "epoch loss test_accuracy")
def learning_curves(table: pd.DataFrame) -> Figure:
    """Draw training loss and test error against epochs: the mean over seeds, in a band from smallest to largest.

    `table` has the columns rule, epoch, loss and test_accuracy, and one row per epoch and seed, as in
    `ml.experiments.compare`. Without test examples, only the loss is drawn.
    """
    labels, errors = {"loss": "mean training loss", "error": "test error (%)"}, 100 * (1 - table["test_accuracy"])
    shown = ["loss", "error"] if errors.notna().any() else ["loss"]
    figure = lines(table.assign(error=errors), "epoch", shown, labels=labels)
    for axes in figure.axes:
        from_zero(axes)
    return figure


@draws()
def alignment(table: pd.DataFrame, angle: str = "gradient_deg", xlabel: str = "steps") -> Figure:
    """Draw angles to BP against steps, one panel per block: the mean over seeds, in a band from smallest to largest.

    Args:
        table: The columns rule (or any other name of a run), step, block, and the one named by `angle`, in degrees.
        angle: The column of the angles.
        xlabel: What the column step counts.
    """
    labels = {"step": xlabel, angle: "angle to BP (degrees)"}
    figure = lines(table, "step", angle, panel="block", labels=labels)
    for axes in figure.axes:
        right_angle(axes, table[angle].max())
    return figure


@draws("rule", "peak_bytes")
def peak_against(table: pd.DataFrame, x: str, xlabel: str, measured: pd.DataFrame | None = None) -> Figure:
    """Draw peaks above rest against depth, batch or width, one line per rule, both axes logarithmic.

    Args:
        table: The columns rule, peak_bytes and the one named by `x`.
        x: The column of the horizontal axis.
        xlabel: Name of that axis.
        measured: A table with the columns `x` and peak_bytes, drawn as rings.
    """
    labels = {x: xlabel, "peak_bytes": "peak above rest (MiB)"}
    marks = None if measured is None else {"measured": measured}
    return lines(table, x, "peak_bytes", labels=labels, log="xy", marks=marks)
