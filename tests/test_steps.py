"""What a step of any rule leaves alone, how it clips, and what it refuses before any weight changes."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import BY_NAME, EVERY_RULE, RULE_NAMES, STORAGES, Problem, make_rule, params, rotated, train
from reference import (
    assert_close,
    assert_identical,
    assert_same_training,
    refuses,
    refuses_and_keeps,
    surrogate_gradients,
)
from torch import Tensor, nn

from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.local_losses import LOCAL_RULES
from memdfa_lab.core.rules import ALL_RULES, find_rule

MLP = BY_NAME["mlp_relu"]

# -------------------------------------------------------------------------------------- what a step leaves alone


@rotated("problem storage rule", params(), STORAGES, EVERY_RULE, turns=2)
def test_a_step_leaves_the_batch_and_the_generators_alone_and_no_gradients_behind(problem, storage, rule):
    x, y, learner = problem.x, problem.y, make_rule(rule, problem, storage=storage)
    before = torch.get_rng_state(), random.getstate()
    loss = learner.step(x, y)
    assert torch.equal(torch.get_rng_state(), before[0]) or problem.random
    assert random.getstate() == before[1]
    assert torch.equal(x, problem.x)
    assert torch.equal(y, problem.y)
    assert (loss.shape, loss.requires_grad, x.requires_grad) == ((), False, False)
    assert all(p.grad is None for p in learner.blocks.parameters())


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_gradients_from_elsewhere_are_dropped_and_a_batch_that_asks_for_one_gets_none(rule):
    problem = BY_NAME["mlp_tanh_mse"]
    learner, other = make_rule(rule, problem), make_rule(rule, problem)
    for p in learner.blocks.parameters():
        p.grad = torch.ones_like(p)
    x = problem.x.requires_grad_()
    assert torch.equal(learner.step(x, problem.y), other.step(problem.x, problem.y))
    assert x.grad is None
    assert_same_training(train(learner, problem), train(other, problem))


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_frozen_parameters_do_not_move_and_all_others_do(rule):
    for name in ("partly_frozen", "frozen_ends"):
        learner = make_rule(rule, BY_NAME[name], partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))
        before = copy.deepcopy(learner.blocks)
        train(learner, BY_NAME[name])
        for old, new in zip(before.parameters(), learner.blocks.parameters(), strict=True):
            assert torch.equal(old, new) != new.requires_grad


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_in_eval_mode_the_running_statistics_are_used_and_kept(rule):
    problem = BY_NAME["batchnorm"]
    learner = make_rule(rule, problem)
    learner.blocks.eval()
    before = copy.deepcopy(dict(learner.blocks.named_buffers()))
    expected = problem.loss(learner.blocks(problem.x), problem.y).detach()
    assert torch.equal(learner.step(problem.x, problem.y), expected)
    assert_identical(dict(learner.blocks.named_buffers()), before)


def test_each_blocks_optimizer_has_that_blocks_parameters_and_no_others():
    learner = make_rule("memdfa", BY_NAME["partly_frozen"])
    first, frozen, last = (o and [p for group in o.param_groups for p in group["params"]] for o in learner.optimizers)
    assert frozen is None
    assert list(map(id, first)) == [id(learner.blocks[0][0].weight)]  # the bias is frozen
    assert list(map(id, last)) == list(map(id, learner.blocks[2].parameters()))


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_clip_norm_limits_the_norm_of_each_blocks_gradient(rule):
    problem = BY_NAME["batchnorm"].double()
    oracle = make_rule(rule, problem)
    if rule == "bp":
        loss = problem.loss(oracle.blocks(problem.x), problem.y)
        flat = iter(torch.autograd.grad(loss, list(oracle.blocks.parameters())))
        gradients = [[next(flat) for _ in block] for block in oracle.parameters]
    else:
        _, gradients = surrogate_gradients(oracle, problem.x, problem.y)
    norms = [sum(float((g**2).sum()) for g in block) ** 0.5 for block in gradients]
    limit = (min(norms) * max(norms)) ** 0.5  # at least one block above it, one below
    assert max(norms) > 1.1 * limit > 1.2 * min(norms)
    learner = make_rule(rule, problem, clip_norm=limit)
    before = [[p.detach().clone() for p in block] for block in learner.parameters]
    learner.step(problem.x, problem.y)
    for i, norm in enumerate(norms):
        factor = min(1.0, limit / (norm + 1e-6))  # 1e-6: as torch has it
        moved = [old - new.detach() for old, new in zip(before[i], learner.parameters[i], strict=True)]
        assert_close(moved, [0.1 * factor * g for g in gradients[i]], f"block {i}")


# --------------------------------------------------------------------------------------------------- NaN and inf


@rotated(
    "rule name bad",
    [rule for rule in EVERY_RULE for _ in range(2)],
    ["mlp_relu", "conv_pool", "batchnorm", "everything", "mlp_tanh_mse"],  # a squashing activation hides infinity
    [float("nan"), float("inf"), float("-inf")],
)
def test_nan_and_inf_in_the_data_are_refused_before_anything_changes(rule, name, bad):
    """BatchNorm's statistics, too: with NaN in them the net would be lost though no weight has changed."""
    problem = BY_NAME[name]
    x = problem.x
    x.view(-1)[3] = bad
    learner = make_rule(rule, problem, "adamw")
    learner.step(problem.x, problem.y)
    with refuses_and_keeps(learner, FloatingPointError, "x holds NaN or inf", "no weight was changed"):
        learner.step(x, problem.y)


def nan(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y) * float("nan")


def steep(logits: Tensor, y: Tensor) -> Tensor:
    """Be finite where the gradient is not: the square root's slope at 0."""
    return (logits - logits.detach()).abs().sqrt().mean()


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("loss", [nan, steep])
def test_a_loss_that_is_not_finite_or_has_no_finite_gradient_is_refused(loss, rule):
    learner = make_rule(rule, MLP, "adamw")
    learner.step(MLP.x, MLP.y)
    learner.loss_fn = loss
    with refuses_and_keeps(learner, FloatingPointError, "the loss or its gradient", "no weight was changed"):
        learner.step(MLP.x, MLP.y)


# ------------------------------------------------------------------------------------------------ what is refused

MADE = torch.optim.SGD(MLP.build().parameters(), lr=0.1)
FACTORY = (TypeError, "partial(torch.optim.SGD")
REFUSED = [
    *[({"optimizer": wrong}, *FACTORY) for wrong in (MADE, 0.1, None, lambda p: None, lambda p: "sgd")],
    ({"optimizer": lambda p: torch.optim.SGD([torch.ones(1)], lr=0.1)}, ValueError, "other parameters"),
    ({"optimizer": torch.optim.LBFGS}, ValueError, "LBFGS", "Adam"),
    *[({"storage": wrong}, TypeError, "ml.feedback.Stored(seed=0)") for wrong in (0, Stored, torch.ones(3, 3))],
    *[({"clip_norm": wrong}, ValueError, "clip_norm", "above 0") for wrong in (0, -1.0, float("nan"))],
    ({"problem": Problem("rnn", lambda: nn.RNN(8, 8), (8,))}, TypeError, "nn.Sequential"),
    ({"problem": Problem("no_loss", MLP.make, (8,), "mse")}, TypeError, "loss_fn", "'mse'"),
]


@rotated("given rule", range(len(REFUSED)), RULE_NAMES)
def test_what_a_rule_cannot_be_made_of_is_refused(given, rule):
    changes, error, *hints = REFUSED[given]
    with refuses(error, *hints):
        make_rule(rule, **{"problem": MLP, **changes})


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_loss_that_is_not_a_scalar_is_refused(rule):
    learner = make_rule(rule, Problem("none", MLP.make, (8,), partial(F.cross_entropy, reduction="none")))
    with refuses_and_keeps(learner, ValueError, "scalar", "mean over the batch"):
        learner.step(MLP.x, MLP.y)


class InplaceStart(nn.Linear):
    """A unit that overwrites its input."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.relu_())


class Pair(nn.Linear):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(h), h


CORRUPTING = [
    (lambda: [nn.ReLU(inplace=True), nn.Linear(8, 5)], RuntimeError, "inplace=False"),
    (lambda: [nn.Linear(8, 12), InplaceStart(12, 5)], RuntimeError, "inplace=False"),
    (lambda: [nn.Linear(8, 12), Pair(12, 5)], TypeError, "tuple"),
]


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize(("layers", "error", "hint"), CORRUPTING)
def test_a_block_that_would_corrupt_another_is_refused_before_any_weight_changes(layers, error, hint, rule):
    problem = Problem("unit", lambda: nn.Sequential(*layers()), (8,))
    learner = make_rule(rule, problem)
    with refuses_and_keeps(learner, error, hint):
        learner.step(problem.x, problem.y)


def test_rules_and_baselines_are_found_by_name():
    assert ALL_RULES == EVERY_RULE | LOCAL_RULES
    assert all(find_rule(name) is kind for name, kind in EVERY_RULE.items())
    with refuses(ValueError, "'memdfaa'", "did you mean 'memdfa'", *EVERY_RULE):
        find_rule("memdfaa")
