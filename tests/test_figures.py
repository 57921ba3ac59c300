"""Figures from plain tables: what is drawn is what the table says, and the same table gives the same file."""

import numpy as np
import pandas as pd

from memdfa_lab import figures

TABLE = pd.DataFrame(
    [
        (rule, seed, epoch, 1.0 / epoch, 0.5 + 0.1 * epoch + 0.02 * seed)
        for rule in ("bp", "memdfa")
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    ],
    columns=["rule", "seed", "epoch", "loss", "test_accuracy"],
)


def test_learning_curves_draw_the_mean_over_seeds():
    figure = figures.learning_curves(TABLE)
    loss, error = figure.axes
    assert [line.get_label() for line in loss.lines] == ["BP", "MEM-DFA"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(error.lines[1].get_ydata(), [39, 29, 19])
    assert error.get_ylabel() == "test error (%)"


def test_the_same_table_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        figures.save(figures.learning_curves(TABLE), tmp_path / folder / "curves")
    for kind in ("svg", "png"):
        one, other = ((tmp_path / folder / f"curves.{kind}").read_bytes() for folder in ("a", "b"))
        assert one == other
        assert len(one) > 5000


def test_confusion_shows_each_count():
    matrix = np.array([[5, 1], [0, 7]])
    axes = figures.confusion({"bp": matrix, "dfa": matrix * 2, "memdfa": matrix * 3}).axes
    assert [a.get_title() for a in axes] == ["BP", "DFA", "MEM-DFA"]
    assert [text.get_text() for text in axes[2].texts] == ["15", "3", "0", "21"]
