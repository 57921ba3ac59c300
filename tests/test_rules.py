"""The four rules against their oracles: each other, plain autograd with one optimizer, and numpy twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain, product

import pytest
import torch
from problems import (
    BY_NAME,
    OPTIMIZERS,
    RULE_NAMES,
    STORAGES,
    Problem,
    Record,
    make_rule,
    params,
    record,
    rotated,
    train,
)
from reference import (
    TOLERANCE,
    assert_close_training,
    assert_matches_twin,
    assert_same_training,
    refuses,
    surrogate_gradients,
    train_plainly,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memdfa_lab.core.feedback import KINDS, Learned, Stored
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import ALL_RULES

SGD = OPTIMIZERS["sgd"]

# ------------------------------------------------------------------------------------------ MEM-DFA equals DFA

SETTINGS = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "step_lr": {"optimizer": "momentum", "schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=2)},
    "weight_decay": {"optimizer": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)},
    "clip_norm": {"optimizer": "adamw", "clip_norm": 0.01},
}


def train_with(rule: str, problem: Problem, optimizer, storage="stored", schedule=None, **options) -> Record:
    learner = make_rule(rule, problem, optimizer, storage, **options)
    schedulers = [schedule(o) for o in learner.optimizers if o is not None] if schedule else []
    return train(learner, problem, each_step=lambda: [scheduler.step() for scheduler in schedulers])


@rotated("problem setting storage", params(), SETTINGS, STORAGES, turns=2)
def test_memdfa_trains_as_dfa_bit_for_bit(problem, setting, storage):
    dfa, memdfa = (train_with(rule, problem, storage=storage, **SETTINGS[setting]) for rule in ("dfa", "memdfa"))
    assert_same_training(dfa, memdfa)


@pytest.mark.parametrize(
    ("setting", "plain"), [("step_lr", "momentum"), ("weight_decay", "sgd"), ("clip_norm", "adamw")]
)
def test_schedule_decay_and_clipping_each_change_the_training(setting, plain):
    problem = BY_NAME["mlp_tanh_mse"]
    with pytest.raises(AssertionError):
        assert_same_training(*(train_with("memdfa", problem, **SETTINGS[name]) for name in (setting, plain)))


def test_memdfa_trains_as_dfa_through_a_reparametrised_weight_with_state_of_its_own():
    """Spectral norm moves its own buffers in each training forward pass: once a step, not twice."""

    def make() -> nn.Module:
        spectral = nn.utils.parametrizations.spectral_norm
        return nn.Sequential(spectral(nn.Linear(8, 8)), nn.Tanh(), spectral(nn.Linear(8, 8)), nn.Linear(8, 5))

    problem = Problem("spectral_norm", make, (8,))
    assert_same_training(*(train(make_rule(rule, problem), problem) for rule in ("dfa", "memdfa")))


@rotated("problem rule", params(), ["dfa", "memdfa"])
def test_dfa_and_memdfa_follow_the_gradient_of_a_surrogate_loss(problem, rule):
    """One scalar, sum_i <h_i, e B_i> + L with h_i cut off from h_{i-1}: a second way to DFA, for every net."""
    problem = problem.double()
    oracle, learner = make_rule("dfa", problem), make_rule(rule, problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = []
        for x, y in problem.batches(4):
            loss, gradients = surrogate_gradients(oracle, x, y)
            losses.append(loss)
            with torch.no_grad():
                for p, g in zip(chain(*oracle.parameters), chain(*gradients), strict=True):
                    p -= 0.1 * g
        expected = record(losses, oracle.blocks, [])
    assert_close_training(train(learner, problem), expected)


# ----------------------------------------------------------------------------------- plain autograd, numpy twins


@rotated("problem optimizer", params(), OPTIMIZERS)
def test_bp_trains_as_plain_autograd_with_one_optimizer(problem, optimizer):
    plain = train_plainly(problem, OPTIMIZERS[optimizer], steps=4)
    assert_same_training(train(make_rule("bp", problem, optimizer), problem), plain)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("problem", params(lambda problem: problem.twin))
def test_each_rule_matches_its_numpy_twin(problem, rule):
    problem = problem.double()
    assert_matches_twin(make_rule(rule, problem), rule.replace("mem", ""), problem)


def test_the_tolerance_tells_float32_from_float64():
    problem = BY_NAME["mlp_tanh_mse"]
    with pytest.raises(AssertionError):
        assert_matches_twin(make_rule("bp", problem), "bp", problem)
    assert TOLERANCE <= 1e-12


def test_the_rules_learn_differently():
    """Else the comparisons above would show nothing."""
    problem = BY_NAME["mlp_relu"]
    bp, fa, dfa = (train(make_rule(rule, problem), problem).tensors[0] for rule in ("bp", "fa", "dfa"))
    for one, other in ((bp, fa), (bp, dfa), (fa, dfa)):
        assert (one - other).abs().max() > 1e-3


# ------------------------------------------------------------------------------- FA and DFA with the weights as B


def feed_back_weights(rule: Rule) -> None:
    """Make FA's B the weights themselves: every B of the parameters that have one."""
    parameters = enumerate(rule.blocks.parameters())
    rule.feedback.matrices = {("weight", j): p.detach().clone() for j, p in parameters if p.dim() > 1}


def check_fa_with_the_weights_is_bp(rule: str | type[Rule], problem: Problem) -> None:
    problem = problem.double()
    fa = make_rule(rule, problem, "momentum")
    feed_back_weights(fa)
    learnt = train(fa, problem, each_step=lambda: feed_back_weights(fa))
    assert_close_training(learnt, train(make_rule("bp", problem, "momentum"), problem))


@pytest.mark.parametrize("problem", params())
def test_fa_with_the_weights_as_feedback_is_bp(problem):
    check_fa_with_the_weights_is_bp("fa", problem)


class Column(nn.Linear):
    """A block of one output, which puts out (N, 1), or (N,) if `flat`."""

    flat = False

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h)[:, 0] if self.flat else super().forward(h)


class FromColumn(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.reshape(-1, 1))


FIXED = [*(kind(3) for kind in KINDS.values()), Stored(3, grid=2)]


@pytest.mark.parametrize(
    ("rule", "feedback"),
    [*product(["dfa", "memdfa"], [*FIXED, Learned(3, lr=0.1)]), *product(["drtp"], FIXED)],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_a_block_that_puts_out_one_number_an_example_learns_as_one_that_puts_out_a_column(rule, feedback):
    problem = Problem("column", lambda: nn.Sequential(nn.Linear(8, 8), Column(8, 1), FromColumn(1, 5)), (8,))
    column, flat = (make_rule(ALL_RULES[rule], problem, "momentum", copy.deepcopy(feedback)) for _ in range(2))
    flat.chain[1].flat = True
    assert_same_training(train(column, problem), train(flat, problem))
    assert all(map(torch.equal, column.feedback.tensors(), flat.feedback.tensors()))


# ---------------------------------------------------------------------------- blocks without a graph of their own


class Checkpointed(nn.Module):
    """A residual unit with a checkpoint of its own."""

    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.unit, h, use_reentrant=self.reentrant)

    def unit(self, h: Tensor) -> Tensor:
        return h + self.b(torch.tanh(self.a(h)))


def with_unit(unit: Callable[[], nn.Module]) -> Problem:
    return Problem("unit", lambda: nn.Sequential(nn.Linear(8, 8), unit(), nn.Linear(8, 5)), (8,))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the checkpoint
def test_a_unit_with_a_checkpoint_learns_as_without_it_or_is_refused():
    problem = with_unit(partial(Checkpointed, reentrant=False))
    plain, checkpointed = (make_rule("memdfa", problem) for _ in range(2))
    plain.blocks[1].forward = plain.blocks[1].unit
    assert_same_training(train(plain, problem), train(checkpointed, problem))
    with refuses(RuntimeError, "Checkpointed", "use_reentrant=False"):  # it would not learn
        make_rule("dfa", with_unit(Checkpointed)).step(problem.x, problem.y)


class Dropped(nn.Linear):
    """A residual unit that returns its input: layer dropout (Huang et al. 2016)."""

    def forward(self, h: Tensor) -> Tensor:
        return h


@pytest.mark.parametrize(
    ("rule", "feedback"), [*((rule, "stored") for rule in RULE_NAMES), ("dfa", "learned"), ("memdfa", "learned")]
)
def test_a_unit_that_is_dropped_does_not_learn_and_the_others_do(rule, feedback):
    problem = with_unit(lambda: Dropped(8, 8))
    storage = Learned(lr=0.1) if feedback == "learned" else feedback
    before, learner = problem.build().state_dict(), make_rule(rule, problem, "momentum", storage)
    learner.step(problem.x, problem.y)
    assert rule not in ("dfa", "memdfa") or learner.feedback.matrices.keys() == {("block", 0)}
    learnt = {name for name, value in learner.blocks.state_dict().items() if not torch.equal(value, before[name])}
    assert learnt == {"0.weight", "0.bias", "2.weight", "2.bias"}
