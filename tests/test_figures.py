"""Figures from plain tables: what is drawn is what the table says, and the same table gives the same file."""

import numpy as np
import pandas as pd

import memdfa_lab as ml
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


def test_a_profile_marks_the_peak_of_the_ledger_and_names_the_phases():
    trace = ml.experiments.profile("bp", "784-[256]x16-10", 64)
    axes = figures.memory_profiles({"BP": trace.timeline}).axes[0]
    assert [text.get_text() for text in axes.texts if "MiB" in text.get_text()] == [
        f" {trace.peak_bytes / 2**20:.2f} MiB "
    ]
    assert {"forward", "backward"} <= {text.get_text() for text in axes.texts}
    (marker,) = axes.lines
    assert marker.get_ydata()[0] * 2**20 == trace.peak_bytes


def test_phases_that_take_turns_are_one_span():
    phases = [
        "",
        "forward",
        "",
        "error",
        "recompute",
        "local gradient",
        "update",
        "recompute",
        "local gradient",
        "update",
    ]
    assert figures._spans(phases) == [
        ("begin", 0, 1),
        ("forward", 1, 3),
        ("error", 3, 4),
        ("recompute + learn + update", 4, 10),
    ]


def test_bars_and_curves_show_the_tables_numbers():
    rows = [
        {"rule": rule, "depth": depth, "peak_bytes": depth * 2**20, "activations": depth * 2**20, "error": 0}
        for rule in ("bp", "checkpoint")
        for depth in (2, 4)
    ]
    table = pd.DataFrame(rows)
    curves = figures.peak_against(table, "depth", "hidden layers").axes[0]
    assert [list(line.get_ydata()) for line in curves.lines] == [[2, 4], [2, 4]]
    assert [line.get_label() for line in curves.lines] == ["BP", "BP, checkpointing"]
    bars = figures.peak_fillings(table[table["depth"] == 4]).axes[0]
    assert [patch.get_width() for patch in bars.patches] == [4, 4]


def test_every_rule_has_a_style_of_its_own():
    looks = [(style["color"], style["marker"], str(style["linestyle"])) for _, style in figures.STYLES.values()]
    assert set(figures.STYLES) == {*ml.RULES, *ml.BASELINES}
    assert len(set(looks)) == len(looks)
    for part in range(2):
        assert len({look[part] for look in looks}) == len(looks)


def test_the_frontier_has_a_point_a_rule_and_joins_settings():
    row = {"network": "n", "batch_size": 4, "ratio": 1.0, "ratio_low": 0.4, "ratio_high": 1.2, "peak_bytes": 2**20}
    rows = [row | {"rule": rule, "feedback": "none"} for rule in figures.STYLES]
    rows.append(rows[0] | {"rule": "memdfa", "feedback": "stored", "ratio": 0.5})
    rows += [rows[0] | {"rule": "dfa", "feedback": "stored", "ratio": ratio} for ratio in (0.6, 0.7)]
    figure = figures.frontier(pd.DataFrame(rows))
    drawn = [line for line in figure.axes[0].lines if line.get_marker() in "osD^vPX*"]
    assert sorted(len(line.get_ydata()) for line in drawn) == [1] * 9 + [2]
    assert {tuple(line.get_ydata()) for line in drawn} == {(1.0,), (0.5,), (0.6, 0.7)}
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[-2:] == ["MEM-DFA, B stored", "DFA, B stored"]
