"""What trains while one looks on: numbers against plain training, clicks in any order, and no thread left behind."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

import memdfa_lab as ml
from memdfa_lab.widgets import background, feedback, training
from memdfa_lab.widgets.background import BUSY, Background

FAST = {"layers": 1, "width": 20, "batch": 10}


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    background.stop()
    assert threads() == []


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("memdfa")]


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing has come of it"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ the thread


def test_a_thread_takes_steps_until_it_is_stopped():
    steps, ends = [], []
    worker = Background("a", lambda: steps.append(0) or 0.0, ends.append)
    for _ in range(3):  # more clicks start nothing more
        worker.start()
    assert threads() == ["memdfa a"]
    wait_for(lambda: len(steps) > 2)
    worker.stop()
    worker.stop()
    assert (threads(), ends, worker.running) == ([], [None], False)
    before = len(steps)
    worker.start()
    wait_for(lambda: len(steps) > before)


def test_a_thread_ends_by_itself_and_tells_what_went_wrong():
    ends = []
    Background("a", lambda: None, ends.append).start()
    wait_for(lambda: ends == [None])
    broken = ValueError("broken")

    def step():
        raise broken

    Background("a", step, ends.append).start()
    wait_for(lambda: ends == [None, broken])
    wait_for(lambda: not threads())


def test_a_cell_that_is_run_again_stops_what_it_started():
    first = Background("a", lambda: 0.0, lambda problem: None)
    other = Background("b", lambda: 0.0, lambda problem: None)
    first.start()
    other.start()
    again = Background("a", lambda: 0.0, lambda problem: None)
    assert threads() == ["memdfa b"]
    first.start()
    again.start()
    assert sorted(threads()) == ["memdfa a", "memdfa b"]
    assert not first.running


def test_a_thread_waits_while_the_foreground_is_busy_and_can_be_stopped_then():
    steps = []
    worker = Background("a", lambda: steps.append(0) or 0.0, lambda problem: None)
    with BUSY:
        worker.start()
        time.sleep(0.2)
        assert steps == []
        worker.stop()
    assert threads() == []


def test_a_slow_rest_is_cut_short():
    worker = Background("a", lambda: 1000.0, lambda problem: None)
    worker.start()
    time.sleep(0.05)
    started = time.monotonic()
    worker.stop()
    assert time.monotonic() - started < 100
    assert threads() == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send")
def test_an_interrupt_stops_it_and_reaches_who_listened_before():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        worker = Background("a", lambda: 0.0, lambda problem: None)
        worker.start()
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: not worker.running)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


SESSION = """
import threading, time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
run = lambda code: shell.run_cell(code)
run("from memdfa_lab.widgets.background import Background, threading")
run("steps = []; worker = Background('a', lambda: steps.append(0) or 0.0, print)")
run("worker.start()")
time.sleep(0.2)
found = shell.user_ns["steps"]
assert found, "it does not train between cells"
run("import time; before = len(steps); time.sleep(0.3); during = len(steps) - before")
assert shell.user_ns["during"] == 0, "it trains while a cell runs"
n = len(found)
time.sleep(0.2)
assert len(found) > n, "it does not go on after the cell"
run("1 / 0")
run("raise KeyboardInterrupt")
time.sleep(0.5)
assert not shell.user_ns["worker"].running, "it goes on after an interrupted cell"
run("worker.start()")
time.sleep(0.1)
assert shell.user_ns["worker"].running
"""


def test_in_a_session_it_waits_for_cells_and_ends_with_an_interrupt_or_the_session():
    done = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ live training


def test_a_race_is_plain_training():
    data = ml.datasets.load("mnist5k").subset(200, 100)
    race = training.Race(data, layers=2, width=30, lr=0.02, batch=50, seed=3, every=4)
    for _ in range(8):  # two epochs
        race.advance()
    for name, kind in ml.RULES.items():
        net = ml.models.mlp(784, [30, 30], 10, seed=3)
        alone = kind(net, partial(torch.optim.SGD, lr=0.02), feedback=ml.feedback.Stored(3))
        history = ml.fit(alone, data, epochs=2, batch_size=50, seed=3, progress=False)
        ours = race.rules[name].blocks.state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in alone.blocks.state_dict().items())
        row = race.table[(race.table["rule"] == name) & (race.table["step"] == 8)].iloc[0]
        assert row["accuracy"] == history.rows[-1]["test_accuracy"]
        angles = ml.alignment.angles(alone, data.x_train, data.y_train)[:-1]
        assert row["angle_deg"] == pytest.approx(np.mean(angles), abs=1e-4)
    assert list(race.table["step"].unique()) == [0, 4, 8]
    memdfa, dfa = (race.table[race.table["rule"] == name].iloc[:, 1:].to_numpy() for name in ("memdfa", "dfa"))
    assert np.array_equal(memdfa, dfa)


def test_it_starts_pauses_resumes_and_starts_anew():
    live = ml.widgets.live_training(**FAST)
    assert "not started, step 0 of 3,000, mnist5k" in live.status.value
    start, pause, reset = live.start_button, live.pause_button, live.reset_button
    assert (start.description, start.disabled, pause.disabled) == ("Start", False, True)
    for _ in range(3):  # a double click, and one more
        start.click()
    assert threads() == ["memdfa live training"]
    assert (start.disabled, pause.disabled) == (True, False)
    wait_for(lambda: live.race.step > 25)
    for _ in range(2):
        pause.click()
    assert threads() == []
    step, picture = live.race.step, live.picture.value
    assert f"paused, step {step:,} of" in live.status.value
    assert (start.description, start.disabled, pause.disabled) == ("Resume", False, True)
    assert "At step 20: BP loss" in picture
    start.click()
    wait_for(lambda: live.race.step > step + 20)
    reset.click()
    assert (threads(), live.race.step, start.description) == ([], 0, "Start")
    assert "At step 0" in live.picture.value


def test_it_ends_by_itself(monkeypatch):
    monkeypatch.setattr(training, "MOST_STEPS", 30)
    live = ml.widgets.live_training(**FAST)
    live.start()
    wait_for(lambda: not live.background.running)
    live.show()
    assert "done, step 30 of 30" in live.status.value
    assert live.start_button.disabled
    live.start()
    assert threads() == []


def test_each_control_starts_anew_with_what_it_says():
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
        wait_for(lambda: live.race.step > 0)
        live.controls[name].value = value
        assert (threads(), live.race.step) == ([], 0), name
        assert not live.message.value
    rule = live.race.rules["dfa"]
    assert [tuple(p.shape) for p in rule.blocks.parameters() if p.dim() == 2] == [(50, 784), (50, 50), (10, 50)]
    assert isinstance(rule.blocks[0][2], torch.nn.Tanh)
    assert (rule.feedback.distribution, rule.feedback.seed, rule.optimizers[0].defaults["lr"]) == (
        "orthogonal",
        4,
        0.005,
    )
    assert len(next(live.race._batches)[0]) == 20


def test_a_rule_that_runs_away_is_said():
    live = ml.widgets.live_training(**FAST, lr=0.5)
    for layer in live.race.rules["fa"].blocks.parameters():
        layer.data.mul_(1e20)
    ended = []
    live.soon = lambda call: ended.append(call)  # there is no kernel whose thread could take it
    live.start()
    wait_for(lambda: ended and not live.background.running)
    ended[-1]()
    assert "FA has run away at step 0: lower the learning rate" in live.message.value
    assert "Traceback" not in live.message.value


def test_speed():
    live = ml.widgets.live_training(**FAST)
    live.speed.value = 1.0
    assert 0.0 < live._step() <= 1.0
    live.speed.value = math.inf
    assert live._step() < 0.1


def test_in_a_kernel_pictures_come_while_it_trains(monkeypatch):
    monkeypatch.setattr(training, "DRAWN_EVERY_S", 0.02)

    async def look_on():
        live = ml.widgets.live_training(**FAST)
        live.start_button.click()
        seen = {live.picture.value}
        end = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < end:
            await asyncio.sleep(0.02)
            seen.add(live.picture.value)
        live.reset_button.click()
        await asyncio.sleep(0.1)  # what is still to come from the thread changes nothing
        return len(seen), live.race.step, live.start_button.description

    assert asyncio.run(look_on()) == (3, 0, "Start")


def test_mnist_is_taken_where_it_is(monkeypatch, tmp_path):
    assert training.digits().name == "mnist5k"
    monkeypatch.setenv("MEMDFA_DATA", str(tmp_path))
    taken = []
    monkeypatch.setattr(training.datasets, "load", taken.append)
    training.digits.__wrapped__()
    (tmp_path / "mnist.npz").touch()
    training.digits.__wrapped__()
    assert taken == ["mnist5k", "mnist"]


def test_what_is_measured_beside_it_is_what_is_measured_alone():
    """Predictions and the global generator in the foreground do not see the thread."""

    def foreground():
        torch.manual_seed(0)
        trace = ml.memory.predict("memdfa", lambda: ml.models.mlp(20, [30] * 4, 5), (8, 20))
        return list(trace.timeline["bytes"]), torch.randn(3).tolist()

    alone = foreground()
    live = ml.widgets.live_training(**FAST)
    live.start()
    for _ in range(5):
        with BUSY:  # as a running cell holds it
            assert foreground() == alone


# ------------------------------------------------------------------------------------------------ the matrix B


@pytest.mark.parametrize("distribution", ml.feedback.DISTRIBUTIONS)
@pytest.mark.parametrize(("outputs", "width"), [(10, 100), (100, 10), (30, 30)])
def test_singular_values_are_those_of_b_and_in_its_unit_near_theory(distribution, outputs, width):
    matrix = feedback.Matrix(distribution, 3.0, "regenerated", 5, outputs, width)
    B = ml.feedback.Stored(5, distribution, 3.0).dense(0, outputs, width, torch.zeros(()))
    found = matrix.singular_values()
    assert np.allclose(found, np.linalg.svd(B.double().numpy(), compute_uv=False), rtol=1e-5, atol=1e-4)
    least, largest = matrix.edges
    assert np.all(found / matrix.unit < largest * (1 + 1e-5) + (0.35 if least < largest else 0))
    if distribution == "orthogonal":
        assert np.allclose(found / matrix.unit, largest)
    drawn = np.concatenate([matrix.singular_values(k) / matrix.unit for k in range(20)])
    values = np.linspace(1e-6, 2.5 + largest, 4000)
    if distribution != "orthogonal":  # the mean square is 1 (of all C of them), the density's first moments as drawn
        density = feedback.marchenko_pastur(values, outputs, width)
        assert np.trapezoid(density, values) == pytest.approx(1, abs=0.03)
        assert np.trapezoid(density * values**2, values) == pytest.approx((drawn**2).mean(), rel=0.1)


def test_b_equal_to_the_weights_is_bp_for_fa_and_near_it_for_dfa():
    matrix = feedback.Matrix(width=30, rule="fa")
    for rule, angle in (("fa", 1e-3), ("dfa", 60.0)):
        run = feedback.angles_while_learning(feedback.replace(matrix, rule=rule), feedback.ALWAYS)
        rows = [row for _, row in zip(range(31), run, strict=False) if row]
        assert [row["step"] for row in rows] == [0, 10, 20, 30]
        assert max(row["angle_deg"] for row in rows) < angle
    start = next(feedback.angles_while_learning(matrix, feedback.START))
    assert start["angle_deg"] < 1e-3
    random = next(feedback.angles_while_learning(matrix, feedback.RANDOM))
    assert 70 < random["angle_deg"] < 110


def test_what_runs_away_ends_alone():
    rows = [row for row in feedback.Matrix(width=20, scale=1e30).learning() if row]
    gone = [row for row in rows if "ran_away" in row]
    assert [row["run"] for row in gone] == [feedback.RANDOM]
    assert rows[-1]["step"] == feedback.STEPS


def test_each_control_changes_what_is_shown():
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
        trained = explorer._trained
        explorer.controls[name].value = value
        assert (explorer.picture.value, explorer.numbers.value) != before, name
        assert not explorer.message.value
        assert (explorer._trained == trained) == (name == "outputs")  # e has the size of the digits' classes
    assert explorer.matrix == feedback.Matrix(**changes)
    own = explorer.matrix.singular_values()
    for value in (own[0], own[-1]):
        assert f"{value:.4g}</td>" in explorer.numbers.value
    wait_for(lambda: not explorer.background.running, 300)
    explorer.show()
    for run in (feedback.RANDOM, feedback.START, feedback.ALWAYS):
        assert f"{run}: angle" in explorer.picture.value
        assert run in explorer.numbers.value
    assert explorer.numbers.value.count(f">{feedback.STEPS}</td>") == 3


def test_what_cannot_be_is_said():
    explorer = ml.widgets.feedback_explorer(width=20, distribution="orthogonal")
    before = explorer.picture.value
    explorer.controls["storage"].value = "shared"
    assert "a slice of an orthogonal matrix is not orthogonal" in explorer.message.value
    assert explorer.picture.value == before
    explorer.controls["distribution"].value = "normal"
    assert not explorer.message.value
    for wrong in ({"rule": "bp"}, {"storage": "store"}, {"seed": -1}, {"scale": 0.0}, {"width": 0}):
        with pytest.raises(ValueError, match=r"."):
            feedback.Matrix(**wrong)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("storage", ml.feedback.KINDS)
def test_the_bytes_of_b_are_those_that_rest(rule, storage):
    matrix = feedback.Matrix(width=40, storage=storage, rule=rule)
    net = ml.models.mlp(784, [40] * feedback.LAYERS, 10)
    made = ml.RULES[rule](net, partial(torch.optim.SGD, lr=0.01), feedback=matrix.feedback())
    made.step(torch.randn(4, 784), torch.zeros(4, dtype=torch.long))
    kept = sum(B.untyped_storage().nbytes() for B in made.feedback.matrices.values())
    shown = feedback._table(matrix, matrix.singular_values(), {})
    assert f"Its B take {ml.memory.readable(kept)} between steps" in shown


def test_nothing_is_kept_alive_by_what_was_shown():
    explorer = ml.widgets.live_training(**FAST)
    explorer.start()
    del explorer
    ml.widgets.live_training(**FAST)  # the cell is run again
    gc.collect()
    assert threads() == []
