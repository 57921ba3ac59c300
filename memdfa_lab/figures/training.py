"""Data, learning curves, confusion."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from memdfa_lab.core.checks import lookup
from memdfa_lab.figures.needs import check_numbers, labelled, needs
from memdfa_lab.figures.signals import _draw_band
from memdfa_lab.figures.style import BELOW, SETTINGS, STYLES
from memdfa_lab.lab.datasets import check_data


def images(data: Any) -> Figure:
    """Draw the first training image of each class, as it was before normalisation (`data`: `ml.datasets.Data`).

    Raises ValueError if a class has none.
    """
    check_data("images", data)
    for label in range(data.classes):
        if not (data.y_train == label).any():
            raise ValueError(f"there is no training image of class {label}: take a larger part of the data")
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


@needs("rule", "epoch", "loss", "test_accuracy")
def learning_curves(table: pd.DataFrame) -> Figure:
    """Draw training loss and test error against epochs, the mean over seeds in a band from the least to the largest.

    `table` has the columns rule, epoch, loss, test_accuracy, and a row a seed (`ml.experiments.compare`).
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


@needs("rule", "step", "loss", "accuracy", "angle_deg")
def live_curves(table: pd.DataFrame) -> Figure:
    """Draw loss, accuracy and angle to BP against steps, a line a rule.

    `table` has the columns rule, step, loss, accuracy (a part of one) and angle_deg.
    """
    with plt.rc_context(SETTINGS):
        figure, panels = plt.subplots(1, 3, figsize=(8.5, 3.2), layout="constrained")
        for rule, rows in table.groupby("rule", sort=False):
            label, style = STYLES[str(rule)]
            look = style | {"markevery": max(1, len(rows) // 8), "zorder": 1.9 if "linewidth" in style else 2}
            for axes, values in zip(panels, (rows["loss"], 100 * rows["accuracy"], rows["angle_deg"]), strict=True):
                axes.plot(rows["step"], values, label=label, **look)
        panels[0].set(ylabel="training loss", ylim=(0, None))
        panels[1].set(ylabel="test accuracy (%)", ylim=(0, 100))
        panels[2].set(ylabel="angle to BP (degrees)", ylim=(-4, 104), yticks=[0, 30, 60, 90])
        panels[2].axhline(90, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        for axes in panels:
            axes.set(xlabel="steps", xlim=(0, max(100, table["step"].max())))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=4, handlelength=3.5, **BELOW)
    plt.close(figure)
    return figure


@needs("experiment", "rule", "seed", "epoch", "loss", "test_accuracy", "seconds")
def training_curves(table: pd.DataFrame) -> Figure:
    """Draw a row an experiment: loss and test error against epochs, test error against seconds of training.

    Means over seeds, in a band from the least to the largest. `table` has the columns experiment, rule, seed, epoch,
    loss, test_accuracy and seconds (of the epoch).
    """
    with plt.rc_context(SETTINGS):
        experiments = list(table.groupby("experiment", sort=False))
        size = (8, 2.5 * len(experiments) + 0.5)
        figure, panels = plt.subplots(len(experiments), 3, figsize=size, layout="constrained", squeeze=False)
        handles: dict[Any, Any] = {}
        for row, (experiment, runs) in zip(panels, experiments, strict=True):
            runs = runs.assign(error=100 * (1 - runs["test_accuracy"]))
            runs = runs.assign(elapsed=runs.groupby(["rule", "seed"])["seconds"].cumsum())
            for rule, rows in runs.groupby("rule", sort=False):
                label, style = STYLES[str(rule)]
                style = style | {"markevery": max(1, rows["epoch"].max() // 6)}
                _draw_band(row[0], rows.set_index("epoch")["loss"], label, style)
                _draw_band(row[1], rows.set_index("epoch")["error"], label, style)
                means = rows.groupby("epoch")[["elapsed", "error"]].mean()
                row[2].plot(means["elapsed"], means["error"], label=label, **style)
            handles |= {line.get_label(): line for line in row[0].lines}
            row[0].set(title=experiment, xlabel="epoch", ylabel="training loss")
            row[1].set(xlabel="epoch", ylabel="test error (%)")
            row[2].set(xlabel="seconds of training", ylabel="test error (%)")
            for axes in row:
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.set_ylim(0, max(1.05 * axes.dataLim.ymax, axes.get_ylim()[1]))  # 100 % right is a line, too
                axes.title.set_fontsize(10)
        names = [label for label, _ in STYLES.values() if label in handles]
        place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False, "handlelength": 3.5}
        figure.legend([handles[name] for name in names], names, **place)
    plt.close(figure)
    return figure


def confusion(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Draw one confusion matrix a rule, counts with true classes down; the diagonal is left out of the colours.

    `matrices`: rule -> whole numbers (classes, classes).
    """
    for rule, matrix in labelled("matrices", matrices).items():
        lookup("rule", rule, STYLES)
        counts = check_numbers(f"matrices[{rule!r}]", matrix, "classes", "classes")
        if counts.dtype.kind not in "iu" or len(set(counts.shape)) > 1:
            raise ValueError(f"matrices[{rule!r}] must be square and of counts, got {counts.dtype} of {counts.shape}")
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
