"""The benchmark: who runs, that they take turns, and that ratios and peaks are those of the steps."""

import math
from functools import partial

import pytest
import torch.nn.functional as F

import memdfa_lab as ml
from memdfa_lab.lab import bench as module
from memdfa_lab.lab.bench import Contender, bench, contenders, frontier
from memdfa_lab.lab.example import example_step

NETWORK = "784-[16]x8-10"


def test_only_rules_that_use_feedback_run_once_a_kind():
    found = [(one.rule, one.feedback) for one in contenders(["memdfa", "bp", "checkpoint"], ["regenerated", "stored"])]
    assert found == [("bp", "none"), ("memdfa", "regenerated"), ("memdfa", "stored"), ("checkpoint", "none")]


def test_the_frontier_goes_from_the_papers_memdfa_to_dfas_cost():
    found = frontier(NETWORK, 64)
    kept = [one.options["keep_bytes"] for one in found if one.rule == "memdfa"]
    x_shape = (64, 784)
    everything = 4 * 64 * (8 * 16 + 10)
    assert kept == [0, everything // 4, everything // 2, everything * 3 // 4, math.inf]
    segments = {one.options["segments"] for one in found if one.rule == "checkpoint"}
    assert segments == {1, 2, 3, 6, 9}
    peaks = [
        ml.memory.predict("memdfa", lambda: ml.models.build(NETWORK), x_shape, keep_bytes=k).peak_bytes for k in kept
    ]
    assert peaks == sorted(peaks)


def test_a_ratio_compares_steps_of_one_round(monkeypatch):
    """With a clock that ticks 1, 2, 3, ... s, BP's k-th step takes as long as the clock says, and so does the other."""
    now = 0.0

    def clock() -> float:
        return now

    def taking(step, seconds):
        def timed(self, x, y):
            nonlocal now
            now += next(seconds)
            return step(self, x, y)

        return timed

    monkeypatch.setattr(module.time, "perf_counter", clock)
    for rule, seconds in ((ml.BP, [9, 1, 2, 4, 0]), (ml.MemDFA, [9, 3, 8, 20, 0])):
        monkeypatch.setattr(rule, "step", taking(rule.step, iter(seconds)))
    table = bench(NETWORK, 4, [Contender("memdfa", "stored")], rounds=3, warm_up=1).set_index("rule")
    assert table["median_s"].to_dict() == {"bp": 2, "memdfa": 8}
    assert table["ratio"].to_dict() == {"bp": 1, "memdfa": 4}
    assert table["ratio_low"]["memdfa"] == 3.5
    assert table["us_a_block"]["memdfa"] == pytest.approx(8e6 / 9)


def test_the_peak_is_the_steps():
    table = bench(NETWORK, 32, contenders(["memdfa"], ["regenerated"]), rounds=1, warm_up=1).set_index("rule")
    for rule in ("bp", "memdfa"):
        expected = ml.experiments.profile(rule, NETWORK, 32).peak_bytes
        assert table["peak_bytes"][rule] == expected


@pytest.mark.parametrize(
    ("network", "loss"), [("fc_sigmoid", "mse"), ("nokland_2x800", "bce"), ([8, 9, 3], "cross_entropy")]
)
def test_a_step_that_is_measured_has_the_networks_own_loss(network, loss):
    rule, x, y = example_step("bp", network, 4)
    assert rule.loss_fn is ml.losses.LOSSES[loss]
    assert rule.step(x, y).isfinite()


def test_the_bench_times_the_networks_own_loss(monkeypatch):
    """One that is not: the step of fc_sigmoid would hold another number of bytes with cross-entropy."""
    table = bench("fc_sigmoid", 16, contenders(["memdfa"], ["regenerated"]), rounds=1, warm_up=1).set_index("rule")
    how = {"x_shape": (16, 1, 28, 28), "feedback": ml.feedback.Regenerated()}
    build, losses = partial(ml.models.build, "fc_sigmoid"), (ml.losses.mse, F.cross_entropy)
    peaks = [ml.memory.predict("memdfa", build, **how, loss_fn=loss_fn).peak_bytes for loss_fn in losses]
    assert table["peak_bytes"]["memdfa"] == peaks[0] != peaks[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number from 1 on"),
        ({"batch_size": 0}, "batch size must be a whole number from 1 on"),
    ],
)
def test_sizes_below_one_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bench(**{"network": NETWORK, "batch_size": 4, **change})
