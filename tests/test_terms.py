"""All of the loss: penalties on weights, parameters of the loss itself, and what would be dropped is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import AS_BP, BY_GRADIENT, BY_NAME, EVERY_RULE, OPTIMIZERS, Problem, make_rule, rotated
from reference import assert_close, assert_identical, refuses_and_keeps, surrogate_gradients
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab.core.rules import find_rule
from memdfa_lab.memory import measure

BP_LIKE = ["bp", *AS_BP]
PROBLEM = BY_NAME["mlp_tanh"] if "mlp_tanh" in BY_NAME else BY_NAME["mlp_relu"]


def absolute(net: nn.Module) -> Tensor:
    return 0.03 * sum(p.abs().sum() for p in net.parameters() if p.requires_grad)


def squares(net: nn.Module) -> Tensor:
    return torch.stack([(p**2).sum() for p in net.parameters() if p.requires_grad]).mean()


def norms_of_blocks(net: nn.Module) -> Tensor:
    """Return a penalty that joins all weights of a block, in a sum over blocks."""
    joined = [torch.cat([p.flatten() for p in block.parameters()]) for block in net if list(block.parameters())]
    return sum((weights.norm() ** 3 for weights in joined), start=torch.zeros(()))


def first_alone(net: nn.Module) -> Tensor:
    return next(net.parameters()).exp().sum() / 50


PENALTIES = [absolute, squares, norms_of_blocks, first_alone]


def penalised(problem: Problem, net: nn.Module, penalty: Callable[[nn.Module], Tensor]) -> Any:
    return lambda logits, y: problem.loss(logits, y) + penalty(net)


def build(rule: str, problem: Problem, penalty: Any, optimizer: Any, **options: Any) -> ml.Rule:
    net = problem.build()
    loss = penalised(problem, net, penalty)
    return EVERY_RULE[rule](net, optimizer, loss, ml.feedback.Regenerated(seed=3), **options)


@rotated("name rule penalty", ["mlp_relu", "conv_pool", "batchnorm", "residual"], BP_LIKE, PENALTIES, turns=16)
def test_a_penalty_learns_in_bp_and_its_baselines_as_by_autograd(name, rule, penalty):
    problem, optimizer = BY_NAME[name].double(), OPTIMIZERS["adamw"]
    model = problem.build()
    made, loss_fn = optimizer(model.parameters()), penalised(problem, model, penalty)
    learner = build(rule, problem, penalty, optimizer)
    for _ in range(3):
        made.zero_grad()
        loss = loss_fn(model(problem.x), problem.y)
        loss.backward()
        made.step()
        assert_close([learner.step(problem.x, problem.y)], [loss.detach()])
    assert_close([p.detach() for p in learner.blocks.parameters()], [p.detach() for p in model.parameters()])
    assert learner._terms is None  # the loss's graph is not kept


@rotated("name penalty", ["mlp_relu", "conv_pool", "batchnorm", "residual", "partly_frozen"], PENALTIES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_penalty_is_added_to_dfas_gradient_of_its_block(name, penalty, clip):
    problem = BY_NAME[name].double()
    oracle = build("dfa", problem, penalty, OPTIMIZERS["sgd"])
    _, gradients = surrogate_gradients(oracle, problem.x, problem.y)
    before = [[p.detach().clone() for p in block] for block in oracle.parameters]
    ends = []
    for rule, options in (("dfa", {}), ("memdfa", {}), ("memdfa", {"keep_bytes": 1000})):
        learner = build(rule, problem, penalty, OPTIMIZERS["sgd"], clip_norm=clip, **options)
        learner.step(problem.x, problem.y)
        ends.append([[p.detach() for p in block] for block in learner.parameters])
    assert_identical(ends[0], ends[1])
    assert_identical(ends[0], ends[2])
    for block, moved, wanted in zip(before, ends[0], gradients, strict=True):
        norm = sum(float((g**2).sum()) for g in wanted) ** 0.5
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        assert_close([old - new for old, new in zip(block, moved, strict=True)], [0.1 * factor * g for g in wanted])


def test_one_blocks_penalty_gradient_is_in_memory_at_a_time():
    peaks = []
    for depth in (4, 32):
        net = ml.models.mlp(64, [64] * depth, 10)
        loss = penalised(BY_NAME["mlp_relu"], net, lambda net: sum((p * p).sum() for p in net.parameters()))
        learner = ml.MemDFA(net, partial(torch.optim.SGD, lr=0.01), loss, ml.feedback.Regenerated())
        peaks.append(measure(learner, torch.randn(16, 64), torch.arange(16) % 10, warm_up=1).peak_bytes)
    assert peaks[1] - peaks[0] < 28 * 64 * 8  # the scalars and pointers of each penalty, not 28 gradients of 16 KiB


class Scaled(nn.Module):
    """A cross-entropy at a temperature that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.scale + self.shift, y) + 0.1 * self.scale**2


@rotated("rule optimizer", BY_GRADIENT, ["sgd", "momentum", "adamw"], turns=1)
def test_the_losss_own_parameters_learn_as_by_autograd_and_are_saved(rule, optimizer):
    factory, problem, ends = OPTIMIZERS[optimizer], BY_NAME["mlp_relu"], []
    for _ in range(2):
        loss = Scaled()
        ends.append((EVERY_RULE[rule](problem.build(), factory, loss, ml.feedback.Stored(seed=3)), loss))
    (learner, loss), (other, other_loss) = ends
    own, expected = Scaled(), None
    made = factory(own.parameters())
    for _ in range(3):
        own.load_state_dict(loss.state_dict())
        logits = learner.blocks(problem.x).detach()
        made.zero_grad()
        own(logits, problem.y).backward()
        made.step()
        expected = [p.detach().clone() for p in own.parameters()]
        ml.alignment.angles(learner, problem.x, problem.y)  # changes nothing
        learner.step(problem.x, problem.y)
        assert_close([p.detach() for p in loss.parameters()], expected)
    assert all(p.grad is None for p in loss.parameters())
    other.step(problem.x, problem.y)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert_identical(other_loss.state_dict(), loss.state_dict())
    assert_identical(other.step(problem.x, problem.y), learner.step(problem.x, problem.y))
    assert_identical(other_loss.state_dict(), loss.state_dict())
    with refuses_and_keeps(make_rule(rule, problem), ValueError, "with such a loss"):
        make_rule(rule, problem).load_state_dict(learner.state_dict())


# ------------------------------------------------------------------------------------------------ what is refused


class Captures(nn.Linear):
    seen: Tensor

    def forward(self, h: Tensor) -> Tensor:
        self.seen = super().forward(h)
        return self.seen


NET = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), Captures(12, 12), nn.Tanh(), nn.Linear(12, 5))
FOREIGN = torch.ones(3, requires_grad=True)
CROSS = F.cross_entropy
REFUSED = {
    "a product of two blocks": (lambda o, y, m: CROSS(o, y) + (m[0].weight @ m[0].weight.t() * m[2].weight).sum(),),
    "a norm of all weights": (lambda o, y, m: CROSS(o, y) + torch.cat([p.flatten() for p in m.parameters()]).norm(),),
    "weights times logits": (lambda o, y, m: CROSS(o * m[0].weight.norm(), y), "the logits and the weights of block 0"),
    "a leaf of nobody's": (lambda o, y, m: CROSS(o, y) + FOREIGN.sum(), "(3,)", "an nn.Module"),
    "an activation": (lambda o, y, m: CROSS(o, y) + m[2].seen.square().mean(), "(6, 12)", "part of them"),
    "a view of one": (lambda o, y, m: CROSS(o, y) + m[2].seen.detach()[:, 0].sum(), "(6, 12)", "part of them"),
    "no logits": (lambda o, y, m: m[0].weight.sum(), "does not depend on the logits"),
    "y of another shape": (lambda o, y, m: F.mse_loss(o[:, :1], y.float()), "the loss does not take", "target size"),
    "in place": (lambda o, y, m: CROSS(o.mul_(2), y), "in place"),
}
TERM = ("one term of the loss depends on the weights of block 0", "sum of terms")


@rotated("name rule", REFUSED, EVERY_RULE, turns=4)
def test_what_would_be_dropped_is_refused_at_the_first_step(name, rule):
    loss, *hints = REFUSED[name]
    model = copy.deepcopy(NET)
    learner = EVERY_RULE[rule](model, OPTIMIZERS["sgd"], lambda logits, y: loss(logits, y, model))
    with refuses_and_keeps(learner, ValueError, *(hints or TERM)):
        learner.step(BY_NAME["mlp_relu"].x, BY_NAME["mlp_relu"].y)


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_a_penalty_without_a_finite_gradient_is_refused_before_any_weight_changes(rule):
    model = copy.deepcopy(NET)
    nn.init.zeros_(model[0].bias)
    loss = lambda logits, y: F.cross_entropy(logits, y) + model[0].bias.abs().sqrt().sum()  # noqa: E731
    learner = EVERY_RULE[rule](model, OPTIMIZERS["sgd"], loss)
    with refuses_and_keeps(learner, FloatingPointError, "penalty", "no weight was changed"):
        learner.step(BY_NAME["mlp_relu"].x, BY_NAME["mlp_relu"].y)


def moderate(out: Tensor) -> Tensor:
    assert out.abs().max() < 1e6, "a loss that looks at what it gets"
    return out


@pytest.mark.parametrize("rule", ["dfa", "memdfa", "local_readout", "bp", "fa", "drtp"])
@pytest.mark.parametrize(
    ("last", "loss", "same"),
    [
        (nn.LogSoftmax(1), F.nll_loss, True),
        (nn.LogSoftmax(1), lambda p, y: F.kl_div(p, F.one_hot(y, 3).float(), reduction="batchmean"), True),
        (nn.Identity(), F.cross_entropy, False),
        (nn.Identity(), F.multi_margin_loss, False),
        (nn.Identity(), lambda out, y: F.l1_loss(out, 1e6 * F.one_hot(y, 3).float()), False),
        (nn.Identity(), lambda out, y: moderate(out).square().mean(), False),
    ],
)
def test_a_gradient_that_ignores_the_outputs_is_told_where_blocks_learn_from_it(rule, last, loss, same):
    network = [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 3), last)]
    learner = find_rule(rule)(network, partial(torch.optim.SGD, lr=0.01), loss)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    told = same and rule in ("dfa", "memdfa", "local_readout")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            learner.step(x, y)
    assert [str(one.message).endswith("leave that out and use F.cross_entropy") for one in found] == [True] * told
