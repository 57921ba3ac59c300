"""The explorer without a browser: its numbers against the prediction, its controls, and what it says of wrong ones."""

from __future__ import annotations

import asyncio
import base64
import re
import sys

import ipywidgets
import numpy as np
import pandas as pd
import pytest

import memdfa_lab as ml
from memdfa_lab import figures, widgets
from memdfa_lab.memory.trace import readable
from memdfa_lab.widgets import base, memory

CONVNET = {"family": "convnet", "inputs": 784, "precision": "float64"}
SMALL = {"depth": 5, "width": 20, "batch": 6, "inputs": 30, "classes": 4}


def predicted(rule, *, depth, width, batch, inputs, classes, **net):
    return ml.memory.predict(rule, lambda: ml.models.mlp(inputs, [width] * depth, classes, **net), (batch, inputs))


# ------------------------------------------------------------------------------------------------ what is computed


def test_the_table_is_the_prediction():
    table = widgets.explore(**SMALL, feedback="stored", rules=tuple(widgets.ALL_RULES)).peaks.set_index("rule")
    assert list(table.index) == [*ml.RULES, *ml.BASELINES, *ml.LOCAL_RULES]
    for rule, row in table.iterrows():
        trace = predicted(rule, **SMALL)
        assert (row["peak_bytes"], row["resting_bytes"]) == (trace.peak_bytes, trace.resting_bytes)
        assert row["held_bytes"] == trace.peak_bytes + trace.resting_bytes
        for name in ml.memory.CATEGORIES:
            assert row.get(name, 0) == trace.peak_by_category.get(name, 0)
            assert row.get(f"resting {name}", 0) == trace.resting_by_category.get(name, 0)


@pytest.mark.parametrize("count_rest", [False, True])
def test_the_curve_is_the_prediction(count_rest):
    curve = widgets.explore(**SMALL, rules=("fa", "memdfa"), feedback="stored", count_rest=count_rest).curve
    assert set(curve["depth"]) == {*memory.CURVE, 5}
    for row in curve[curve["depth"].isin([2, 5, 12, 96])].itertuples():
        trace = predicted(row.rule, **SMALL | {"depth": row.depth})
        assert row.bytes == trace.peak_bytes + count_rest * trace.resting_bytes


@pytest.mark.parametrize("depth", [1, 5, 300])
def test_the_drawn_moments_are_of_the_step(depth):
    small = SMALL | {"depth": depth}
    drawn = widgets.explore(**small, feedback="stored", rules=("dfa",)).steps["DFA"]
    by_category = predicted("dfa", **small, activation="relu").by_category
    total = drawn.drop(columns="phase").sum(axis=1)
    assert total.max() == by_category.sum(axis=1).max()
    assert len(drawn) == min(memory.MOMENTS, len(by_category))
    if depth < 300:  # each event is drawn
        for name in by_category:
            assert list(drawn.get(name, pd.Series(0, range(len(drawn))))) == list(by_category[name])
    assert {"forward", "error", "local gradient", "update"} <= set(drawn["phase"])


def test_what_rests_can_be_drawn_below():
    alone, whole = (
        widgets.explore(**SMALL, optimizer="adam", feedback="stored", rules=("fa",), count_rest=rest).steps["FA"]
        for rest in (False, True)
    )
    trace = widgets.explore(**SMALL, optimizer="adam", feedback="stored", rules=("fa",)).peaks.iloc[0]
    more = (whole.drop(columns="phase").sum(axis=1) - alone.drop(columns="phase").sum(axis=1)).unique()
    assert list(more) == [trace["resting_bytes"]]
    assert list(whole.columns[1:5]) == ["parameters", "optimizer state", "feedback", "input"]


@pytest.mark.parametrize(
    "changes",
    [{}, CONVNET, {"optimizer": "adam", "feedback": "shared", "batch_norm": True, "depth": 1}, {"feedback": "learned"}],
)
def test_the_line_of_code_gives_the_peaks(changes):
    found = widgets.explore(**SMALL | changes, rules=("dfa", "checkpoint"))
    traces = eval(found.setting.code, {"ml": ml})
    peaks = found.peaks.set_index("rule")["peak_bytes"]
    assert {rule: trace.peak_bytes for rule, trace in traces.items()} == dict(peaks)
    assert "\n" not in found.setting.code


def test_the_numbers_as_html():
    found = widgets.explore(rules=("bp", "memdfa"), budget="64 GiB", width=64)
    first, table = found.html(), found.table
    text = found.html()
    for row in table.itertuples():
        peak = f"<span title='{row.peak_bytes:,} bytes'>{readable(row.peak_bytes)}</span>"
        assert peak in text
        assert peak in first
        assert f"<td>{row.largest_batch:,}</td>" in text
        assert f"<td>{row.largest_batch:,}</td>" not in first
    assert f"{memory.DEEPEST:,} or more" in text
    assert first.count("<tr>") == text.count("<tr>")
    assert "color" not in text.replace("rgba(128,128,128,0.4)", "")  # it is read on light and dark
    nothing = widgets.explore(budget="1 kB", rules=("bp",))
    assert list(nothing.table[["largest_batch", "deepest"]].iloc[0]) == [0, 0]
    assert nothing.html().count("<td>none</td>") == 2
    assert len(re.findall("[KM]iB", found.summary())) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("8 GiB", 2**33), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("7", 7), ("2 TB", 2 * 10**12), (" 3 B ", 3)],
)
def test_sizes(text, size):
    assert ml.memory.bytes_of(text) == size


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": "much"}, "8 GiB, 500 MB or 640 KiB, got 'much'"),
        ({"budget": "0 GiB"}, "got '0 GiB'"),
        ({"budget": "-8 GiB"}, "got '-8 GiB'"),
        ({"depth": 1001}, "depth must be less than or equal to 1000, got 1001"),
        ({"batch": 0}, "batch must be greater than or equal to 1"),
        ({"width": 1.5}, "width must be a valid integer"),
        ({"rules": ()}, "tick one or more"),
        ({"rules": ("memdfaa",)}, "did you mean 'memdfa'"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"feedback": "store"}, "stored"),
        ({"activation": "rellu"}, "relu"),
        ({"family": "convnets"}, "did you mean 'convnet'"),
        ({"precision": "float16"}, "float32"),
        ({"family": "convnet", "inputs": 30}, "a convnet takes images, of 784 (1x28x28), 3,072"),
        ({"batch": 1, "batch_norm": True}, "BatchNorm needs two examples"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)) as problem:
        widgets.explore(**wrong)
    assert "\n" not in str(problem.value)


# ------------------------------------------------------------------------------------------------ the figures


def test_the_depth_figure_marks_the_depth_and_the_budget():
    found = widgets.explore(rules=("bp", "memdfa"), count_rest=True, depth=100, budget="1 GiB")
    axes = found.depth_figure().axes[0]
    marked = [line for line in axes.lines if list(line.get_xdata()) == [100]]
    assert [line.get_ydata()[0] * figures.MIB for line in marked] == list(found.peaks["held_bytes"])
    labels = {line.get_label(): line for line in axes.lines}
    assert set(labels["budget"].get_ydata()) == {1024}
    assert list(labels["BP"].get_xdata()) == sorted({*memory.CURVE, 100})
    assert axes.get_ylabel() == "peak + rest (MiB)"
    above = widgets.explore(rules=("bp",)).depth_figure().axes[0]
    assert above.get_ylabel() == "peak above rest (MiB)"
    assert "budget" not in [line.get_label() for line in above.lines]


def test_the_step_figure_stacks_to_the_peak_on_one_scale():
    found = widgets.explore(rules=("bp", "memdfa", "dfa"))
    figure = found.steps_figure()
    assert [axes.get_title() for axes in figure.axes] == ["BP", "MEM-DFA", "DFA"]
    tops = [max(fill.get_datalim(axes.transData).y1 for fill in axes.collections) for axes in figure.axes]
    assert [round(top * figures.MIB) for top in tops] == list(found.peaks["peak_bytes"])
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert [axes.get_xlabel() for axes in figure.axes] == ["", *["time (events)"] * 2]
    assert len(widgets.explore(rules=("memdfa",)).steps_figure().axes) == 1


# ------------------------------------------------------------------------------------------------ the widget


def below(widget):
    return [widget, *(part for child in getattr(widget, "children", ()) for part in below(child))]


def change(explorer, name, value):
    """Change a control, and do the first part of what follows, as the kernel's loop would."""
    explorer.controls[name].value = value
    explorer.next_part()


def test_each_control_changes_what_is_shown():
    explorer = ml.widgets.memory_explorer(**SMALL | {"inputs": 784, "classes": 10}, rules=("bp", "memdfa"))
    changes = {
        "depth": 40,
        "width": 64,
        "batch": 256,
        "activation": "gelu",
        "batch_norm": True,
        "optimizer": "adam",
        "feedback": "stored",
        "count_rest": True,
        "budget": "2 GB",
        "inputs": 3072,
        "classes": 100,
        "precision": "bfloat16",
        "family": "convnet",
    }
    assert explorer.controls.keys() == {*changes, "model"}
    for name, value in changes.items():
        before = explorer.numbers.value, explorer.code.value, explorer.picture.value
        change(explorer, name, value)
        assert (explorer.numbers.value, explorer.code.value, explorer.picture.value) != before, name
        assert not explorer.message.value
    explorer.ticks["checkpoint"].value = True
    explorer.finish()
    expected = widgets.explore(**changes, rules=("bp", "memdfa", "checkpoint"))
    assert explorer.setting == expected.setting
    assert explorer.explored.table.equals(expected.table)
    assert explorer.numbers.value == expected.html()
    for picture in (explorer.picture, explorer.profiles):
        found = re.fullmatch(r"<img src='data:image/png;base64,(.+)' alt='(.+)' style='.+'>", picture.value)
        assert base64.b64decode(found[1]).startswith(b"\x89PNG")
        assert expected.summary() in found[2]
    assert "checkpoint" in explorer.code.value


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_a_model_by_name_has_bars_and_no_depth():
    setting = widgets.Setting(family="model", model="resnet18@3x32x32", batch=4, rules=("bp", "memdfa"), budget="1 GiB")
    found = widgets.explore(setting, count_rest=True)
    net = ml.models.build("torchvision.models:resnet18@3x32x32")
    traces = {rule: ml.memory.predict(rule, net, (4, 3, 32, 32)) for rule in setting.rules}
    assert list(found.peaks["peak_bytes"]) == [trace.peak_bytes for trace in traces.values()]
    assert {rule: t.peak_bytes for rule, t in eval(setting.code, {"ml": ml}).items()} == {
        rule: t.peak_bytes for rule, t in traces.items()
    }
    assert "deepest" not in found.table
    for row in found.table.itertuples():
        sizes = [memory.step_of(row.rule, setting, 1, row.largest_batch + more).held_bytes for more in (0, 1)]
        assert sizes[0] <= 2**30 < sizes[1]
    (axes,) = found.depth_figure().axes
    ends = [max(bar.get_x() + bar.get_width() for bar in axes.patches if round(bar.get_y()) == row) for row in (0, 1)]
    assert [round(end * figures.MIB) for end in ends] == list(found.peaks["held_bytes"])
    assert found.html().count("<tr>") == 4  # two rules in two tables
    assert "hidden layers" not in found.html() + found.summary()

    explorer = ml.widgets.memory_explorer(setting)
    explorer.finish()
    for row in explorer.explored.table.itertuples():
        assert f"<td>{row.largest_batch:,}</td>" in explorer.numbers.value
    assert explorer.controls["depth"].disabled
    assert not explorer.controls["model"].disabled
    for name, said in {"resnet1": "did you mean &#x27;resnet18&#x27;", "googlenet": "a tensor to a tensor"}.items():
        change(explorer, "model", name)
        assert said in explorer.message.value
        assert explorer.explored.setting == setting
    change(explorer, "family", "mlp")
    assert not explorer.message.value
    assert not explorer.controls["depth"].disabled
    assert explorer.controls["model"].disabled


def test_a_torchvision_that_is_not_there_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match=r"cannot import torchvision\.models") as problem:
        widgets.explore(family="model")
    assert "\n" not in str(problem.value)


def test_the_depth_slider_is_logarithmic():
    depths = np.array(memory.DEPTHS)
    steps = depths[4:] / depths[3:-1]
    assert (depths[0], depths[-1]) == (1, 1000)
    assert 1.1 < steps.min() < steps.max() < 1.3


def test_the_peaks_come_first_and_what_fits_the_budget_last():
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa", "bp"))
    for row in explorer.explored.peaks.itertuples():
        assert f"{row.peak_bytes:,} bytes" in explorer.numbers.value
    assert "<img" in explorer.picture.value
    assert (explorer.profiles.value, explorer.numbers.value.count("…")) == ("", 4)
    explorer.next_part()
    assert "<img" in explorer.profiles.value
    explorer.next_part()
    assert explorer.numbers.value.count("…") == 2
    explorer.finish()
    for row in explorer.explored.table.itertuples():
        assert f"<td>{row.largest_batch:,}</td>" in explorer.numbers.value


def test_it_has_labels_and_no_output_widget():
    explorer = ml.widgets.memory_explorer(rules=("memdfa",))
    explorer.finish()
    parts = below(explorer)
    assert not any(isinstance(part, ipywidgets.Output) for part in parts)
    for part in parts:
        if hasattr(part, "value") and not isinstance(part, ipywidgets.HTML):
            assert part.description, part
    images = [part for part in parts if isinstance(part, ipywidgets.HTML) and "<img" in part.value]
    assert len(images) == 2
    assert repr(parts[0]) == "The memory explorer: run this cell to use it."


def test_an_error_is_shown_and_what_was_shown_stays(monkeypatch):
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa",))
    shown, numbers = explorer.explored, explorer.numbers.value
    change(explorer, "budget", "<b>much")
    assert "<p role='alert'><b>the budget must be a size such as 8 GiB" in explorer.message.value
    assert "got &#x27;&lt;b&gt;much&#x27;" in explorer.message.value
    assert (explorer.explored, explorer.numbers.value) == (shown, numbers)
    change(explorer, "budget", "9 GiB")
    assert not explorer.message.value
    explorer.ticks["memdfa"].value = False
    explorer.next_part()
    assert "no rule is chosen" in explorer.message.value
    explorer.ticks["memdfa"].value = True
    change(explorer, "batch_norm", True)
    change(explorer, "batch", 1)
    assert "BatchNorm needs two examples" in explorer.message.value

    def broken(*arguments):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(memory, "explore", broken)
    change(explorer, "batch", 2)
    assert "<b>broken in two lines; below" in explorer.message.value


def test_a_drag_is_shown_once(monkeypatch):
    shown = []
    monkeypatch.setattr(memory, "explore", lambda setting: shown.append(setting.depth) or widgets.explore(setting))
    monkeypatch.setattr(base, "DRAG_S", 3600)

    async def drag() -> None:
        explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa",))
        for depth in memory.DEPTHS[6:16]:
            explorer.controls["depth"].value = depth
            await asyncio.sleep(0)
        assert shown == [5]
        assert explorer.explored.setting.depth == 32  # what is asked for is what the controls say

    asyncio.run(drag())
    assert shown == [5, 32]


def test_a_change_takes_the_place_of_what_is_still_to_come():
    async def change_twice() -> str:
        explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa",))
        explorer.controls["depth"].value = 7
        explorer.catch_up()
        explorer.controls["depth"].value = 8
        while "…" in explorer.numbers.value or not explorer.profiles.value:
            await asyncio.sleep(0.01)
        return explorer.profiles.value

    assert ", 8 hidden layers" in asyncio.run(change_twice())


def test_a_b_that_learns_is_drawn_for_all_rules_and_learns_where_it_can():
    setting = widgets.Setting(depth=3, width=8, batch=4, feedback="learned")
    fixed = setting.changed(feedback="stored")
    B = {
        rule: [s.predict(rule, 3).resting_by_category["feedback"] for s in (setting, fixed)]
        for rule in ("fa", "memdfa")
    }
    assert B["fa"][0] == B["fa"][1]
    assert B["memdfa"][0] > 2 * B["memdfa"][1]  # and its optimizer's state
    exec(f"found = {setting.code}", space := {"ml": ml})
    assert {rule: trace.peak_bytes for rule, trace in space["found"].items()} == {
        rule: setting.predict(rule, 3).peak_bytes for rule in setting.rules
    }
