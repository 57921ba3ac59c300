"""Deliberately wrong rules, each of which the checks of the other files must catch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, Problem, make_rule, train
from reference import (
    assert_close_training,
    assert_matches_twin,
    assert_same_training,
    refuses_and_keeps,
    train_plainly,
)
from test_baselines import check_equals_bp
from test_learned import check_b_goes_down
from test_local_losses import check_equals_a_plain_loop, check_sends_the_targets
from test_recompute import assert_left_as_it_was
from test_rivals import REVERSIBLE, train_by_moving
from test_steps import nan
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from torch.utils.checkpoint import checkpoint

import memdfa_lab as ml
from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.feedback import Learned, Stored
from memdfa_lab.core.local import block_gradient
from memdfa_lab.core.local_losses import DRTP, LocalReadout
from memdfa_lab.core.recompute import buffers_restored
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import BP, DFA, FA, MemDFA
from memdfa_lab.core.signal import Signal
from memdfa_lab.rivals import activation_offload, lean_bp

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------- the checks, as in the other files


def check_equals_dfa(rule: type[Rule], problem: Problem, storage: Any = "stored") -> None:
    expected = train(make_rule("dfa", problem, "momentum", storage), problem)
    assert_same_training(expected, train(make_rule(rule, problem, "momentum", storage), problem))


def check_equals_autograd(rule: type[Rule], problem: Problem) -> None:
    expected = train_plainly(problem, OPTIMIZERS["momentum"], 4)
    assert_same_training(expected, train(make_rule(rule, problem, "momentum"), problem))


def check_equals_twin(rule: type[Rule], problem: Problem, storage: Any = "stored") -> None:
    twin = next(name for name, base in (("bp", BP), ("fa", FA), ("dfa", Rule)) if issubclass(rule, base))
    problem = problem.double()
    assert_matches_twin(make_rule(rule, problem, storage=storage), twin, problem)


def check_refuses_nan(rule: type[Rule], problem: Problem) -> None:
    learner = make_rule(rule, problem)
    learner.step(problem.x, problem.y)
    learner.loss_fn = nan
    with refuses_and_keeps(learner, FloatingPointError, "no weight was changed"):
        learner.step(problem.x, problem.y)


# ------------------------------------------------------------------------------------------- mutants of MEM-DFA


class MemDFAWithOwnPass(MemDFA):
    """MEM-DFA written out, so that mutants can leave out one thing; as it stands, it is right."""

    fork, put_back, old_weights = True, True, True

    def first_pass(self, x: Tensor) -> Tensor:
        fork = torch.random.fork_rng(devices=[]) if self.fork else nullcontext()
        put_back = buffers_restored(self.blocks) if self.put_back else nullcontext()
        with torch.no_grad(), fork, put_back:
            for block in self.blocks:
                x = block_gradient(block, x).forward()
        return x

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss, e = self.error(self.first_pass(x), y)
        h = x
        for i, block in enumerate(self.blocks):
            before = h
            h = self.teach(i, self.recompute(i, before), e)
            if not self.old_weights:
                with torch.no_grad(), torch.random.fork_rng(devices=[]), buffers_restored(block):
                    h = run_block(block, before)
        return loss


class UpdatesBeforeRecompute(MemDFAWithOwnPass):
    old_weights = False


class DoesNotRestoreBuffers(MemDFAWithOwnPass):
    put_back = False


class DoesNotRestoreGenerators(MemDFAWithOwnPass):
    fork = False


# ------------------------------------------------------------------------------------ mutants of any rule: mixins


class LooksAtTheErrorTooLate(Rule):
    def rehearse(self, x: Tensor, y: Tensor) -> None:
        """Leave a first step as it is, for what is seen in each step."""

    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        loss = self.loss_fn(logits, y)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]


class LastBlockIsTaughtBe(Rule):
    def signal(self, i: int, e: Tensor) -> Signal:
        return Signal(i, e, self.feedback)


class ChannelsLast(Signal):
    """e B_i laid out over the feature map with the channels last."""

    def shaped_like(self, out: Tensor) -> Tensor:
        channels, *rest = out.shape[1:]
        signal = super().shaped_like(out).contiguous()
        return signal.view(-1, *rest, channels).movedim(-1, 1).contiguous()


class InMemoryOrder(Rule):
    def signal(self, i: int, e: Tensor) -> Signal:
        return super().signal(i, e) if i == len(self.blocks) - 1 else ChannelsLast(i, e, self.feedback)


def mutant(mixin: type[Rule], base: type[Rule]) -> type[Rule]:
    return type(f"{mixin.__name__}In{base.__name__}", (mixin, base), {})


# ------------------------------------------------------------------------------------------- mutants of feedback


class RedrawnEachUse(Stored):
    def _matrix(self, *given: Any) -> Tensor:
        B = super()._matrix(*given)
        self.seed, self.matrices = self.seed + 1, {}
        return B


class RedrawnEachStep(Stored):
    """Right in the first step, another B in each later one."""

    def dense(self, i: int, *given: Any) -> Tensor:
        if i == 0 and self.matrices:
            self.seed, self.matrices = self.seed + 1, {}
        return super().dense(i, *given)


class FromTheGlobalGenerator(Stored):
    def _draw(self, key: Any, shape: Any, factor: float, like: Tensor) -> Tensor:
        return torch.randn(shape, dtype=like.dtype) * factor


class Transposed(Stored):
    """B read row by row where it should be read column by column."""

    def dense(self, *given: Any) -> Tensor:
        B = super().dense(*given)
        return B.t().reshape(B.shape)


class WeightTransport(Stored):
    """FA that sends the error through the weights after all."""

    def weight(self, j: int, weight: Tensor) -> Tensor:
        return weight.detach()


class NumberedFromOne(Stored):
    def weight(self, j: int, weight: Tensor) -> Tensor:
        return super().weight(j + 1, weight)


# name -> rule, the check that must catch it, on which problem, and with which feedback if not Stored
MUTANTS = {
    "update before recompute": (UpdatesBeforeRecompute, check_equals_dfa, "mlp_relu"),
    "update before recompute, with dropout and BatchNorm": (UpdatesBeforeRecompute, check_equals_dfa, "everything"),
    "buffers not restored": (DoesNotRestoreBuffers, check_equals_dfa, "batchnorm"),
    "buffers not restored, momentum=None": (DoesNotRestoreBuffers, check_equals_dfa, "batchnorm_momentum_none"),
    "generators not restored": (DoesNotRestoreGenerators, check_equals_dfa, "dropout"),
    "B redrawn at each use, MEM-DFA": (MemDFA, check_equals_twin, "mlp_relu", RedrawnEachUse),
    "B redrawn each step, DFA": (DFA, check_equals_twin, "mlp_relu", RedrawnEachStep),
    "B redrawn each step, MEM-DFA": (MemDFA, check_equals_twin, "conv_pool", RedrawnEachStep),
    "B redrawn at each use, FA": (FA, check_equals_twin, "mlp_relu", RedrawnEachUse),
    "B from the global generator": (DFA, check_equals_twin, "mlp_relu", FromTheGlobalGenerator),
    "B transposed": (DFA, check_equals_twin, "mlp_relu", Transposed),
    "B in memory order": (mutant(InMemoryOrder, DFA), check_equals_twin, "conv_grouped_strided_dilated"),
    "FA with the weights": (FA, check_equals_twin, "conv_pool", WeightTransport),
    "FA with another layer's B": (FA, check_equals_twin, "conv_pool", NumberedFromOne),
    "the last block is taught B e, DFA": (mutant(LastBlockIsTaughtBe, DFA), check_equals_twin, "conv_pool"),
    "the last block is taught B e, MEM-DFA": (mutant(LastBlockIsTaughtBe, MemDFA), check_equals_dfa, "residual"),
    "BP with the weights of FA": (FA, check_equals_autograd, "mlp_relu"),
    "NaN not looked for": (mutant(LooksAtTheErrorTooLate, DFA), check_refuses_nan, "mlp_relu"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_caught(name):
    rule, check, problem, *storage = MUTANTS[name]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(rule, BY_NAME[problem], *(kind(seed=3) for kind in storage))


# each check with the rules that are right, on the problems of its mutants
RIGHT = {
    check_equals_dfa: [MemDFA, MemDFAWithOwnPass],
    check_equals_autograd: [BP],
    check_equals_twin: [FA, DFA, MemDFA, MemDFAWithOwnPass],
    check_refuses_nan: [DFA],
}


@pytest.mark.parametrize("check", RIGHT)
def test_the_same_checks_pass_the_right_rules(check):
    """So that a mutant is caught for what is wrong with it."""
    for name in {mutant[2] for mutant in MUTANTS.values() if mutant[1] is check}:
        for rule in RIGHT[check]:
            check(rule, BY_NAME[name])


# ------------------------------------------------------------------- a B that learns, readouts, targets in place of e


class GoesUp(Learned):
    def learn(self, i: int, e: Tensor, h: Tensor, *others: Any) -> None:
        super().learn(i, -e, h, *others)


class WithoutDecay(Learned):
    def _made(self, parameters: Any) -> torch.optim.Optimizer:
        return self._make(parameters, lr=self.lr)


class LearnsFirst(MemDFA):
    """B learns before it has made the signal."""

    def teach(self, i: int, block: Any, e: Tensor) -> Tensor:
        if i < len(self.chain) - 1:
            block.begin()
            self.feedback.learn(i, e, block.output(), self.group)
        self.feedback.learns = False
        try:
            return super().teach(i, block, e)
        finally:
            del self.feedback.learns


class SignalAfterUpdate(LocalReadout):
    def local_error(self, i: int, block: Any, y: Tensor) -> Tensor:
        super().local_error(i, block, y)
        with torch.enable_grad():
            return self._gradients(i, block.output().detach().requires_grad_(), y)[0]


class ReadoutsRest(LocalReadout):
    def local_error(self, i: int, block: Any, y: Tensor) -> Tensor:
        optimizers, self.optimizers = self.optimizers, [None] * len(self.optimizers)
        try:
            return super().local_error(i, block, y)
        finally:
            self.optimizers = optimizers


class Swapped(LocalReadout):
    """The second loss has the first one's weight."""

    def __init__(self, *given: Any, similarity: float, **options: Any):
        super().__init__(*given, similarity=1 - similarity, **options)


class NotCentred(LocalReadout):
    def prepare(self, x: Tensor, y: Tensor) -> None:
        super().prepare(x, y)
        for readout in self.readouts:
            readout.dissimilarity = self.dissimilarity

    def dissimilarity(self, features: Tensor, y: Tensor) -> Tensor:
        rows = normalize(features)
        return mse_loss(rows @ rows.t(), (y[:, None] == y).to(rows))


class AwayFromTargets(DRTP):
    def local_error(self, i: int, block: Any, y: Tensor) -> Tensor:
        return -super().local_error(i, block, y)


class SumOfTargets(DRTP):
    def local_error(self, i: int, block: Any, y: Tensor) -> Tensor:
        return super().local_error(i, block, y) * len(y)


in_loop = partial(check_equals_a_plain_loop, BY_NAME["mlp_relu"])
WRONG = {
    "B goes up": partial(check_b_goes_down, kind=GoesUp),
    "B does not decay": partial(check_b_goes_down, kind=WithoutDecay),
    "B learns first": partial(check_b_goes_down, rule=LearnsFirst),
    "the signal comes from a readout that has learned": partial(in_loop, rule=SignalAfterUpdate),
    "readouts do not learn": partial(in_loop, rule=ReadoutsRest),
    "the losses' weights are swapped": partial(in_loop, rule=Swapped),
    "similarities are not centred": partial(in_loop, rule=NotCentred),
    "away from the targets": partial(check_sends_the_targets, rule=AwayFromTargets),
    "the sum of the targets": partial(check_sends_the_targets, rule=SumOfTargets),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_learns_the_wrong_way_is_caught(name):
    with pytest.raises(AssertionError):
        WRONG[name]()


# ------------------------------------------------------------ what a pass leaves, FA's backward pass, the comparison


@pytest.mark.parametrize(
    ("rule", "problem"), [(DoesNotRestoreBuffers, "batchnorm"), (DoesNotRestoreGenerators, "dropout")]
)
def test_a_pass_that_leaves_a_trace_is_caught(rule, problem):
    learner, x = make_rule(rule, BY_NAME[problem]), BY_NAME[problem].x
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError):
        assert_left_as_it_was(learner.blocks, lambda: learner.first_pass(x))


# a name in lean_bp -> what is wrong in its place, the problems on which that matters, and one on which it does not
WRONG_BASELINES = {
    "buffers_restored": (lambda block: nullcontext(), ["batchnorm", "batchnorm_momentum_none"], "dropout"),
    "checkpoint": (partial(checkpoint, preserve_rng_state=False), ["dropout"], "batchnorm"),
}


@pytest.mark.parametrize("name", WRONG_BASELINES)
def test_a_baseline_that_does_not_restore_for_the_second_run_is_caught(name, monkeypatch):
    wrong, caught, passed = WRONG_BASELINES[name]
    monkeypatch.setattr(lean_bp, name, wrong)
    check_equals_bp("checkpoint", BY_NAME[passed], segments=3)
    for problem in caught:
        with pytest.raises(AssertionError):
            check_equals_bp("checkpoint", BY_NAME[problem], segments=3)


class KeepsNoGenerator(ml.Binomial):
    def hold(self) -> Any:
        return lambda: None


class LeavesAllTraces(ml.Binomial):
    def run(self, i: int, h: Tensor, name: str = "forward") -> Tensor:
        return run_block(self.chain[i], h).detach()


class UpdatesBeforeTheLastRun(ml.Binomial):
    """Runs a block for its gradient with weights that have moved since it was run for the next one's input."""

    def learn(self, i: int, h: Tensor, signals: list[Tensor]) -> None:
        with torch.no_grad():
            for p in self.parameters[i]:
                p.mul_(1 + 1e-6)
        super().learn(i, h, signals)


class ForgetsWhatWasBelow(ml.Reversible):
    """Hands on what comes out of G and F without what passes by them."""

    def _take_back(self, *given: Any) -> Any:
        x, signal = super()._take_back(*given)
        return x, signal if given[5] is None else signal - given[5]


class SwapsTheParts(ml.Reversible):
    def _learn_coupling(self, i: int, h: Tensor, signals: Any, to_F: Any, to_G: Any) -> Tensor:
        return super()._learn_coupling(i, h, signals, to_G, to_F)


class OneSided(ml.MeZO):
    """Compares with the loss of the weights as they are."""

    def _move(self, seed: int, by: float) -> float:
        return super()._move(seed, by if by > 0 else by / 2)


class ZOfAnotherSeed(ml.MeZO):
    def _move(self, seed: int, by: float) -> float:
        return super()._move(seed + 1, by)


class WritesLate(ml.ActivationOffload):
    """Reads what was written last, whatever was saved."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            take = activation_offload._Waiting.take
            patch.setattr(activation_offload._Waiting, "take", lambda self, saved: take(self, late(saved)))
            return super().step(x, y)


def late(saved: Any) -> Any:
    return saved if isinstance(saved, Tensor) else saved._replace(at=0)


def check_couplings(rule: type[Rule], problem: Problem) -> None:
    expected = train(make_rule("bp", problem.double(), "momentum"), problem.double())
    assert_close_training(expected, train(make_rule(rule, problem.double(), "momentum"), problem.double()))


def check_moves(rule: type[Rule], problem: Problem) -> None:
    problem = problem.double()
    expected, found = train_by_moving(problem, "sgd"), train(make_rule(rule, problem), problem)
    for one, other in zip(expected.tensors, found.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


COUPLED = {problem.name: problem for problem in REVERSIBLE}
WRONG_RIVALS = {
    "generators not held": (KeepsNoGenerator, check_equals_bp, BY_NAME["dropout"]),
    "traces of each run left": (LeavesAllTraces, check_equals_bp, BY_NAME["batchnorm"]),
    "run with updated weights": (UpdatesBeforeTheLastRun, check_equals_bp, BY_NAME["mlp_relu"]),
    "skips forgotten": (ForgetsWhatWasBelow, check_couplings, COUPLED["mixed"]),
    "generators of F and G swapped": (SwapsTheParts, check_couplings, COUPLED["dropout"]),
    "one-sided": (OneSided, check_moves, BY_NAME["mlp_tanh_mse"]),
    "another z": (ZOfAnotherSeed, check_moves, BY_NAME["mlp_relu"]),
    "reads another tensor": (WritesLate, check_equals_bp, BY_NAME["mlp_relu"]),
}


@pytest.mark.parametrize("name", WRONG_RIVALS)
def test_a_wrong_rival_is_caught_and_the_right_one_is_not(name):
    rule, check, problem = WRONG_RIVALS[name]
    check(rule.__base__, problem)
    with pytest.raises(AssertionError):
        check(rule, problem)


def test_the_comparison_sees_each_part_of_what_training_leaves_behind():
    good, again = (train(make_rule("memdfa", BY_NAME["everything"], "adamw"), BY_NAME["everything"]) for _ in range(2))
    assert_same_training(good, again)
    state = {name: value + 1 for name, value in good.optimizer[0].items()}
    for part, value in {
        "losses": [*good.losses[:-1], good.losses[-1] + 1e-6],
        "tensors": [*good.tensors[:-1], good.tensors[-1].nextafter(torch.tensor(9.0))],
        "optimizer": [state, *good.optimizer[1:]],
        "rng": good.rng.roll(1),
    }.items():
        with pytest.raises(AssertionError):
            assert_same_training(good, replace(good, **{part: value}))
