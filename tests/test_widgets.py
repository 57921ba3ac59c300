"""The explorer without a browser: its numbers against the prediction, its controls, and what it says of wrong ones."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
import sys

import ipywidgets
import pandas as pd
import pytest

import memdfa_lab as ml
from memdfa_lab import figures, widgets
from memdfa_lab.memory.trace import readable
from memdfa_lab.widgets import memory, setting

CONVNET = {"family": "convnet", "inputs": 784, "precision": "float64"}
SMALL = {"depth": 5, "width": 20, "batch": 6, "inputs": 30, "classes": 4}


def predicted(rule, *, depth, width, batch, inputs, classes, **net):
    return ml.memory.predict(rule, lambda: ml.models.mlp(inputs, [width] * depth, classes, **net), (batch, inputs))


# ------------------------------------------------------------------------------------------------ what is computed


def test_the_table_is_the_prediction():
    table = widgets.explore(**SMALL, feedback="stored", rules=tuple(widgets.ALL_RULES)).table.set_index("rule")
    assert list(table.index) == [*ml.RULES, *ml.BASELINES]
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
    assert set(curve["depth"]) == {*setting.CURVE, 5}
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
    assert len(drawn) == min(setting.MOMENTS, len(by_category))
    if depth < 300:  # each event is drawn
        for name in by_category:
            assert list(drawn.get(name, pd.Series(0, range(len(drawn))))) == list(by_category[name])
    assert {"forward", "error", "local gradient", "update"} <= set(drawn["phase"])


def test_what_rests_can_be_drawn_below():
    alone, whole = (
        widgets.explore(**SMALL, optimizer="adam", feedback="stored", rules=("fa",), count_rest=rest).steps["FA"]
        for rest in (False, True)
    )
    trace = widgets.explore(**SMALL, optimizer="adam", feedback="stored", rules=("fa",)).table.iloc[0]
    more = (whole.drop(columns="phase").sum(axis=1) - alone.drop(columns="phase").sum(axis=1)).unique()
    assert list(more) == [trace["resting_bytes"]]
    assert list(whole.columns[1:5]) == ["parameters", "optimizer state", "feedback", "input"]


@pytest.mark.parametrize(
    "changes", [{}, CONVNET, {"optimizer": "adam", "feedback": "shared", "batch_norm": True, "depth": 1}]
)
def test_the_line_of_code_gives_the_peaks(changes):
    explored = widgets.explore(**SMALL | changes, rules=("dfa", "checkpoint"))
    traces = eval(explored.setting.code, {"ml": ml})
    assert {rule: trace.peak_bytes for rule, trace in traces.items()} == dict(
        zip(explored.table["rule"], explored.table["peak_bytes"], strict=True)
    )
    assert "\n" not in explored.setting.code


def test_the_numbers_as_html():
    explored = widgets.explore(rules=("bp", "memdfa"), budget="64 GiB", width=64)
    text = explored.html()
    for row in explored.table.itertuples():
        assert f"<span title='{row.peak_bytes:,} bytes'>{readable(row.peak_bytes)}</span>" in text
        assert f"<td>{row.largest_batch:,}</td>" in re.sub(r" style='[^']*'", "", text)
    assert f"{setting.MOST_LAYERS:,} or more" in text
    assert "color" not in re.sub(r"rgba\(128,128,128,0.4\)", "", text)  # it is read on light and dark
    nothing = widgets.explore(budget="1 kB", rules=("bp",))
    assert "none" in nothing.html()
    assert list(nothing.table[["largest_batch", "deepest"]].iloc[0]) == [0, 0]
    assert explored.summary().count("MiB") + explored.summary().count("KiB") == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("8 GiB", 2**33), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("7", 7), ("2 TB", 2 * 10**12), (" 3 B ", 3)],
)
def test_sizes(text, size):
    assert widgets.bytes_of(text) == size


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": "much"}, "8 GiB, 500 MB or 640 KiB, got 'much'"),
        ({"budget": "0 GiB"}, "got '0 GiB'"),
        ({"budget": "-8 GiB"}, "got '-8 GiB'"),
        ({"depth": 1001}, "depth must be a whole number from 1 to 1,000, got 1001"),
        ({"batch": 0}, "batch must be a whole number from 1"),
        ({"width": 1.5}, "width must be a whole number"),
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
    explored = widgets.explore(rules=("bp", "memdfa"), count_rest=True, depth=100, budget="1 GiB")
    axes = explored.depth_figure().axes[0]
    marked = [line for line in axes.lines if list(line.get_xdata()) == [100]]
    assert [line.get_ydata()[0] * figures.MIB for line in marked] == list(explored.table["held_bytes"])
    labels = {line.get_label(): line for line in axes.lines}
    assert set(labels["budget"].get_ydata()) == {1024}
    assert list(labels["BP"].get_xdata()) == sorted({*setting.CURVE, 100})
    assert axes.get_ylabel() == "peak, with what rests (MiB)"
    above = widgets.explore(rules=("bp",)).depth_figure().axes[0]
    assert above.get_ylabel() == "peak above rest (MiB)"
    assert "budget" not in [line.get_label() for line in above.lines]


def test_the_step_figure_stacks_to_the_peak_on_one_scale():
    explored = widgets.explore(rules=("bp", "memdfa", "dfa"))
    figure = explored.steps_figure()
    assert [axes.get_title() for axes in figure.axes] == ["BP", "MEM-DFA", "DFA"]
    tops = [max(fill.get_datalim(axes.transData).y1 for fill in axes.collections) for axes in figure.axes]
    assert [round(top * figures.MIB) for top in tops] == list(explored.table["peak_bytes"])
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert [axes.get_xlabel() for axes in figure.axes] == ["", *["births and frees, in order"] * 2]
    assert len(widgets.explore(rules=("memdfa",)).steps_figure().axes) == 1


# ------------------------------------------------------------------------------------------------ the widget


def below(widget):
    return [widget, *(part for child in getattr(widget, "children", ()) for part in below(child))]


def pictures(explorer):
    return [
        re.fullmatch(r"<img src='data:image/png;base64,(.+)' alt='(.+)' style='.+'>", part.value)
        for part in (explorer.depths, explorer.profiles)
    ]


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
        "data": (3072, 100),
        "precision": "bfloat16",
        "family": "convnet",
    }
    assert explorer.controls.keys() == changes.keys()
    for name, value in changes.items():
        before = explorer.numbers.value, explorer.code.value, explorer.depths.value
        explorer.controls[name].value = value
        assert (explorer.numbers.value, explorer.code.value, explorer.depths.value) != before, name
        assert not explorer.message.value
    explorer.ticks["checkpoint"].value = True
    del changes["data"]
    expected = widgets.explore(**changes, inputs=3072, classes=100, rules=("bp", "memdfa", "checkpoint"))
    assert explorer.setting == expected.setting
    assert explorer.explored.table.equals(expected.table)
    assert explorer.numbers.value == expected.html()
    for found in pictures(explorer):
        assert base64.b64decode(found[1]).startswith(b"\x89PNG")
        assert expected.summary() in found[2]
    assert "checkpoint" in explorer.code.value


def test_it_has_labels_and_no_output_widget():
    parts = below(ml.widgets.memory_explorer(rules=("memdfa",)))
    assert not any(isinstance(part, ipywidgets.Output) for part in parts)
    for part in parts:
        if hasattr(part, "value") and not isinstance(part, ipywidgets.HTML):
            assert part.description, part
    images = [part for part in parts if isinstance(part, ipywidgets.HTML) and "<img" in part.value]
    assert len(images) == 2
    assert repr(parts[0]) == "The memory explorer: run this cell to use it."


def test_what_cannot_be_is_said_and_what_was_shown_stays(monkeypatch):
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa",))
    shown, numbers = explorer.explored, explorer.numbers.value
    explorer.controls["budget"].value = "<b>much"
    assert "<p role='alert'><b>the budget must be a size such as 8 GiB" in explorer.message.value
    assert "got &#x27;&lt;b&gt;much&#x27;" in explorer.message.value
    assert explorer.explored is shown
    assert explorer.numbers.value == numbers
    explorer.controls["budget"].value = "9 GiB"
    assert not explorer.message.value
    explorer.ticks["memdfa"].value = False
    assert "no rule is chosen" in explorer.message.value
    explorer.ticks["memdfa"].value = True
    explorer.controls["batch_norm"].value = True
    explorer.controls["batch"].value = 1
    assert "BatchNorm needs two examples" in explorer.message.value

    def broken(*arguments):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(memory, "explore", broken)
    explorer.controls["batch"].value = 2
    assert "<b>broken in two lines; below" in explorer.message.value


def test_a_drag_is_drawn_once(monkeypatch):
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa",))
    drawn = []
    monkeypatch.setattr(memory, "explore", lambda setting: drawn.append(setting.depth) or widgets.Explored)

    async def drag() -> None:
        for depth in range(10, 20):
            explorer.controls["depth"].value = depth
        assert drawn == []
        await asyncio.sleep(0.2)

    asyncio.run(drag())
    assert drawn == [19]


def test_rules_are_shown_as_they_are_predicted(monkeypatch):
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("bp", "dfa", "memdfa"))
    rows: list[int] = []
    explorer.numbers.observe(lambda change: rows.append(change["new"].count("<tr>") // 2 - 1), "value")
    monkeypatch.setattr(memory, "LONG_S", 0)  # every prediction takes longer than that
    explorer.controls["width"].value = 50
    assert rows == [1, 2, 3]
    rows.clear()
    monkeypatch.setattr(memory, "LONG_S", 1e9)
    explorer.controls["depth"].value = 9
    assert rows == [3]


def test_if_a_later_rule_cannot_be_the_numbers_stay(monkeypatch):
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("bp", "memdfa"))
    before = explorer.numbers.value
    monkeypatch.setattr(memory, "LONG_S", 0)
    monkeypatch.setattr(
        memory, "explore", lambda setting: widgets.explore(setting) if len(setting.rules) == 1 else 1 / 0
    )
    explorer.controls["width"].value = 50
    assert "division by zero; below is what was shown before" in explorer.message.value
    assert explorer.numbers.value == before


@pytest.mark.parametrize("inputs", [30, 784])
def test_what_may_be_chosen_next_is_predicted_while_nothing_is_to_be_done(monkeypatch, inputs):
    monkeypatch.setattr(memory, "AHEAD_AFTER_S", 0)
    monkeypatch.setattr(memory, "AHEAD_EVERY_S", 0)
    rest = SMALL | {"inputs": inputs, "classes": 10, "width": 32}

    async def look() -> None:
        explorer = ml.widgets.memory_explorer(**rest, rules=("memdfa",))
        ahead = len(list(memory._next_to(explorer.setting)))
        for _ in range(ahead + 10):
            await asyncio.sleep(0)
        monkeypatch.setattr(setting.memory, "predict", lambda *_, **__: pytest.fail("this was predicted before"))
        explorer.controls["optimizer"].value = "adam"
        explorer.show()
        assert not explorer.message.value
        assert explorer.explored.setting.optimizer == "adam"

    asyncio.run(look())


def test_what_cannot_be_chosen_next_is_passed_over():
    ahead = [setting for _, setting in memory._next_to(widgets.Setting(**SMALL | {"batch": 1}, rules=("bp",)))]
    assert {setting.batch for setting in ahead} == {1, 2}
    assert not any(setting.batch_norm for setting in ahead)


def test_what_is_asked_for_is_what_the_controls_say():
    explorer = ml.widgets.memory_explorer(**SMALL, rules=("memdfa",))

    async def ask() -> int:
        explorer.controls["depth"].value = 17
        return explorer.explored.setting.depth

    assert asyncio.run(ask()) == 17


def test_ipywidgets_is_loaded_when_first_used():
    loaded = "print('ipywidgets' in sys.modules)"
    code = f"import sys, memdfa_lab as ml; {loaded}; ml.widgets; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
