"""Figures from plain tables: what is drawn is what the table says, and the same table gives the same file."""

import io

import numpy as np
import pandas as pd
import PIL.Image
import pytest

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


def test_the_largest_profile_fits_wherever_it_stands():
    small, large = (ml.experiments.profile(rule, "784-[256]x16-10", 64) for rule in ("memdfa", "bp"))
    axes = figures.memory_profiles({"MEM-DFA": small.timeline, "BP": large.timeline}).axes[0]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] * 2**20 > large.peak_bytes


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
    assert figures.profiles._spans(phases) == [
        ("begin", 0, 1),
        ("forward", 1, 3),
        ("error", 3, 4),
        ("recompute + learn + update", 4, 10),
    ]
    # A deep step is drawn from some of its moments: e's may not be among them.
    assert figures.profiles._spans(["forward", "update", "local gradient", "update"]) == [
        ("forward", 0, 1),
        ("learn + update", 1, 4),
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


def test_rings_are_where_they_were_measured_and_axes_have_plain_numbers():
    table = pd.DataFrame({"rule": "dfa", "depth": [2, 1000], "peak_bytes": [2**20, 500 * 2**20]})
    figure = figures.peak_against(table, "depth", "hidden layers", table.tail(1))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    line, rings = axes.lines
    assert rings.get_linestyle() == "None"
    assert (rings.get_xdata()[0], rings.get_ydata()[0]) == (line.get_xdata()[-1], line.get_ydata()[-1]) == (1000, 500)
    assert rings.get_zorder() > line.get_zorder()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "1,000"]
    assert {"1", "2", "5", "500"} <= {text.get_text() for text in axes.get_yticklabels()}


def test_lifetimes_show_two_activations_at_once_for_memdfa_and_all_for_bp():
    traces = {rule: ml.experiments.profile(rule, "784-[64]x5-10", 64) for rule in ("bp", "memdfa")}
    panels = figures.lifetimes({rule: trace.timeline for rule, trace in traces.items()}).axes
    most = {}
    for axes in panels:
        bars = [box for bar in axes.collections for box in [bar.get_paths()[0].get_extents()] if box.height > 0.5]
        most[axes.get_title()] = max(sum(bar.x0 <= box.x0 < bar.x1 for bar in bars) for box in bars)
        assert {round((bar.y0 + bar.y1) / 2) for bar in bars} == {1, 2, 3, 4, 5, 6}
    assert most == {"bp": 6, "memdfa": 2}


def test_what_rests_is_drawn_beside_a_peak_and_what_is_not_there_is_not():
    table = pd.DataFrame({"depth": [1, 2], "parameters": [2**20, 2**21], "feedback": 0, "peak memdfa": 2**20})
    (axes,) = figures.rest_against(table, "depth", "layers").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {"weights and biases": [1, 2], "peak above rest, MEM-DFA": [1, 1]}
    looks = [(style["color"], str(style["linestyle"])) for _, style in figures.RESTING.values()]
    assert len(set(looks)) == len(looks)


def test_a_legend_names_what_can_be_seen():
    row = {"rule": "bp", "activations": 2**20, "error": 2**19, "gradients": 100}
    (legend,) = figures.peak_fillings(pd.DataFrame([row])).legends
    assert [text.get_text() for text in legend.get_texts()] == ["activations", "error"]
    trace = ml.experiments.profile("fa", "784-[64]x2-10", 64)
    (legend,) = figures.memory_profiles({"FA": trace.timeline}).legends
    assert [text.get_text() for text in legend.get_texts()] == ["feedback", "activations", "error", "gradients"]


def test_the_knob_is_drawn_in_percent_of_blocks():
    table = pd.DataFrame({"rule": "memdfa", "peak_bytes": [2**20, 2**21], "run_again": [1.0, 0.25]})
    (line,) = figures.keep_frontier(table).axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [100, 25])


def test_a_picture_is_small_and_as_sharp_as_the_figure():
    figure = figures.learning_curves(TABLE)
    shown = figures.picture(figure, "curves")
    pixels = PIL.Image.open(io.BytesIO(shown.data))
    assert pixels.size == tuple(round(150 * inches) for inches in figure.get_size_inches())
    figure.savefig(whole := io.BytesIO(), dpi=150)
    assert len(shown.data) < len(whole.getvalue()) / 2
    off = np.abs(np.asarray(pixels.convert("RGB"), int) - np.asarray(PIL.Image.open(whole).convert("RGB"), int))
    assert off.max() < 60
    assert off.mean() < 0.5


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


def test_angles_are_drawn_as_means_over_seeds_a_panel_a_block():
    rows = [
        (rule, seed, step, block, 90 - step + block + seed, 50.0)
        for rule in ("bp", "minus B")
        for seed in (0, 2)
        for step in (0, 10, 20)
        for block in (1, 2, 3, 4)
    ]
    columns = ["rule", "seed", "step", "block", "gradient_deg", "signal_deg"]
    figure = figures.alignment(pd.DataFrame(rows, columns=columns))
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["block 1", "block 2", "block 3", "block 4"]
    lines = {line.get_label(): list(line.get_ydata()) for line in panels["block 2"].lines}
    assert lines["BP"] == lines["minus B"] == [93, 83, 73]
    assert [90, 90] in lines.values()
    assert panels["block 1"].get_ylim()[1] > 95
    signals = figures.alignment(pd.DataFrame(rows, columns=columns), "signal_deg").axes[0].lines
    assert set(signals[0].get_ydata()) == {50}


def test_the_balance_has_two_lines_a_start_and_its_angle_and_loss():
    columns = ["start", "step", "product", "norm", "angle_deg", "loss"]
    rows = [(start, step, step, step + start, 90 - step, 10.0**-step) for start in (0.1, 0.3) for step in (0, 1, 2)]
    both, angle, loss = figures.balance(pd.DataFrame(rows, columns=columns)).axes
    assert [list(line.get_ydata()) for line in both.lines] == [[0, 1, 2], [0.1, 1.1, 2.1], [0, 1, 2], [0.3, 1.3, 2.3]]
    assert list(angle.lines[1].get_ydata()) == [90, 89, 88]
    assert [line.get_label() for line in loss.lines] == ["first weights × 0.1", "first weights × 0.3"]


def test_the_spectrum_is_drawn_on_the_limit_of_large_random_matrices():
    C, n = 100, 400
    generator = np.random.default_rng(0)
    values = {"random": np.linalg.svd(generator.normal(size=(C, n)), compute_uv=False) / n**0.5, "flat": np.ones(C)}
    table = pd.DataFrame(
        [(name, n, 0, value) for name, found in values.items() for value in found],
        columns=["distribution", "width", "draw", "value"],
    )
    spread, edges = figures.spectrum(table, C, n).axes
    outline = spread.collections[0].get_paths()[0].vertices
    density = outline[outline[:, 1] > 0]
    assert outline[:, 0].min() == pytest.approx(0.5)
    assert outline[:, 0].max() == pytest.approx(1.5)
    upper = density[np.argsort(density[:, 0])]
    assert np.trapezoid(upper[:, 1], upper[:, 0]) == pytest.approx(1, abs=0.01)
    below = np.trapezoid(upper[upper[:, 0] < 1, 1], upper[upper[:, 0] < 1, 0])
    assert (values["random"] < 1).mean() == pytest.approx(below, abs=0.03)
    (flat,) = spread.lines
    assert set(flat.get_xdata()) == {1}
    assert [list(line.get_ydata()) for line in edges.lines[2:]] == [[1], [1]]
    assert edges.lines[0].get_ydata()[0] == pytest.approx(values["random"].max())


def test_accuracy_and_angles_are_drawn_against_the_scale_of_B():
    rows = [
        (scale, seed, block, 80 + block + seed, 0.5 + 0.1 * seed)
        for scale in (0.1, 1.0)
        for seed in (0, 2)
        for block in (1, 2)
    ]
    table = pd.DataFrame(rows, columns=["scale", "seed", "block", "gradient_deg", "accuracy"])
    table.loc[table["scale"] == 1.0, "gradient_deg"] = np.nan  # it ran away
    accuracy, angle = figures.against_scale(table, {"BP": 0.9}).axes
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [60, 60])
    assert list(accuracy.lines[1].get_ydata()) == [90, 90]
    assert [text.get_text() for text in accuracy.texts] == ["BP"]
    np.testing.assert_allclose(angle.lines[1].get_ydata(), [83, np.nan])


def test_a_feature_map_has_zero_in_the_middle_of_its_rows_own_scale():
    rows = {"B": np.array([[[0.0, 2.0]], [[-4.0, 1.0]]]), "BP": np.full((1, 2, 2), 0.5)}
    panels = np.array(figures.signal_images(rows).axes).reshape(2, 2)
    shown = [[axes.images[0] if axes.images else None for axes in line] for line in panels]
    assert [image.get_clim() for image in shown[0]] == [(-4, 4)] * 2
    assert shown[1][0].get_clim() == (-0.5, 0.5)
    assert shown[1][1] is None
    np.testing.assert_array_equal(shown[0][1].get_array(), rows["B"][1])
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["B", "BP"]


def test_block_angles_are_hollow_before_and_filled_after():
    rows = [
        ("net", "fa", 1, "conv", 90.0, 80.0),
        ("net", "fa", 2, "dense", 0.0, 0.0),
        ("mlp", "dfa", 1, "dense", 91, 60),
    ]
    columns = ["network", "rule", "block", "layer", "before_deg", "after_deg"]
    net, mlp = figures.block_angles(pd.DataFrame(rows, columns=columns)).axes
    before, after = net.lines[:2]
    assert [before.get_label(), after.get_label()] == ["FA, before", "FA, after"]
    assert [list(before.get_ydata()), list(after.get_ydata())] == [[90, 0], [80, 0]]
    assert before.get_markerfacecolor() == "white" != after.get_markerfacecolor()
    assert [label.get_text() for label in net.get_xticklabels()] == ["1\nconv", "2\ndense"]
    assert [axes.get_title() for axes in (net, mlp)] == ["net", "mlp"]
    assert list(mlp.lines[1].get_ydata()) == [60]
