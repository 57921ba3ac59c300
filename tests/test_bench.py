"""The benchmark: who runs, that they take turns, and that ratios and peaks are those of the steps."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import refuses

import memdfa_lab as ml
from memdfa_lab.lab import bench as module
from memdfa_lab.lab import quiet
from memdfa_lab.lab.bench import PLAIN, Contender, PlainLoop, bench, contenders, frontier
from memdfa_lab.lab.example import example_step

NETWORK = "784-[16]x8-10"
KINDS = ("", "reversible-", "residual-")


def test_only_rules_that_use_feedback_run_once_a_kind():
    found = [(one.rule, one.feedback) for one in contenders(["memdfa", "bp", "checkpoint"], ["regenerated", "stored"])]
    assert found == [("bp", "none"), ("memdfa", "regenerated"), ("memdfa", "stored"), ("checkpoint", "none")]
    found = [(one.rule, one.feedback) for one in contenders(["drtp", "local_readout"], ["shared"], passes=["int8"])]
    assert found == [("bp", "none"), ("drtp", "shared"), ("local_readout", "none")]


def test_a_rule_that_cannot_teach_b_has_a_stored_one_in_place_of_a_learned_one():
    found = [(one.rule, one.feedback) for one in contenders(["fa", "dfa", "memdfa"], ["stored", "learned"])]
    wanted = [("fa", "stored"), ("dfa", "stored"), ("dfa", "learned"), ("memdfa", "stored"), ("memdfa", "learned")]
    assert found == [("bp", "none"), *wanted]
    table = bench("784-[8]x2-10", 4, contenders(["memdfa"], ["learned"]), rounds=1, warm_up=1)
    assert table["feedback"].tolist() == ["none", "learned"]


def test_the_frontier_goes_from_the_papers_memdfa_to_dfas_cost():
    found = frontier(NETWORK, 64)
    kept = [one.options["keep_bytes"] for one in found if one.rule == "memdfa"]
    everything = 4 * 64 * (8 * 16 + 10)
    assert kept == [0, everything // 4, everything // 2, everything * 3 // 4, math.inf]
    cheap = [one for one in frontier(NETWORK, 64, passes=["int8"]) if one not in found]
    assert [one.options for one in cheap] == [{"keep_bytes": number, "pass1": "int8"} for number in kept[:-1]]
    segments = {one.options["segments"] for one in found if one.rule == "checkpoint"}
    assert segments == {1, 2, 3, 6, 9}
    assert [one.options["snapshots"] for one in found if one.rule == "binomial"] == [2, 3, 8]
    assert [one.setting for one in found if one.rule == "checkpoint"][:2] == ["1 segment", "2 segments"]
    snapshots = [one.setting for one in frontier("liao_cifar", 4) if one.rule == "binomial"]
    assert snapshots[:2] == ["1 snapshot", "2 snapshots"]
    others = {f"{kind}{NETWORK}": [one.rule for one in frontier(f"{kind}{NETWORK}", 64)[-3:]] for kind in KINDS}
    assert [rules.count("reversible") for rules in others.values()] == [0, 1, 0]
    assert all(rules[-2:] == ["activation_offload", "mezo"] for rules in others.values())
    predict = partial(ml.memory.predict, "memdfa", ml.models.build(NETWORK), (64, 784))
    peaks = [predict(keep_bytes=number).peak_bytes for number in kept]
    assert peaks == sorted(peaks)


def by_clock(monkeypatch, seconds):
    """Let a clock move on by the steps of rules alone: by seconds[rule](number of the step, the step's batch)."""
    now, done = [0.0], dict.fromkeys(seconds, 0)

    def taking(rule, step):
        def timed(self, x, y):
            now[0] += seconds[rule](done[rule], x)
            done[rule] += 1
            return step(self, x, y)

        return timed

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    for rule in seconds:
        monkeypatch.setattr(rule, "step", taking(rule, rule.step))


def test_a_ratio_compares_steps_of_one_round(monkeypatch):
    by_clock(monkeypatch, {ml.BP: lambda i, x: [9, 1, 2, 4, 0][i], ml.MemDFA: lambda i, x: [9, 3, 8, 20, 0][i]})
    table = bench(NETWORK, 4, [Contender("memdfa", "stored")], rounds=3, warm_up=1).set_index("rule")
    assert table["median_s"].to_dict() == {"bp": 2, "memdfa": 8}
    assert table["ratio"].to_dict() == {"bp": 1, "memdfa": 4}
    assert table["ratio_low"]["memdfa"] == 3.5
    assert table["us_a_block"]["memdfa"] == pytest.approx(8e6 / 9)
    assert set(table["layout"]) == {"contiguous"}  # no images


def test_no_contender_is_bp_alone():
    assert list(bench(NETWORK, 4, [], rounds=1, warm_up=0)["rule"]) == ["bp"]


def test_each_contender_is_timed_in_its_faster_layout(monkeypatch):
    def in_layout(contiguous, channels_last):
        return lambda i, x: contiguous if x.is_contiguous() else channels_last

    by_clock(monkeypatch, {ml.BP: in_layout(5, 2), ml.DFA: in_layout(3, 4), ml.MemDFA: in_layout(8, 1)})
    table = bench("liao_cifar", 2, contenders(["dfa", "memdfa"], ["stored"]), rounds=1, warm_up=1).set_index("rule")
    assert table["layout"].to_dict() == {"bp": "channels_last", "dfa": "contiguous", "memdfa": "channels_last"}
    assert table["median_s"].to_dict() == {"bp": 2, "dfa": 3, "memdfa": 1}


@pytest.mark.parametrize(("slowest", "noisy"), [(1.09, False), (1.2, True)])
def test_a_run_in_which_bp_moves_by_more_than_a_tenth_is_noisy(monkeypatch, slowest, noisy):
    by_clock(monkeypatch, {ml.BP: lambda i, x: slowest if i % 2 else 1, ml.MemDFA: lambda i, x: 1 + i})
    table = bench(NETWORK, 4, [Contender("memdfa", "stored")], rounds=4)
    assert set(table["noisy"]) == {noisy}
    assert table["moved"][0] == pytest.approx(slowest - 1)


def test_a_quiet_machine_is_waited_for(monkeypatch, tmp_path, capsys):
    """By counters of two processors, of which others use 1.5, then none, or the 1.5 for ever."""
    monkeypatch.setattr(quiet, "COUNTERS", tmp_path / "stat")
    with refuses(ValueError, "leave --quiet out"):
        quiet.wait_until_quiet()
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    for quiet_after, waits in ((0, 1), (3, 4), (99, 7)):
        now = [0.0]

        def sleep(seconds, now=now, quiet_after=quiet_after):
            now[0] += seconds
            busy = 150 * min(now[0], quiet_after)
            quiet.COUNTERS.write_text(f"cpu  {busy:.0f} 0 0 {200 * now[0] - busy:.0f} 0 0 0 0 0 0\ncpu0 1 2 3\n")

        monkeypatch.setattr(quiet.time, "sleep", sleep)
        sleep(0)
        assert quiet.wait_until_quiet(longest_s=7, sample_s=1) == (quiet_after < 99)
        assert now[0] == waits
        assert ("1.5 processors" in capsys.readouterr().err) == (quiet_after > 0)


def test_the_peak_is_that_of_a_step_with_the_networks_own_loss():
    """With cross-entropy, the step of fc_sigmoid would hold another number of bytes."""
    table = bench("fc_sigmoid", 16, contenders(["memdfa"], ["regenerated"]), rounds=1, warm_up=1).set_index("rule")
    for rule in ("bp", "memdfa"):
        predict = partial(ml.memory.predict, rule, ml.models.build("fc_sigmoid"), (16, 1, 28, 28))
        how = {"feedback": ml.feedback.Regenerated()}
        peaks = [predict(**how, loss_fn=loss_fn).peak_bytes for loss_fn in (ml.losses.mse, F.cross_entropy)]
        assert table["peak_bytes"][rule] == peaks[0] != peaks[1]


def test_options_stand_beside_each_rule_without_them():
    against = contenders(["memdfa"], ["regenerated"], {"precision": "bfloat16", "clip_global_norm": 1.0})
    table = bench("fc_relu", 16, against, rounds=1, warm_up=1).set_index(["rule", "setting"])
    setting = "precision=bfloat16, clip_global_norm=1.0"
    assert list(table.index) == [("bp", ""), ("memdfa", ""), ("bp", setting), ("memdfa", setting)]
    for rule in ("bp", "memdfa"):
        options = {"precision": "bfloat16", "clip_global_norm": 1.0}
        traces = [ml.experiments.profile(rule, "fc_relu", 16, **given) for given in ({}, options)]
        assert [table["peak_bytes"][rule, with_it] for with_it in ("", setting)] == [t.peak_bytes for t in traces]
        assert traces[0].peak_bytes != traces[1].peak_bytes


def test_first_passes_stand_beside_an_exact_one_and_bp_beside_its_own_precision():
    found = contenders(["memdfa"], ["stored"], {"precision": "bfloat16"}, ["int8", "4bit"])
    assert [(one.rule, one.setting) for one in found] == [
        ("bp", ""),
        ("memdfa", ""),
        ("bp", "precision=bfloat16"),
        ("memdfa", "precision=bfloat16"),
        ("memdfa", "precision=bfloat16, pass1=int8"),
        ("memdfa", "precision=bfloat16, pass1=4bit"),
    ]
    assert len(contenders(["memdfa"], ["stored"], passes=["int8"])) == 3
    table = bench("fc_relu", 4, found[:4], rounds=1)
    seconds, alike = table["median_s"], table["ratio_alike"]
    assert alike.to_list() == pytest.approx([1, seconds[1] / seconds[0], 1, seconds[3] / seconds[2]])


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "rmsprop"])
def test_a_plain_loop_trains_as_bp(optimizer):
    make = partial(ml.experiments.OPTIMIZERS[optimizer], lr=0.01)
    (rule, x, y), (other, *_) = (example_step("bp", "mnist_conv", 4, make) for _ in range(2))
    plain = PlainLoop(other)
    for _ in range(3):
        assert plain.step(x, y) == pytest.approx(rule.step(x, y).item())
    for one, two in zip(rule.blocks.parameters(), plain.blocks.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert all(group.get("fused", True) for group in plain.optimizer.param_groups)


def test_a_plain_loop_stands_beside_bp_and_is_not_what_others_are_compared_with(monkeypatch):
    by_clock(monkeypatch, {ml.BP: lambda i, x: 2, PlainLoop: lambda i, x: 1, ml.MemDFA: lambda i, x: 4})
    table = bench(NETWORK, 4, [Contender("memdfa", "stored"), PLAIN], rounds=1, warm_up=1)
    assert table["setting"].to_list() == ["", "", "plain loop"]
    assert table["ratio"].to_list() == table["ratio_alike"].to_list() == [1, 2, 0.5]
    step = ml.experiments.profile("bp", NETWORK, 4)
    assert table["peak_bytes"][2] == pytest.approx(step.peak_bytes, rel=0.01)


@pytest.mark.parametrize(("network", "loss"), [("fc_sigmoid", "mse"), ("nokland_2x800", "bce")])
def test_a_step_that_is_measured_has_the_networks_own_loss(network, loss):
    rule, x, y = example_step("bp", network, 4)
    assert rule.loss_fn is ml.losses.LOSSES[loss]
    assert rule.step(x, y).isfinite()


def test_a_step_is_on_an_mlp_if_widths_are_given():
    rule, x, y = example_step("bp", [8, 9, 7, 3], 4)
    assert [tuple(p.shape) for p in rule.blocks.parameters() if p.dim() > 1] == [(9, 8), (7, 9), (3, 7)]
    assert x.shape == (4, 8)
    assert rule.step(x, y).isfinite()
