"""Clipping by the norm of all gradients together: equal to torch's, and in MEM-DFA by one more pass."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from problems import BY_NAME, RULE_NAMES, make_rule, params, rotated
from reference import assert_identical, refuses, refuses_and_keeps
from torch import nn

import memdfa_lab as ml

SGD = partial(torch.optim.SGD, lr=0.5)
MLP = next(iter(BY_NAME.values()))
ONCE = ("bp", "fa", "dfa", "memdfa", "checkpoint", "last_layer")


def clipped_by_torch(rule, problem, limit, steps):
    """Train by the gradients that the rule has without clipping, and torch.nn.utils.clip_grad_norm_ over all."""
    learner = make_rule(rule, problem, SGD)
    updates, learner.update = [], lambda i: learner._add_penalties(i) or updates.append(i)
    torch.manual_seed(4)
    for x, y in problem.batches(steps):
        learner.clip_norm = math.inf  # so that no update is made in place
        learner.step(x, y)
        weights = [p for p in learner.blocks.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(weights, limit)
        with torch.no_grad():
            for p in weights:
                p -= 0.5 * p.grad
    assert updates
    return learner.blocks.state_dict()


@rotated("problem rule", params(lambda problem: problem.name != "frozen_ends"), ONCE, turns=3)
def test_it_is_torchs_clipping_over_all_parameters_to_rounding(problem, rule):
    problem = problem.double()
    learner = make_rule(rule, problem, SGD, clip_global_norm=0.1)
    torch.manual_seed(4)
    for x, y in problem.batches(3):
        learner.step(x, y)
    expected = clipped_by_torch(rule, problem, 0.1, 3)
    for name, value in learner.blocks.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("problem", params())
def test_dfa_and_memdfa_are_equal_bit_for_bit_and_draw_alike(problem):
    ends = []
    for rule in ("dfa", "memdfa"):
        torch.manual_seed(4)
        learner = make_rule(rule, problem, "momentum", clip_global_norm=0.1)
        losses = [learner.step(x, y) for x, y in problem.batches(3)]
        ends.append((losses, learner.state_dict()["blocks"], torch.get_rng_state()))
    assert_identical(*ends)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_penalties_count_and_the_losss_own_parameters_do_not(rule):
    problem, scale = MLP.double(), 3.0

    def build(limit):
        net = problem.build()

        def loss(logits, y):
            return nn.functional.cross_entropy(logits, y) + scale * sum(p.square().sum() for p in net.parameters())

        return ml.RULES[rule](net, SGD, loss, ml.feedback.Stored(seed=3), clip_global_norm=limit)

    def change(limit):
        learner = build(limit)
        before = copy.deepcopy(learner.blocks.state_dict())
        learner.step(problem.x, problem.y)
        return torch.cat([(v - before[k]).flatten() for k, v in learner.blocks.state_dict().items()])

    free = change(1e9)
    torch.testing.assert_close(change(0.1), free * 0.1 / (free.norm() / 0.5 + 1e-6))


def test_what_cannot_be_is_refused():
    both = {"clip_norm": 1.0, "clip_global_norm": 1.0}
    for options, kind, hint in (
        (both, ml.DFA, "clip_global_norm of all"),
        ({"clip_global_norm": 0}, ml.BP, "above 0"),
        ({"clip_global_norm": 1.0, "keep_bytes": 100}, ml.MemDFA, "leave keep_bytes out"),
        ({"clip_global_norm": 1.0}, ml.BASELINES["step_in_backward"], "use clip_norm, BP"),
    ):
        with refuses(ValueError, hint):
            kind(MLP.build(), SGD, **options)
    rule = ml.MemDFA(MLP.build(), SGD, clip_global_norm=1.0)
    rule.group = type("Two", (type(rule.group),), {"size": 2})()
    with refuses_and_keeps(rule, ValueError, "for one process only: clip_global_norm"):
        rule.step(MLP.x, MLP.y)


class Overflowing(nn.Linear):
    """A layer whose weights have an infinite gradient."""

    def forward(self, h):
        weight = self.weight * 1
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient * math.inf)
        return nn.functional.linear(h, weight, self.bias)


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_a_norm_that_is_not_finite_is_refused_before_a_weight_changes(rule):
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), Overflowing(6, 5))
    learner = ml.RULES[rule](net, SGD, clip_global_norm=1.0)
    before = copy.deepcopy(net.state_dict())
    with refuses(FloatingPointError, "the norm of all gradients is not finite"):
        learner.step(torch.randn(4, 8), torch.arange(4))
    assert_identical(net.state_dict(), before)
