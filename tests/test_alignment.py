"""Angles to BP: numpy twins, matrices for which the angle is known, and a rule that is left as it was."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from problems import AS_BP, BY_NAME, RULE_NAMES, Words, make_rule, params, rotated, train
from reference import Twin, assert_identical, assert_same_training, refuses, refuses_and_keeps
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core.feedback import Regenerated
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.lab.alignment import angles, follow, responses

SGD = partial(torch.optim.SGD, lr=0.05)
OF = ["gradient", "signal"]
LEARN_FROM_B = ["fa", "dfa", "memdfa"]
MLP = BY_NAME["mlp_relu"]


def linear(rule, widths=(8, 12, 10, 5), seed=0):
    """Return a rule on a linear network in float64 that has drawn its matrices, and a batch."""
    net = ml.models.mlp(widths[0], widths[1:-1], widths[-1], activation="none", seed=seed).double()
    learner = ml.RULES[rule](net, optimizer=SGD, feedback=ml.feedback.Stored(seed))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, widths[0], dtype=torch.float64, generator=generator)
    y = torch.randint(widths[-1], (20,), generator=generator)
    for i, width in enumerate(widths[1:-1]):
        learner.feedback.dense(i, widths[-1], width, like=x)
    for j, parameter in enumerate(net.parameters()):
        if parameter.dim() == 2:
            learner.feedback.weight(j, parameter)
    return learner, x, y


def weights_of(rule):
    return [p.detach() for p in rule.blocks.parameters() if p.dim() == 2]


def angles_of(rule, problem, of="gradient"):
    """Return the angles on the problem's batch, always with the same dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return angles(rule, problem.x, problem.y, of)


def is_nan(found):
    return [math.isnan(angle) for angle in found]


# -------------------------------------------------------------------------------------------------- what is right


@rotated("problem rule of", params(), ["bp", *AS_BP], OF, turns=2)
def test_bp_has_no_angle_to_itself(problem, rule, of):
    learner = {**ml.RULES, **ml.BASELINES}[rule](problem.build(), optimizer=SGD, loss_fn=problem.loss)
    found = angles_of(learner, problem, of)
    trained = [any(p.requires_grad for p in block.parameters()) for block in learner.blocks]
    assert [angle == 0 for angle in found] == trained
    assert is_nan(found) == [not there for there in trained]


def _degrees(one, other):
    u, v = (np.concatenate([part.ravel() for part in parts]) for parts in (one, other))
    return math.degrees(math.acos(np.clip(u @ v / math.sqrt((u @ u) * (v @ v)), -1, 1)))


@rotated("problem rule", params(lambda problem: problem.twin), LEARN_FROM_B, turns=2)
def test_the_angle_of_the_gradient_is_that_of_a_numpy_twin(problem, rule):
    problem = problem.double()
    found = angles(make_rule(rule, problem), problem.x, problem.y)
    gradients = []
    for twin_rule in ("bp", "fa" if rule == "fa" else "dfa"):
        twin = Twin(problem, twin_rule, Regenerated(seed=3), lr=0.0)
        twin.step(problem.x.numpy(), problem.y.numpy())
        layers = [[layer for layer in block if layer in twin.number] for block in twin.blocks]
        gradients.append([[g for w in ws for g in ([w.dW] if w.b is None else [w.dW, w.db])] for ws in layers])
    expected = [_degrees(one, other) for one, other in zip(*gradients, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # an arc cosine near 0 has half the digits
    assert all(5 < angle < 175 for angle in expected[:-1]), "too near to 0 or 180 to tell anything"


@pytest.mark.parametrize("rule", LEARN_FROM_B)
def test_the_angle_of_the_signal_is_that_of_the_equations(rule):
    learner, x, y = linear(rule)
    _, W2, W3 = weights_of(learner)
    e = (torch.softmax(learner.blocks(x).detach(), 1) - nn.functional.one_hot(y, 5)) / len(x)
    if rule == "fa":
        B2, B3 = (learner.feedback.weight(j, W) for j, W in ((2, W2), (4, W3)))
        ours = [e @ B3 @ B2, e @ B3]
    else:
        ours = [e @ learner.feedback.dense(i, 5, width, like=e) for i, width in enumerate((12, 10))]
    exact = [e @ W3 @ W2, e @ W3]
    expected = [_degrees([one.numpy()], [other.numpy()]) for one, other in zip(ours, exact, strict=True)]
    np.testing.assert_allclose(angles(learner, x, y, "signal"), [*expected, 0], rtol=0, atol=1e-5)


@rotated("problem of", params(), OF)
def test_dfa_and_mem_dfa_have_the_same_angles(problem, of):
    np.testing.assert_array_equal(*(angles_of(make_rule(rule, problem), problem, of) for rule in ("dfa", "memdfa")))


@rotated("problem rule of", params(), LEARN_FROM_B, OF)
def test_the_last_block_is_taught_by_e_itself(problem, rule, of):
    problem = problem.double()
    found = angles_of(make_rule(rule, problem), problem, of)[-1]
    assert found < 1e-10 or (math.isnan(found) and problem.name == "frozen_ends")


# ----------------------------------------------------------------------------------- matrices with a known angle


@rotated("name of", ["mlp_relu", "conv_pool", "residual", "batchnorm"], OF)
def test_fa_with_the_weights_as_B_is_bp(name, of):
    problem = BY_NAME[name].double()
    learner = make_rule("fa", problem)
    weights = enumerate(learner.blocks.parameters())
    learner.feedback.matrices = {("weight", j): p.detach().clone() for j, p in weights if p.dim() > 1}
    assert max(angles(learner, problem.x, problem.y, of)) < 1e-10


def test_below_90_degrees_a_small_step_lowers_the_loss_and_above_it_raises_it():
    for sign in (1, -1):
        learner, x, y = linear("dfa", widths=(8, 12, 5))
        learner.blocks[1].requires_grad_(False)  # so that the first block alone decides
        learner.feedback.matrices[("block", 0)] *= sign
        angle = angles(learner, x, y)[0]
        learner.optimizers[0].param_groups[0]["lr"] = 1e-3
        losses = [learner.step(x, y).item() for _ in range(2)]
        assert (losses[1] < losses[0]) == (angle < 90)


@rotated("rule of", LEARN_FROM_B, OF)
def test_a_sparse_gradient_has_the_angle_of_a_dense_one(rule, of):
    words, found = torch.randint(11, (6, 3), generator=torch.Generator().manual_seed(0)), []
    for sparse in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(Words(sparse), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        found.append(angles(ml.RULES[rule](net, SGD), words, MLP.y, of))
    assert found[0] == found[1]
    assert not any(is_nan(found[0]))


# ------------------------------------------------------------------------------------------- no direction, no angle


@pytest.mark.parametrize("of", OF)
def test_blocks_without_a_direction_have_nan(of):
    for rule in RULE_NAMES:
        problem = BY_NAME["partly_frozen"]
        assert is_nan(angles(make_rule(rule, problem), problem.x, problem.y, of)) == [False, True, False]
    last = make_rule(ml.BASELINES["last_layer"], MLP)
    assert is_nan(angles(last, MLP.x, MLP.y, of)) == [True, True, False]


def test_a_block_whose_units_are_all_off_has_no_direction():
    learner = make_rule("dfa", MLP)
    with torch.no_grad():
        learner.blocks[1][0].bias.fill_(-1e6)
    assert is_nan(angles(learner, MLP.x, MLP.y)) == [True, True, False]  # BP's first is zero, too


def test_a_weight_that_is_not_used_changes_no_angle():
    learner, other = make_rule("dfa", MLP), make_rule("dfa", MLP)
    learner.blocks[0][0].register_parameter("unused", nn.Parameter(torch.ones(3)))
    learner = ml.DFA(learner.blocks, SGD, feedback=learner.feedback)
    assert len(learner.parameters[0]) == 3
    assert angles(learner, MLP.x, MLP.y) == angles(other, MLP.x, MLP.y)


# ------------------------------------------------------------------------------------------------- nothing is left


def state(rule):
    """Return copies of all that a rule has, and of the global generator."""
    named = [*rule.blocks.named_parameters(), *rule.blocks.named_buffers()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in rule.blocks.modules()]
    modes = [module.training for module in rule.blocks.modules()]
    gradients = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
    learns = [tensor.requires_grad for _, tensor in named]
    return copy.deepcopy([rule.state_dict(), gradients, learns, modes, hooks, torch.get_rng_state()])


@rotated("problem rule of steps", params(), RULE_NAMES, OF, [0, 2], turns=2)
def test_the_rule_is_left_as_it_was(problem, rule, of, steps):
    """Before the matrices are drawn, and after."""
    learner = make_rule(rule, problem, "momentum", "shared" if steps else "stored")
    train(learner, problem, steps)
    for parameter in list(learner.blocks.parameters())[::2]:  # someone's own
        parameter.grad = torch.ones_like(parameter)
    before, gradients = state(learner), [(p, p.grad) for p in learner.blocks.parameters()]
    angles(learner, problem.x, problem.y, of)
    assert_identical(state(learner), before)
    assert all(p.grad is gradient for p, gradient in gradients)


@rotated("problem rule", params(), RULE_NAMES)
def test_training_does_not_notice_that_it_is_looked_at(problem, rule):
    alone, watched = (make_rule(rule, problem, "momentum") for _ in range(2))
    expected = train(alone, problem)
    look = lambda: [angles(watched, problem.x, problem.y, of) for of in OF]  # noqa: E731
    assert_same_training(train(watched, problem, each_step=look), expected)


@rotated("rule of", RULE_NAMES, OF)
def test_a_failure_half_way_leaves_nothing_either(rule, of):
    problem = BY_NAME["batchnorm"]
    learner = make_rule(rule, problem)
    before, loss = state(learner), learner.loss_fn
    with refuses(FloatingPointError, "x holds NaN or inf"):
        angles(learner, problem.x * math.nan, problem.y, of)
    learner.loss_fn = lambda logits, y: logits.sum() * math.nan  # after the forward pass
    with refuses(FloatingPointError, "not finite"):
        angles(learner, problem.x, problem.y, of)
    learner.loss_fn = loss
    assert_identical(state(learner), before)


def test_what_mem_dfa_keeps_is_not_decided_by_looking():
    looked_at, other = (make_rule("memdfa", MLP, keep_bytes=800) for _ in range(2))
    angles(looked_at, MLP.x, MLP.y, "signal")  # with hooks on the blocks, that take more
    first, second = (ml.memory.measure(learner, MLP.x, MLP.y).timeline for learner in (looked_at, other))
    assert first.drop(columns="time_s").equals(second.drop(columns="time_s"))


def test_angles_can_be_had_where_gradients_are_switched_off():
    learner = make_rule("fa", MLP)
    with torch.no_grad():
        inside = angles(learner, MLP.x, MLP.y)
    assert inside == angles(learner, MLP.x, MLP.y)


# ------------------------------------------------------------------------------------------------------- training


def test_follow_trains_as_fit_does_and_looks_when_it_is_asked_to(data):
    followed, fitted = (ml.DFA(ml.models.mlp(784, [20], 10), SGD) for _ in range(2))
    table = follow(followed, data, [0, 3, 10], batch_size=64, probe=50, seed=1)  # two epochs of five steps
    x, y = data.x_train[:50], data.y_train[:50]
    watch = lambda rule, epoch: {f"block{i}_deg": angle for i, angle in enumerate(angles(rule, x, y), 1)}  # noqa: E731
    history = ml.fit(fitted, data, 2, 64, seed=1, on_epoch=watch).table
    assert_identical(followed.blocks.state_dict(), fitted.blocks.state_dict())
    assert list(zip(table["step"], table["block"], strict=True)) == [(s, b) for s in (0, 3, 10) for b in (1, 2)]
    for column, of in (("gradient_deg", "gradient"), ("signal_deg", "signal")):
        assert list(table[column][-2:]) == angles(fitted, x, y, of)
    assert list(history.iloc[-1][["block1_deg", "block2_deg"]]) == list(table["gradient_deg"][-2:])


def test_what_is_done_before_a_step_counts_from_that_step_on(data):
    followed, expected = (ml.DFA(ml.models.mlp(784, [20], 10), SGD, feedback=Regenerated()) for _ in range(2))
    seen = []

    def redraw(rule, step):
        seen.append(step)
        rule.feedback.seed = step

    follow(followed, data, [2], batch_size=300, before_step=redraw)
    for seed in (0, 1):
        expected.feedback.seed = seed
        ml.fit(expected, data, 1, 300)
    assert seen == [0, 1]
    for one, other in zip(followed.blocks.parameters(), expected.blocks.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # the batch is in another order


# ------------------------------------------------------------------------------------------ what a block does of it


@pytest.mark.parametrize("name", ["mlp_relu", "conv_pool", "batchnorm", "residual", "dropout"])
def test_a_response_is_what_a_small_step_does(name):
    problem = BY_NAME[name].double()
    learner = make_rule("dfa", problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = state(learner)
        found = responses(learner, problem.x, problem.y)
        assert_identical(state(learner), before)

        h = problem.x
        _, e = learner.error(forward_without_trace(learner.chain, h), problem.y)
        for i, block in enumerate(learner.chain):
            drawn = torch.get_rng_state()
            out = block(h)
            signal = learner.signal(i, e).shaped_like(out.detach()).clone()
            weights = list(block.parameters())
            steps = torch.autograd.grad(out, weights, signal)
            own = copy.deepcopy(block.state_dict())
            torch.set_rng_state(drawn)
            with torch.no_grad():
                for weight, step in zip(weights, steps, strict=True):
                    weight.add_(step, alpha=1e-7)
                moved = (block(h) - out) / 1e-7
            block.load_state_dict(own)
            assert found[i] == pytest.approx(_degrees([signal.numpy()], [moved.numpy()]), abs=1e-3)
            h = out.detach()


def test_a_block_that_trains_nothing_does_nothing():
    problem = BY_NAME["partly_frozen"]
    assert is_nan(responses(make_rule("memdfa", problem), problem.x, problem.y)) == [False, True, False]


@pytest.mark.parametrize("rule", ml.LOCAL_RULES)
def test_responses_of_rules_with_other_signals_are_refused(rule):
    problem = BY_NAME["mlp_relu"]
    learner = ml.LOCAL_RULES[rule](problem.build(), partial(torch.optim.SGD, lr=0.1))
    with refuses_and_keeps(learner, ValueError, type(learner).__name__, "DFA's signals", "MemDFA"):
        responses(learner, problem.x, problem.y)
