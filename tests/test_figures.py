"""Figures from plain tables: what is drawn is what the table says, and the same table gives the same file."""

import io
import itertools
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from matplotlib.text import Text

import memdfa_lab as ml
from memdfa_lab import figures
from memdfa_lab.figures.lives import lives

MIB = 2**20
TABLE = pd.DataFrame(
    [
        (rule, seed, epoch, 1.0 / epoch, 0.5 + 0.1 * epoch + 0.02 * seed)
        for rule in ("bp", "memdfa")
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    ],
    columns=["rule", "seed", "epoch", "loss", "test_accuracy"],
)


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def drawn(axes):
    """Return label -> what a line is drawn at."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


# Lines


def test_lines_are_means_in_a_band_and_bytes_are_in_mib():
    rows = [(rule, x, seed, x * (seed + 1) * MIB) for rule in ("memdfa", "mine") for x in (1, 1000) for seed in (0, 2)]
    table = pd.DataFrame(rows, columns=["rule", "depth", "seed", "peak_bytes"])
    figure = figures.lines(table, "depth", "peak_bytes", log="xy")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert drawn(axes) == {"MEM-DFA": [2, 2000], "mine": [2, 2000]}
    band = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band} >= {(1, 1), (1, 3), (1000, 1000), (1000, 3000)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("depth", "peak bytes (MiB)")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "1,000"]
    assert {"2", "5", "500"} <= {text.get_text() for text in axes.get_yticklabels()}
    assert labels(figure.legends[0]) == ["MEM-DFA", "mine"]


def test_each_panel_has_its_part_in_the_same_looks_and_marks_are_on_top():
    table = pd.DataFrame({"net": ["b", "b", "a"], "who": ["x", "y", "y"], "n": 1, "cost": [1.0, 2.0, 3.0]})
    figure = figures.lines(table, "n", "cost", by="who", panel="net", marks={"measured": table[1:2]})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["b", "a"]
    assert drawn(first) == {"x": [1], "y": [2], "measured": [2]}
    assert [line.get_color() for line in second.lines if line.get_label() == "y"] == [first.lines[1].get_color()]
    assert first.lines[2].get_zorder() > first.lines[1].get_zorder()
    numbered = figures.lines(table.assign(net=[10, 10, 9]), "n", ["cost", "n"], by="who", panel="net")
    assert [axes.get_title() for axes in numbered.axes] == ["net 9", "net 9", "net 10", "net 10"]


def test_a_legend_is_never_cut_off():
    table = pd.DataFrame({"rule": [*figures.STYLES, *(f"a name of {n} letters" * 2 for n in range(4))], "x": 1, "y": 1})
    figure = figures.lines(table, "x", "y")
    figure.draw_without_rendering()
    box, room = figure.legends[0].get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= room.x1
    assert box.y1 < figure.axes[0].get_tightbbox().y0


def test_learning_curves_draw_the_mean_over_seeds():
    loss, error = figures.learning_curves(TABLE).axes
    assert list(drawn(loss)) == ["BP", "MEM-DFA"]
    np.testing.assert_allclose(drawn(loss)["BP"], [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(drawn(error)["MEM-DFA"], [39, 29, 19])
    assert error.get_ylabel() == "test error (%)"


def test_angles_are_drawn_a_panel_a_block_with_a_line_at_a_right_angle():
    rows = [
        (rule, seed, step, block, 90 - step + block + seed, 50.0)
        for rule in ("bp", "minus B")
        for seed in (0, 2)
        for step in (0, 10, 20)
        for block in (1, 2, 3, 4)
    ]
    table = pd.DataFrame(rows, columns=["rule", "seed", "step", "block", "gradient_deg", "signal_deg"])
    panels = {axes.get_title(): axes for axes in figures.alignment(table).axes}
    assert list(panels) == ["block 1", "block 2", "block 3", "block 4"]
    lines = drawn(panels["block 2"])
    assert lines["BP"] == lines["minus B"] == [93, 83, 73]
    assert [90, 90] in lines.values()
    assert panels["block 1"].get_ylim()[1] > 95
    assert set(figures.alignment(table, "signal_deg").axes[0].lines[0].get_ydata()) == {50}


def test_measured_peaks_are_rings_on_the_lines():
    table = pd.DataFrame({"rule": "dfa", "depth": [2, 1000], "peak_bytes": [MIB, 500 * MIB]})
    (axes,) = figures.peak_against(table, "depth", "hidden layers", table.tail(1)).axes
    line, rings = axes.lines
    assert rings.get_linestyle() == "None"
    assert (rings.get_xdata()[0], rings.get_ydata()[0]) == (line.get_xdata()[-1], line.get_ydata()[-1]) == (1000, 500)
    assert axes.get_xlabel() == "hidden layers"


# Steps


def test_a_profile_marks_the_peak_of_the_ledger_and_fits_wherever_it_stands():
    small, large = (ml.experiments.profile(rule, "784-[256]x16-10", 64) for rule in ("memdfa", "bp"))
    figure = figures.memory_profiles({"MEM-DFA": small.timeline, "BP": large.timeline})
    first, second = figure.axes
    (marker,) = second.lines
    assert marker.get_ydata()[0] * MIB == large.peak_bytes
    assert f" {large.peak_bytes / MIB:.2f} MiB " in [text.get_text() for text in second.texts]
    assert {"forward", "backward"} <= {text.get_text() for text in second.texts}
    assert first.get_ylim()[0] == 0
    assert first.get_ylim()[1] * MIB > large.peak_bytes


@pytest.mark.parametrize(
    ("phases", "named"),
    [
        (["", "forward", "", "error", *["recompute", "local gradient", "update"] * 2], "recompute + learn + update"),
        # A deep step is drawn from some of its moments: e's may not be among them.
        (["begin", "forward", "forward", "error", "update", "local gradient", "update", "update"], "learn + update"),
    ],
)
def test_phases_that_take_turns_are_one(phases, named):
    table = pd.DataFrame({"phase": phases, "activations": 0})
    names = [text.get_text() for text in figures.step_profiles({"a": table}, "bytes").axes[0].texts]
    assert names[-4:] == ["begin", "forward", "error", named]


def test_lifetimes_show_two_activations_at_once_for_memdfa_and_all_for_bp():
    traces = {rule: ml.experiments.profile(rule, "784-[64]x5-10", 64) for rule in ("bp", "memdfa")}
    most = {}
    for axes in figures.lifetimes({rule: trace.timeline for rule, trace in traces.items()}).axes:
        bars = [patch.get_bbox() for patch in axes.patches if patch.get_height() == pytest.approx(0.8)]
        most[axes.get_title()] = max(sum(bar.x0 <= box.x0 < bar.x1 for bar in bars) for box in bars)
        assert {round((bar.y0 + bar.y1) / 2) for bar in bars} == {1, 2, 3, 4, 5, 6}
    assert most == {"bp": 6, "memdfa": 2}


# Peaks


def test_the_algorithm_is_drawn_from_predictions_and_is_readmes_picture():
    drawn = ElementTree.fromstring(figures.algorithm(layers=3, units=64, batch=2048))
    size = 4 * 64 * 2048
    optimizer, B = partial(torch.optim.SGD, lr=0.1), ml.feedback.Regenerated(0)
    for rule in ml.RULES:
        trace = ml.memory.predict(rule, partial(ml.models.mlp, 64, [64] * 3, 10), (2048, 64), optimizer, B)
        assert f"{ml.figures.label(rule)} {trace.peak_bytes / size:.1f}" in drawn.attrib["aria-label"]
    svg = "{http://www.w3.org/2000/svg}"
    boxes = {group.get("class"): group.get("opacity") for group in drawn.iter(f"{svg}g")}
    lit = {rule: [boxes[f"memdfa-{rule}-box{row}"] for row in range(4)].count("1") for rule in ml.RULES}
    assert lit == {"bp": 4, "fa": 4, "dfa": 4, "memdfa": 2}  # the still picture is each rule's peak
    committed = ElementTree.parse(Path(__file__).parents[1] / "reports/memdfa.svg").getroot()
    now = ElementTree.fromstring(figures.algorithm())
    numbers, ours = ([part.text for part in picture.iter(f"{svg}text")] for picture in (committed, now))
    assert numbers == ours, "write it anew: the docstring of figures.algorithm says how"


@pytest.mark.parametrize("rule", ml.RULES)
def test_a_life_is_as_long_as_the_work_in_it(rule):
    trace = ml.memory.predict(rule, partial(ml.models.mlp, 64, [64] * 3, 10), (2048, 64))
    bars = lives(trace, blocks=4)
    births = sorted(bar.born for bar in bars if bar.category == "activations" and bar.row == 2)
    assert births[0] == 2  # two forward passes of a block come before
    assert (births[-1] > 4) == (rule == "memdfa")  # it alone makes the activation again
    held = [sum(bar.size_bytes for bar in bars if bar.born <= one.born < bar.end) for one in bars]
    assert trace.peak_bytes == pytest.approx(max(held), abs=64)  # single numbers are left out


def test_a_peaks_bar_is_stacked_and_its_legend_names_what_can_be_seen():
    row = {"rule": "bp", "activations": 4 * MIB, "error": MIB, "gradients": 100}
    figure = figures.peak_fillings(pd.DataFrame([row]))
    bars = [(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches]
    assert bars[:2] == [(0, 4), (4, 1)]
    assert labels(figure.legends[0]) == ["activations", "error"]
    trace = ml.experiments.profile("fa", "784-[64]x2-10", 64)
    figure = figures.memory_profiles({"FA": trace.timeline})
    assert labels(figure.legends[0]) == ["feedback", "activations", "error", "gradients"]


def test_bars_stand_in_a_panel_for_each_value_and_are_named_by_rule_and_text():
    rows = [("bp", "a", "2 layers", MIB, 3 * MIB), ("memdfa", "a", "9", MIB, 0), ("bp", "b", "2 layers", 0, 2 * MIB)]
    table = pd.DataFrame(rows, columns=["rule", "where", "layers", "parameters", "gradients"])
    figure = figures.peak_fillings(table, panel="where", of="layers", xlabel="all (MiB)")
    first, second = figure.axes
    assert [(axes.get_title(), axes.get_xlabel()) for axes in figure.axes] == [("a", "all (MiB)"), ("b", "all (MiB)")]
    assert [bar.get_width() for bar in first.patches] == [1, 1, 3, 0]
    assert [bar.get_width() for bar in second.patches] == [0, 2]
    assert [text.get_text().strip() for text in first.texts] == ["4", "1"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["BP, 2 layers", "MEM-DFA, 9"]


def test_lines_are_named_at_their_ends_without_one_name_on_another():
    rules = ("bp", "fa", "dfa", "memdfa", "checkpoint_step_in_backward")
    ends = {"bp": 100, "fa": 100, "dfa": 95, "checkpoint_step_in_backward": 98, "memdfa": 1}
    table = pd.DataFrame([(rule, x, ends[rule] * x) for rule in rules for x in (1, 2)], columns=["rule", "x", "n"])
    figure = figures.direct_labels(figures.lines(table, "x", "n", marks={"measured": table[:1]}))
    assert not figure.legends
    (axes,) = figure.axes
    assert labels(axes.get_legend()) == ["measured"]
    figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the lines to them
    assert list(boxes) == ["MEM-DFA", "DFA", "BP, checkpointing\n+ step in backward", "BP · FA"]  # upwards
    for lower, upper in itertools.pairwise(boxes.values()):
        assert lower.y1 <= upper.y0
    assert max(box.x1 for box in boxes.values()) <= figure.bbox.x1


def test_the_frontier_has_a_point_a_rule_and_joins_settings():
    row = {"network": "n", "batch_size": 4, "ratio": 1.0, "ratio_low": 0.4, "ratio_high": 1.2, "peak_bytes": MIB}
    rows = [row | {"rule": rule, "feedback": "none"} for rule in figures.STYLES]
    rows.append(rows[0] | {"rule": "memdfa", "feedback": "stored", "ratio": 0.5})
    rows += [rows[0] | {"rule": "dfa", "feedback": "stored", "ratio": ratio} for ratio in (0.6, 0.7)]
    rows.append(rows[0] | {"rule": "memdfa", "pass1": "int8", "ratio": 0.8})
    figure = figures.frontier(pd.DataFrame(rows))
    points = [line for line in figure.axes[0].lines if line.get_marker() in "osD^vPX*"]
    assert sorted(len(line.get_ydata()) for line in points) == [1] * 10 + [2]
    assert {tuple(line.get_ydata()) for line in points} == {(1.0,), (0.5,), (0.8,), (0.6, 0.7)}
    assert labels(figure.legends[0])[-3:] == ["MEM-DFA, B stored", "DFA, B stored", "MEM-DFA, pass 1 in int8"]
    assert figure.axes[0].get_ylim()[1] > 1.25  # no marker is cut at the top: the largest ratio_high is 1.2


# Signals


@pytest.mark.parametrize(("C", "n"), [(10, 100), (19, 20), (20, 20), (20, 19), (100, 20), (1000, 7)])
def test_the_density_of_singular_values_has_the_area_and_the_mean_square_of_a_density(C, n):
    v = np.linspace(0, 1.1 + np.sqrt(C / n), 200_001)
    density = figures.marchenko_pastur(v, C, n)
    assert np.trapezoid(density, v) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(density * v**2, v) == pytest.approx(C / min(C, n), rel=1e-3)  # E |B|^2 = C n σ^2


# Looks and files


def test_every_rule_has_a_style_of_its_own_and_so_has_each_of_the_other_looks():
    assert set(figures.STYLES) == {*ml.RULES, *ml.BASELINES, *ml.LOCAL_RULES}
    for looks in ([style for _, style in figures.STYLES.values()], figures.LOOKS):
        for parts in (("color",), ("marker",), ("color", "marker", "linestyle")):
            assert len({tuple(str(look[part]) for part in parts) for look in looks}) == len(looks)


def test_a_colour_is_for_a_rule_or_for_a_kind_of_memory():
    rules = {look["color"].lower() for _, look in figures.STYLES.values()}
    kinds = [color.lower() for color, _ in figures.FILLS.values()]
    assert len(set(kinds)) == len(kinds)
    assert not rules & set(kinds)


def test_the_same_table_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        figures.save(figures.learning_curves(TABLE), tmp_path / folder / "curves")
    for kind in ("svg", "png"):
        one, other = ((tmp_path / folder / f"curves.{kind}").read_bytes() for folder in ("a", "b"))
        assert one == other
        assert len(one) > 5000


def test_a_dot_in_a_files_name_is_no_suffix(tmp_path):
    for name in ("lr0.01", "lr0.02", "profile.svg"):
        svg, png = figures.save(figures.learning_curves(TABLE), tmp_path / name)
        assert svg.read_text().startswith("<?xml")
        assert png.read_bytes().startswith(b"\x89PNG")
    stems = ("lr0.01", "lr0.02", "profile")
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}


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


def test_no_figure_is_left_with_pyplot_and_its_settings_are_as_before():
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    figures.learning_curves(TABLE)
    with pytest.raises(ValueError, match="lacks"):
        figures.learning_curves(TABLE.drop(columns="loss"))
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before
