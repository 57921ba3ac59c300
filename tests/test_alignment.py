"""Angles to BP: numpy twins, matrices for which the angle is known, and a rule that is left as it was."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from problems import BY_NAME, RULE_NAMES, make_rule, params, train
from reference import Twin, assert_identical, assert_same_training, refuses
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core.feedback import Regenerated
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.lab.alignment import angles, follow, responses

SGD = partial(torch.optim.SGD, lr=0.05)
OF = ["gradient", "signal"]
LEARN_FROM_B = ["fa", "dfa", "memdfa"]


def linear(rule: str, widths=(8, 12, 10, 5), seed: int = 0) -> tuple[ml.Rule, torch.Tensor, torch.Tensor]:
    """Return a rule on a linear network in float64 that has drawn its matrices, and a batch."""
    net = ml.models.mlp(widths[0], widths[1:-1], widths[-1], activation="none", seed=seed).double()
    made = ml.RULES[rule](net, optimizer=SGD, feedback=ml.feedback.Stored(seed))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, widths[0], dtype=torch.float64, generator=generator)
    y = torch.randint(widths[-1], (20,), generator=generator)
    for i, width in enumerate(widths[1:-1]):
        made.feedback.dense(i, widths[-1], width, like=x)
    for j, parameter in enumerate(net.parameters()):
        if parameter.dim() == 2:
            made.feedback.weight(j, parameter)
    return made, x, y


def weights_of(rule: ml.Rule) -> list[torch.Tensor]:
    return [p.detach() for p in rule.blocks.parameters() if p.dim() == 2]


# -------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("problem", params())
def test_bp_has_no_angle_to_itself(problem, of):
    for rule in ("bp", *ml.BASELINES):
        if rule == "last_layer":
            continue
        net = problem.build()
        made = {**ml.RULES, **ml.BASELINES}[rule](net, optimizer=SGD, loss_fn=problem.loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = angles(made, problem.x, problem.y, of)
        trained = [any(p.requires_grad for p in block.parameters()) for block in made.blocks]
        assert [math.isnan(angle) for angle in found] == [not there for there in trained]
        assert all(angle == 0 for angle in found if not math.isnan(angle)), found


def _degrees(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    u, v = (np.concatenate([part.ravel() for part in parts]) for parts in (one, other))
    return math.degrees(math.acos(np.clip(u @ v / math.sqrt((u @ u) * (v @ v)), -1, 1)))


@pytest.mark.parametrize("rule", LEARN_FROM_B)
@pytest.mark.parametrize("problem", params(lambda problem: problem.twin))
def test_the_angle_of_the_gradient_is_that_of_a_numpy_twin(problem, rule):
    problem = problem.double()
    found = angles(make_rule(rule, problem), problem.x, problem.y)
    gradients = []
    for twin_rule in ("bp", "fa" if rule == "fa" else "dfa"):
        twin = Twin(problem, twin_rule, Regenerated(seed=3), lr=0.0)
        twin.step(problem.x.numpy(), problem.y.numpy())
        weights = [[layer for layer in block if layer in twin.number] for block in twin.blocks]
        gradients.append(
            [[g for w in ws for g in (w.dW, w.db if w.b is not None else None) if g is not None] for ws in weights]
        )
    expected = [_degrees(one, other) for one, other in zip(*gradients, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # an arc cosine near 0 has half the digits
    assert all(5 < angle < 175 for angle in expected[:-1]), "too near to 0 or 180 to tell anything"


@pytest.mark.parametrize("rule", LEARN_FROM_B)
def test_the_angle_of_the_signal_is_that_of_the_equations(rule):
    made, x, y = linear(rule)
    _, W2, W3 = weights_of(made)
    logits = made.blocks(x).detach()
    e = (torch.softmax(logits, 1) - nn.functional.one_hot(y, 5)) / len(x)
    if rule == "fa":
        B2, B3 = (made.feedback.weight(j, W) for j, W in ((2, W2), (4, W3)))
        ours = [e @ B3 @ B2, e @ B3]
    else:
        ours = [e @ made.feedback.dense(i, 5, width, like=e) for i, width in enumerate((12, 10))]
    expected = [
        _degrees([one.numpy()], [other.numpy()]) for one, other in zip(ours, [e @ W3 @ W2, e @ W3], strict=True)
    ]
    np.testing.assert_allclose(angles(made, x, y, "signal"), [*expected, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("problem", params())
def test_dfa_and_mem_dfa_have_the_same_angles(problem, of):
    found = []
    for rule in ("dfa", "memdfa"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(angles(make_rule(rule, problem), problem.x, problem.y, of))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("rule", LEARN_FROM_B)
@pytest.mark.parametrize("problem", params())
def test_the_last_block_is_taught_by_e_itself(problem, rule, of):
    problem = problem.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = angles(make_rule(rule, problem), problem.x, problem.y, of)[-1]
    assert found < 1e-10 or (math.isnan(found) and problem.name == "frozen_ends")


# ----------------------------------------------------------------------------------- matrices with a known angle


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
def test_transposed_weights_as_B_give_no_angle_in_a_linear_network(rule, of):
    made, x, y = linear(rule)
    _, W2, W3 = weights_of(made)
    made.feedback.matrices = {("block", 0): (W3 @ W2).t().clone(), ("block", 1): W3.t().clone()}  # kept transposed
    assert max(angles(made, x, y, of)) < 1e-10


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", ["mlp_relu", "conv_pool", "residual", "batchnorm"])
def test_fa_with_the_weights_as_B_is_bp(name, of):
    problem = BY_NAME[name].double()
    made = make_rule("fa", problem)
    weights = enumerate(made.blocks.parameters())
    made.feedback.matrices = {("weight", j): p.detach().clone() for j, p in weights if p.dim() > 1}
    assert max(angles(made, problem.x, problem.y, of)) < 1e-10


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("rule", LEARN_FROM_B)
def test_a_factor_does_not_turn_and_a_minus_turns_round(rule, of):
    made, x, y = linear(rule, widths=(8, 12, 5))
    before = angles(made, x, y, of)[0]
    for factor, expected in ((7.0, before), (-1.0, 180 - before)):
        made.feedback.matrices = {key: B * factor for key, B in made.feedback.matrices.items()}
        assert angles(made, x, y, of)[0] == pytest.approx(expected, abs=1e-9)
    assert abs(before - 90) > 0.1


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("rule", LEARN_FROM_B)
def test_independent_matrices_are_at_right_angles_on_average(rule, of):
    found = [angles(*linear(rule, widths=(30, 400, 10), seed=seed), of)[0] for seed in range(40)]
    assert np.mean(found) == pytest.approx(90, abs=4 * np.std(found) / math.sqrt(40))
    assert 0 < np.std(found) < 5


def test_below_90_degrees_a_small_step_lowers_the_loss_and_above_it_raises_it():
    for sign in (1, -1):
        made, x, y = linear("dfa", widths=(8, 12, 5))
        made.blocks[1].requires_grad_(False)  # so that the first block alone decides
        made.parameters[1], made.optimizers[1] = [], None
        made.feedback.matrices[("block", 0)] *= sign
        angle = angles(made, x, y)[0]
        made.optimizers[0].param_groups[0]["lr"] = 1e-3
        losses = [made.step(x, y).item() for _ in range(2)]
        assert (losses[1] < losses[0]) == (angle < 90)


# ------------------------------------------------------------------------------------------- no direction, no angle


@pytest.mark.parametrize("of", OF)
def test_blocks_without_a_direction_have_nan(of):
    problem = BY_NAME["partly_frozen"]
    for rule in RULE_NAMES:
        assert [math.isnan(a) for a in angles(make_rule(rule, problem), problem.x, problem.y, of)] == [
            False,
            True,
            False,
        ]
    problem = BY_NAME["mlp_relu"]
    last = make_rule(ml.BASELINES["last_layer"], problem)
    assert [math.isnan(a) for a in angles(last, problem.x, problem.y, of)] == [True, True, False]


def test_a_block_whose_units_are_all_off_has_no_direction():
    problem = BY_NAME["mlp_relu"]
    made = make_rule("dfa", problem)
    with torch.no_grad():
        made.blocks[1][0].bias.fill_(-1e6)
    assert [math.isnan(a) for a in angles(made, problem.x, problem.y)] == [True, True, False]  # BP's first is zero, too


def test_a_weight_that_is_not_used_changes_no_angle():
    problem = BY_NAME["mlp_relu"]
    made, other = make_rule("dfa", problem), make_rule("dfa", problem)
    made.blocks[0][0].register_parameter("unused", nn.Parameter(torch.ones(3)))
    made = ml.DFA(made.blocks, SGD, feedback=made.feedback)
    assert len(made.parameters[0]) == 3
    assert angles(made, problem.x, problem.y) == angles(other, problem.x, problem.y)


def test_what_is_asked_for_must_be_known():
    problem = BY_NAME["mlp_relu"]
    with refuses(ValueError, "signals", "did you mean 'signal'?"):
        angles(make_rule("dfa", problem), problem.x, problem.y, "signals")


# ------------------------------------------------------------------------------------------------- nothing is left


def state(rule: ml.Rule) -> list:
    """Return copies of all that a rule has, and of the global generator."""
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in rule.blocks.modules()]
    named = [*rule.blocks.named_parameters(), *rule.blocks.named_buffers()]
    return copy.deepcopy(
        [
            {name: tensor.detach() for name, tensor in named},
            {name: tensor.grad for name, tensor in named if tensor.grad is not None},
            [tensor.requires_grad for _, tensor in named],
            [module.training for module in rule.blocks.modules()],
            [None if made is None else made.state_dict() for made in rule.optimizers],
            rule.feedback.state_dict(),
            vars(rule).get("_fitting", {}),
            torch.get_rng_state(),
            hooks,
        ]
    )


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("problem", params())
def test_the_rule_is_left_as_it_was(problem, rule, of):
    for steps, storage in ((0, "stored"), (2, "shared")):  # before the matrices are drawn, and after
        made = make_rule(rule, problem, "momentum", storage)
        train(made, problem, steps)
        for parameter in list(made.blocks.parameters())[::2]:  # someone's own
            parameter.grad = torch.ones_like(parameter)
        before, held = state(made), [(p, p.grad) for p in made.blocks.parameters()]
        angles(made, problem.x, problem.y, of)
        assert_identical(state(made), before)
        assert all(p.grad is gradient for p, gradient in held)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("problem", params())
def test_training_does_not_notice_that_it_is_looked_at(problem, rule):
    alone, watched = (make_rule(rule, problem, "momentum") for _ in range(2))
    expected = train(alone, problem)

    def look():
        for of in OF:
            angles(watched, problem.x, problem.y, of)

    assert_same_training(train(watched, problem, each_step=look), expected)


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_failure_half_way_leaves_nothing_either(rule, of):
    problem = BY_NAME["batchnorm"]
    made = make_rule(rule, problem)
    before = state(made)
    with refuses(FloatingPointError, "x holds NaN or inf"):
        angles(made, problem.x * math.nan, problem.y, of)
    assert_identical(state(made), before)
    loss, made.loss_fn = made.loss_fn, lambda logits, y: logits.sum() * math.nan  # after the forward pass
    with refuses(FloatingPointError, "not finite"):
        angles(made, problem.x, problem.y, of)
    made.loss_fn = loss
    assert_identical(state(made), before)


def test_what_mem_dfa_keeps_is_not_decided_by_looking():
    problem = BY_NAME["mlp_relu"]
    made = make_rule("memdfa", problem, keep_bytes=800)
    expected = make_rule("memdfa", problem, keep_bytes=800)._how_many_fit(problem.x)
    angles(made, problem.x, problem.y, "signal")  # with hooks on the blocks, that take more
    assert made._how_many_fit(problem.x) == expected


def test_angles_can_be_had_where_gradients_are_switched_off():
    problem = BY_NAME["mlp_relu"]
    made = make_rule("fa", problem)
    with torch.no_grad():
        inside = angles(made, problem.x, problem.y)
    assert inside == angles(made, problem.x, problem.y)


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data():
    return ml.datasets.load("mnist5k").subset(300, 100)


def test_follow_trains_as_fit_does_and_looks_when_it_is_asked_to(data):
    followed, fitted = (ml.DFA(ml.models.mlp(784, [20], 10), SGD) for _ in range(2))
    table = follow(followed, data, [0, 3, 10], batch_size=64, probe=50, seed=1)  # two epochs of five steps
    ml.fit(fitted, data, 2, 64, seed=1)
    assert_identical(followed.blocks.state_dict(), fitted.blocks.state_dict())
    assert list(zip(table["step"], table["block"], strict=True)) == [(s, b) for s in (0, 3, 10) for b in (1, 2)]
    x, y = data.x_train[:50], data.y_train[:50]
    for column, of in (("gradient_deg", "gradient"), ("signal_deg", "signal")):
        assert list(table[column][-2:]) == angles(fitted, x, y, of)


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


def test_angles_become_columns_of_the_history(data):
    rule = ml.DFA(ml.models.mlp(784, [20], 10), SGD)
    x, y = data.x_train[:50], data.y_train[:50]
    watch = lambda rule, epoch: {f"block{i}_deg": a for i, a in enumerate(angles(rule, x, y), 1)}  # noqa: E731
    table = ml.fit(rule, data, 2, 64, on_epoch=watch).table
    assert list(table.iloc[-1][["block1_deg", "block2_deg"]]) == angles(rule, x, y)


# ------------------------------------------------------------------------------------------ what a block does of it


def test_a_linear_block_does_what_it_is_told_through_the_likeness_of_its_inputs():
    made, x, y = linear("memdfa")
    found, h = responses(made, x, y), x
    _, e = made.error(made.blocks(x), y)
    for i, (block, W) in enumerate(zip(made.blocks, weights_of(made), strict=True)):
        told = e if i == len(made.blocks) - 1 else e @ made.feedback.dense(i, 5, len(W), like=e)
        done = (h @ h.T + 1) @ told  # the bias sees each example alike
        assert found[i] == pytest.approx(_degrees([told.numpy()], [done.detach().numpy()]), abs=1e-9)
        h = block(h)


@pytest.mark.parametrize("name", ["conv_pool", "batchnorm", "residual", "dropout"])
def test_a_response_is_what_a_small_step_does(name):
    problem = BY_NAME[name].double()
    made = make_rule("dfa", problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = state(made)
        found = responses(made, problem.x, problem.y)
        assert_identical(state(made), before)

        h = problem.x
        _, e = made.error(forward_without_trace(made.chain, h), problem.y)
        for i, block in enumerate(made.chain):
            drawn = torch.get_rng_state()
            out = block(h)
            told = made.signal(i, e).shaped_like(out.detach()).clone()
            weights = list(block.parameters())
            steps = torch.autograd.grad(out, weights, told)
            torch.set_rng_state(drawn)
            with torch.no_grad():
                for weight, step in zip(weights, steps, strict=True):
                    weight.add_(step, alpha=1e-7)
                moved = (block(h) - out) / 1e-7
                for weight, step in zip(weights, steps, strict=True):
                    weight.sub_(step, alpha=1e-7)
            assert found[i] == pytest.approx(_degrees([told.numpy()], [moved.numpy()]), abs=1e-3)
            h = out.detach()


def test_a_block_that_trains_nothing_does_nothing():
    problem = BY_NAME["partly_frozen"]
    found = responses(make_rule("memdfa", problem), problem.x, problem.y)
    assert [math.isnan(angle) for angle in found] == [False, True, False]
