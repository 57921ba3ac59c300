"""What trains while one looks on: numbers against plain training, clicks in any order, and nothing that runs on."""

from __future__ import annotations

import asyncio
import math
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

import memdfa_lab as ml
from memdfa_lab.widgets import base, feedback, training

FAST = {"layers": 1, "width": 20, "batch": 10}


@pytest.fixture
def steps(monkeypatch):
    """Let Live training end after 40 steps, without a pause or a picture between them."""
    monkeypatch.setattr(training, "MOST_STEPS", 40)
    monkeypatch.setattr(training, "DRAWN_EVERY_S", math.inf)
    monkeypatch.setattr(base, "PAUSE_S", 0)


async def until(condition):
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it has not happened")


# ------------------------------------------------------------------------------------------------ live training


@pytest.mark.parametrize(
    ("rules", "storage"),
    [(tuple(ml.RULES), "stored"), (("dfa", "memdfa"), "learned"), (tuple(ml.LOCAL_RULES), "regenerated")],
)
def test_a_race_is_plain_training(rules, storage):
    data = ml.datasets.load("mnist5k").subset(200, 100)
    more = {"rules": rules, "storage": storage}
    race = ml.widgets.Race(data, layers=2, width=30, lr=0.02, batch=50, seed=3, every=4, **more)
    for _ in range(8):  # two epochs
        race.advance()
    for name in rules:
        net = ml.models.mlp(784, [30, 30], 10, seed=3)
        B = ml.feedback.Learned(3, lr=0.01) if storage == "learned" else ml.feedback.Stored(3)
        alone = {**ml.RULES, **ml.LOCAL_RULES}[name](net, partial(torch.optim.SGD, lr=0.02), feedback=B)
        history = ml.fit(alone, data, epochs=2, batch_size=50, seed=3, progress=False)
        ours = race.rules[name].blocks.state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in alone.blocks.state_dict().items())
        row = race.table[(race.table["rule"] == name) & (race.table["step"] == 8)].iloc[0]
        assert row["accuracy"] == history.rows[-1]["test_accuracy"]
        angles = ml.alignment.angles(alone, data.x_train, data.y_train)[:-1]
        assert row["angle_deg"] == pytest.approx(np.mean(angles), abs=1e-4)
    assert list(race.table["step"].unique()) == [0, 4, 8]
    if "dfa" not in rules:
        return
    memdfa, dfa = (race.table[race.table["rule"] == name].iloc[:, 1:].to_numpy() for name in ("memdfa", "dfa"))
    assert np.array_equal(memdfa, dfa)


def test_it_starts_pauses_resumes_and_starts_anew(steps):
    async def play() -> None:
        live = ml.widgets.live_training(**FAST)
        assert "not started, step 0 of 40, mnist5k" in live.status.value
        start, pause, reset = live.start_button, live.pause_button, live.reset_button
        assert (start.description, start.disabled, pause.disabled) == ("Start", False, True)
        for _ in range(3):  # a double click, and one more
            start.click()
        await until(lambda: live.race.step == 25)
        assert (start.disabled, pause.disabled) == (True, False)
        for _ in range(2):
            pause.click()
        await asyncio.sleep(0)
        assert "paused, step 25 of 40" in live.status.value
        assert (start.description, start.disabled, pause.disabled) == ("Resume", False, True)
        assert "At step 20: BP loss" in live.picture.value
        start.click()
        await until(lambda: live.race.step == 30)
        reset.click()
        await until(lambda: live.race.step == 0)
        assert (start.description, start.disabled) == ("Start", False)
        await until(lambda: "At step 0:" in live.picture.value)
        start.click()
        await until(lambda: not live.training and live.race.step)
        assert "done, step 40 of 40" in live.status.value
        assert "At step 40:" in live.picture.value
        assert start.disabled

    asyncio.run(play())


def test_each_control_starts_anew_with_what_it_says(steps):
    live = ml.widgets.live_training(**FAST)
    changes = {
        "layers": 2,
        "width": 50,
        "activation": "tanh",
        "batch": 20,
        "lr": 0.005,
        "distribution": "orthogonal",
        "seed": 4,
    }
    assert live.controls.keys() == changes.keys()
    for name, value in changes.items():
        live.start()
        live.next_part()
        assert live.training
        live.controls[name].value = value
        live.start()  # before the change is shown
        assert (live.race.step, live.training) == (0, False), name
        assert not live.message.value
    rule = live.race.rules["dfa"]
    assert [tuple(p.shape) for p in rule.blocks.parameters() if p.dim() == 2] == [(50, 784), (50, 50), (10, 50)]
    assert isinstance(rule.blocks[0][2], torch.nn.Tanh)
    assert (rule.feedback.distribution, rule.feedback.seed) == ("orthogonal", 4)
    assert rule.optimizers[0].defaults["lr"] == 0.005
    sizes = []
    rule.step = lambda x, y: sizes.append(len(x))
    live.finish()
    assert set(sizes) == {20}


def test_what_the_controls_lack_is_what_it_started_with():
    live = ml.widgets.live_training(**FAST, rules=["memdfa"], scale=2.0, storage="regenerated")
    live.controls["seed"].value = 7
    live.next_part()
    (rule,) = live.race.rules.values()
    assert repr(rule.feedback) == "Regenerated(seed=7, distribution='he_normal', scale=2.0)"


def test_an_error_in_training_is_shown_and_ends_it(steps):
    async def train() -> ml.widgets.LiveTraining:
        live = ml.widgets.live_training(**FAST, lr=0.5)
        for layer in live.race.rules["fa"].blocks.parameters():
            layer.data.mul_(1e20)
        live.start()
        await until(lambda: live.message.value)
        return live

    live = asyncio.run(train())
    assert "FA diverged at step 0: lower the learning rate" in live.message.value
    assert not live.training
    assert not live.start_button.disabled


def test_pictures_come_while_it_trains(steps, monkeypatch):
    monkeypatch.setattr(training, "DRAWN_EVERY_S", -1)
    live = ml.widgets.live_training(**FAST, every=2)
    live.start()
    for step in (1, 2, 3):
        live.next_part()
        assert f"At step {step // 2 * 2}: BP loss" in live.picture.value
        assert f"training, step {step} of" in live.status.value


def test_speed(monkeypatch):
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 5.0))
    live = ml.widgets.live_training(**FAST)
    live.start()
    waits = []
    for live.speed.value in training.SPEEDS.values():
        waits.append(live.next_part())
    assert waits == [1.0, 0.2, 0.05, 0.01, 0.0]


def test_mnist_is_taken_where_it_is(monkeypatch, tmp_path):
    assert training.digits().name == "mnist5k"
    monkeypatch.setenv("MEMDFA_DATA", str(tmp_path))
    taken = []
    monkeypatch.setattr(training.datasets, "load", taken.append)
    training.digits.__wrapped__()
    (tmp_path / "mnist.npz").touch()
    training.digits.__wrapped__()
    assert taken == ["mnist5k", "mnist"]


# ------------------------------------------------------------------------------------------------ in a kernel


def test_a_cell_that_is_run_again_ends_what_it_started(steps):
    async def run_twice() -> None:
        first = ml.widgets.live_training(**FAST)
        other = ml.widgets.feedback_explorer(width=20)
        first.start()
        await until(lambda: first.race.step)
        again = ml.widgets.live_training(**FAST)
        assert not first.training
        step, rows = first.race.step, len(other.rows)
        again.start()
        await until(lambda: again.race.step == 10 and len(other.rows) > rows)
        assert first.race.step == step

    asyncio.run(run_twice())


def test_clicks_from_another_thread_are_taken_in_the_loop(steps):
    """JupyterLab sends them to a thread of their own, even while a cell runs."""

    def in_thread(call) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()  # the loop is busy meanwhile, as with a cell

    async def click() -> None:
        live = ml.widgets.live_training(**FAST)
        in_thread(live.start_button.click)
        assert live.race.step == 0
        await until(lambda: live.race.step == 5)
        in_thread(lambda: setattr(live.controls["seed"], "value", 3))
        assert live.training
        await until(lambda: not live.training)
        await until(lambda: live.race.rules["fa"].feedback.seed == 3)

    asyncio.run(click())


@pytest.fixture
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.instance().history_manager.end_session()
    InteractiveShell.clear_instance()


def test_it_waits_for_a_cell_that_awaits_and_ends_with_one_that_is_interrupted(steps, shell):
    def end(error: BaseException | None) -> None:
        shell.events.trigger("post_run_cell", SimpleNamespace(error_in_exec=error))

    async def session() -> None:
        live = ml.widgets.live_training(**FAST)
        live.start()
        await until(lambda: live.race.step == 3)
        shell.events.trigger("pre_run_cell", None)
        for _ in range(20):
            await asyncio.sleep(0)
        assert live.race.step == 3
        end(ZeroDivisionError())
        await until(lambda: live.race.step == 6)
        shell.events.trigger("pre_run_cell", None)
        end(KeyboardInterrupt())
        assert (live.race.step, live.training) == (6, False)
        assert "paused" in live.status.value
        live.start()
        await until(lambda: live.race.step == 8)

    asyncio.run(session())


# ------------------------------------------------------------------------------------------------ the matrix B


@pytest.mark.parametrize("distribution", ml.feedback.DISTRIBUTIONS)
@pytest.mark.parametrize(("outputs", "width"), [(10, 100), (100, 10), (30, 30)])
def test_singular_values_are_those_of_b_and_in_its_unit_near_theory(distribution, outputs, width):
    how = {"distribution": distribution, "scale": 3.0, "seed": 5}
    matrix = ml.widgets.Matrix(**how, storage="regenerated", outputs=outputs, width=width)
    B = ml.feedback.Stored(**how).dense(0, outputs, width, torch.zeros(()))
    found = matrix.singular_values()
    assert np.allclose(found, np.linalg.svd(B.double().numpy(), compute_uv=False), rtol=1e-12)
    least, largest = matrix.edges
    assert np.all(found / matrix.unit < largest * (1 + 1e-5) + (0.35 if least < largest else 0))
    if distribution == "orthogonal":
        assert np.allclose(found / matrix.unit, largest)
        return
    drawn = np.concatenate([matrix.singular_values(k) / matrix.unit for k in range(20)])
    values = np.linspace(1e-6, 2.5 + largest, 4000)  # the mean square is 1 (of all C), as of those that are drawn
    density = ml.figures.marchenko_pastur(values, outputs, width)
    assert np.trapezoid(density, values) == pytest.approx(1, abs=0.03)
    assert np.trapezoid(density * values**2, values) == pytest.approx((drawn**2).mean(), rel=0.1)


def test_b_equal_to_the_weights_is_bp_for_fa_and_near_it_for_dfa(monkeypatch):
    monkeypatch.setattr(feedback, "STEPS", 30)
    for rule, angle in (("fa", 1e-3), ("dfa", 60.0)):
        rows = list(ml.widgets.Matrix(width=30, rule=rule).learning())
        by_run = {run: [row for row in rows if row["run"] == run] for run in dict.fromkeys(row["run"] for row in rows)}
        random, start, always = by_run.values()
        assert [row["step"] for row in always] == [0, 10, 20, 30]
        assert max(row["angle_deg"] for row in always) < angle
        assert start[0]["angle_deg"] == always[0]["angle_deg"] < start[-1]["angle_deg"]
        assert 70 < random[0]["angle_deg"] < 110


def test_what_runs_away_ends_alone():
    rows = list(ml.widgets.Matrix(width=20, scale=1e30).learning())
    assert [row["run"] for row in rows if "ran_away" in row] == [feedback.RANDOM]
    assert rows[-1]["step"] == feedback.STEPS


def test_each_control_changes_what_is_shown_of_b(monkeypatch):
    monkeypatch.setattr(feedback, "STEPS", 10)
    explorer = ml.widgets.feedback_explorer(width=20)
    changes = {
        "distribution": "uniform",
        "scale": 2.0,
        "storage": "shared",
        "seed": 3,
        "outputs": 30,
        "width": 50,
        "rule": "fa",
    }
    assert explorer.controls.keys() == changes.keys()
    for name, value in changes.items():
        before = explorer.picture.value, explorer.numbers.value
        explorer.controls[name].value = value
        explorer.next_part()
        assert (explorer.picture.value, explorer.numbers.value) != before, name
        assert not explorer.message.value
        assert bool(explorer.rows) == (name == "outputs")  # e has the size of the digits' classes
        explorer.next_part()
    explorer.finish()
    assert explorer.setting == ml.widgets.Matrix(**changes)
    own = explorer.setting.singular_values()
    for value in (own[0], own[-1]):
        assert f"{value:.4g}</td>" in explorer.numbers.value
    for run in (feedback.RANDOM, feedback.START, feedback.ALWAYS):
        assert f"{run}: angle" in explorer.picture.value
        assert run in explorer.numbers.value
    assert explorer.numbers.value.count("<td>10</td>") == 3


def test_the_short_training_runs_by_itself_and_goes_on_after_an_error(monkeypatch):
    monkeypatch.setattr(feedback, "STEPS", 20)

    async def look() -> list[dict]:
        explorer = ml.widgets.feedback_explorer(width=20, distribution="orthogonal")
        await until(lambda: explorer.rows)
        before = explorer.picture.value
        explorer.controls["storage"].value = "shared"
        await until(lambda: explorer.message.value)
        assert "a slice of an orthogonal matrix is not orthogonal" in explorer.message.value
        assert explorer.picture.value == before
        explorer.controls["storage"].value = "stored"
        await until(lambda: len(explorer.rows) == 9)
        assert not explorer.message.value
        return explorer.rows

    assert [row["step"] for row in asyncio.run(look())] == [0, 10, 20] * 3


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("storage", ml.feedback.KINDS)
def test_the_bytes_of_b_are_those_that_rest(rule, storage):
    explorer = ml.widgets.feedback_explorer(width=40, storage=storage, rule=rule)
    net = ml.models.mlp(784, [40] * 2, 10)
    learner = ml.RULES[rule](net, partial(torch.optim.SGD, lr=0.01), feedback=explorer.setting.feedback())
    learner.step(torch.randn(4, 784), torch.zeros(4, dtype=torch.long))
    kept = sum(B.untyped_storage().nbytes() for B in learner.feedback.matrices.values())
    assert f"Its matrices B take {ml.memory.readable(kept)} between steps" in explorer.numbers.value
