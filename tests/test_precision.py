"""A rule's own precision: what a user's autocast does, flat in depth, and float16 with a scale a block."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from problems import BY_NAME, EVERY_RULE, RULE_NAMES, STORAGES, WITHOUT_GLOBAL_NORM, make_rule, params, rotated
from reference import assert_identical, refuses, refuses_and_keeps
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core import precision
from memdfa_lab.memory import measure, predict

MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
MLP = next(iter(BY_NAME.values()))


def trained(rule, problem, around=None, steps=3, **options):
    learner = make_rule(rule, problem, MOMENTUM, ml.feedback.Regenerated(seed=1), **options)
    torch.manual_seed(4)
    with BF16(enabled=around == "all"):
        for x, y in problem.batches(steps):
            with BF16(enabled=around is not None):
                learner.step(x, y)
    return learner


@rotated("problem rule around", params(), EVERY_RULE, ("all", "each"), turns=3)
def test_a_rules_own_precision_is_what_an_autocast_of_the_users_does_bit_for_bit(problem, rule, around):
    if (problem.name, rule) == ("frozen_ends", "last_layer"):
        return  # it cannot train what is frozen
    own, users = trained(rule, problem, precision="bfloat16"), trained(rule, problem, around)
    assert_identical(own.state_dict(), users.state_dict())
    kept = [tensor for name in ("parameters", "optimizer state") for tensor in own.tensors()[name]]
    assert {tensor.dtype for tensor in kept} <= {problem.dtype, torch.float32, torch.int64}


@pytest.mark.parametrize("problem", params())
@pytest.mark.parametrize("options", [{}, {"clip_global_norm": 0.1}], ids=["", "clipped"])
def test_dfa_and_memdfa_are_equal_bit_for_bit_in_bfloat16(problem, options):
    ends = [trained(rule, problem, precision="bfloat16", **options).state_dict() for rule in ("dfa", "memdfa")]
    for end in ends:
        del end["rule"]
    assert_identical(*ends)


@rotated("problem rule storage limit", params(), EVERY_RULE, STORAGES, (None, 0.1), turns=3)
def test_memory_in_bfloat16_is_predicted_to_the_byte(problem, rule, storage, limit):
    if (problem.name, rule) == ("frozen_ends", "last_layer"):
        return
    options = {"precision": "bfloat16", "clip_global_norm": None if rule in WITHOUT_GLOBAL_NORM else limit}
    make = STORAGES[storage]
    learner = make_rule(rule, problem, MOMENTUM, make(), **options)
    found = predict(
        rule, problem.build(), problem.x.shape, MOMENTUM, make(), loss_fn=problem.loss, x_dtype=problem.dtype, **options
    )
    assert found.peak_bytes == measure(learner, problem.x, problem.y, warm_up=1).peak_bytes


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"clip_global_norm": 0.1}], ids=str)
def test_memory_is_flat_in_depth(options):
    peaks = {}
    for depth in (3, 12):
        net = ml.models.mlp(20, [24] * depth, 5)
        how = {"feedback": ml.feedback.Regenerated(seed=0), **options}
        seen = measure(ml.MemDFA(net, MOMENTUM, **how), torch.randn(32, 20), torch.arange(32) % 5, warm_up=1)
        assert predict("memdfa", net, (32, 20), MOMENTUM, **how).peak_bytes == seen.peak_bytes
        peaks[depth] = seen.peak_bytes
    assert peaks[3] == peaks[12]


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_an_autocast_around_fit_trains_and_evaluates_as_the_rules_own(rule):
    x, y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 5
    data = ml.datasets.Data("made", x[:30], y[:30], x[30:], y[30:], torch.zeros(1, 1, 1), 1.0, 5)
    found = []
    for own in (True, False):
        torch.manual_seed(3)
        learner = ml.RULES[rule](ml.models.mlp(8, [12, 12], 5), MOMENTUM, precision="bfloat16" if own else None)
        with BF16(enabled=not own):
            history = ml.fit(learner, data, 2, 8, progress=False)
        found.append((learner.state_dict(), history.table.drop(columns="seconds").to_dict("list")))
    assert_identical(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_precision_that_there_is_not_or_not_here_is_refused():
    with refuses(ValueError, "unknown precision 'bfloat'", "did you mean 'bfloat16'?"):
        ml.DFA(MLP.build(), MOMENTUM, precision="bfloat")
    with refuses(ValueError, "float16", "cpu", "precision='bfloat16'"):
        ml.MemDFA(MLP.build(), MOMENTUM, precision="float16")
    with refuses(ValueError, "float16", "DFA or MEM-DFA"):
        ml.BP(MLP.build(), MOMENTUM, precision="float16")
    rule = ml.MemDFA(MLP.build(), MOMENTUM)
    rule.precision = "float16"
    with refuses_and_keeps(rule, ValueError, "float16", "cpu"):
        rule.step(MLP.x, MLP.y)


class Huge(nn.Module):
    """Hand on h, and make its gradient overflow in float16."""

    def forward(self, h):
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 1e30)
        return h.clone()


def in_float16(monkeypatch, rule, net, loss=nn.functional.cross_entropy):
    """Return a rule in float16 on the CPU, which users are refused."""
    monkeypatch.setattr(precision, "check", lambda *given: None)
    return ml.RULES[rule](net, MOMENTUM, loss, ml.feedback.Regenerated(seed=1), precision="float16")


def test_in_float16_each_block_has_a_scale_and_one_that_overflows_rests(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), Huge(), nn.Tanh(), nn.Linear(12, 5))
    rules = {name: in_float16(monkeypatch, name, copy.deepcopy(net)) for name in ("dfa", "memdfa")}
    x, y = torch.randn(20, 8), torch.arange(20) % 5
    for rule in rules.values():
        before = copy.deepcopy(rule.state_dict()["blocks"])
        assert math.isfinite(rule.step(x, y).item())
        changed = [not torch.equal(before[f"{i}.0.weight"], rule.chain[i][0].weight) for i in (0, 1)]
        assert changed == [True, False]
        assert [scaler.get_scale() for scaler in rule.scalers] == [2.0**16, 2.0**15, 2.0**16]
    one, other = (rule.state_dict() for rule in rules.values())
    del one["rule"], other["rule"]
    assert_identical(one, other)
    again = in_float16(monkeypatch, "dfa", copy.deepcopy(net))
    again.load_state_dict(rules["dfa"].state_dict())
    assert [scaler.get_scale() for scaler in again.scalers] == [2.0**16, 2.0**15, 2.0**16]


def test_in_float16_small_gradients_do_not_vanish_and_are_those_of_float32_to_rounding(monkeypatch):
    def tiny(logits, y):
        return 1e-7 * nn.functional.cross_entropy(logits, y)

    torch.manual_seed(0)
    net = ml.models.mlp(8, [12, 12], 5, activation="tanh")
    x, y = torch.randn(20, 8), torch.arange(20) % 5
    plain = ml.DFA(copy.deepcopy(net), partial(torch.optim.SGD, lr=1e7), tiny, ml.feedback.Regenerated(seed=1))
    plain.step(x, y)
    scaled = in_float16(monkeypatch, "memdfa", copy.deepcopy(net), tiny)
    for optimizer in scaled.optimizers:
        optimizer.param_groups[0]["lr"] = 1e7
    scaled.step(x, y)
    for one, other, start in zip(scaled.blocks.parameters(), plain.blocks.parameters(), net.parameters(), strict=True):
        assert (one - other).norm() < 0.01 * (other - start).norm()
