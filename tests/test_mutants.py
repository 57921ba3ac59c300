"""Deliberately wrong rules, each of which the checks of the other files must catch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, STORAGES, Problem, make_rule, train
from reference import assert_close_training, assert_matches_twin, assert_same_training, train_plainly
from test_recompute import assert_left_as_it_was
from test_rules import assert_bad_batch_changes_nothing
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks, run_block
from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.local import block_gradient
from memdfa_lab.core.recompute import buffers_restored, forward_without_trace
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import BP, DFA, FA, MemDFA
from memdfa_lab.core.signal import Signal

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
    made = make_rule(rule, problem)
    good, factors = made.loss_fn, iter((1.0, float("nan")))  # the second step's loss is NaN
    made.loss_fn = lambda logits, y: good(logits, y) * next(factors)
    assert_bad_batch_changes_nothing(made, problem, problem.x)


def check_fa_with_weights_is_bp(rule: type[Rule], problem: Problem) -> None:
    problem = problem.double()
    fa = make_rule(rule, problem)

    def feed_back() -> None:
        fa.feedback.matrices = {("weight", j): p.detach().clone() for j, p in enumerate(fa.blocks.parameters())}

    feed_back()
    got = train(fa, problem, each_step=feed_back)
    assert_close_training(got, train(make_rule("bp", problem), problem))


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


class DoesNotPutBuffersBack(MemDFAWithOwnPass):
    put_back = False


class DoesNotForkTheGenerator(MemDFAWithOwnPass):
    fork = False


class UpdatesOnlyTheLastBlock(MemDFA):
    def update(self, i: int) -> None:
        if i == len(self.blocks) - 1:
            super().update(i)


# ------------------------------------------------------------------------------------ mutants of any rule: mixins


class SumOverTheBatch(Rule):
    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, e = super().error(logits, y)
        return loss, e * len(y)


class LastBlockIsGivenBe(Rule):
    def signal(self, i: int, e: Tensor) -> Signal:
        return Signal(i, e, self.feedback)


class Times(Signal):
    factor = 1.0

    def slices(self, *sizes: int):
        for part, s in super().slices(*sizes):
            yield part, s * self.factor


class Zeroed(Times):
    factor = 0.0


class Negated(Times):
    factor = -1.0


class BackwardZeroed(Rule):
    def signal(self, i: int, e: Tensor) -> Signal:
        last = i == len(self.blocks) - 1
        return super().signal(i, e) if last else Zeroed(i, e, self.feedback)


class WrongSign(Rule):
    def signal(self, i: int, e: Tensor) -> Signal:
        last = i == len(self.blocks) - 1
        return super().signal(i, e) if last else Negated(i, e, self.feedback)


class ErrorZeroed(Rule):
    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, e = super().error(logits, y)
        return loss, torch.zeros_like(e)


class LooksAtTheErrorTooLate(Rule):
    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        loss = self.loss_fn(logits, y)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]


class LossAfterTheUpdate(Rule):
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        super().step(x, y)
        with torch.no_grad():
            return self.loss_fn(forward_without_trace(self.blocks, x), y)


def mutant(mixin: type[Rule], base: type[Rule]) -> type[Rule]:
    return type(f"{mixin.__name__}In{base.__name__}", (mixin, base), {})


# ------------------------------------------------------------------------------------------- mutants of feedback


class RedrawnEachUse(Stored):
    def dense(self, i: int, error_size: int, output_size: int, like: Tensor) -> Tensor:
        B = super().dense(i, error_size, output_size, like)
        self.seed, self.matrices = self.seed + 1, {}
        return B

    def weight(self, j: int, weight: Tensor) -> Tensor:
        B = super().weight(j, weight)
        self.seed, self.matrices = self.seed + 1, {}
        return B


class RedrawnEachStep(Stored):
    """Right in the first step, another B in each later one."""

    def dense(self, i: int, error_size: int, output_size: int, like: Tensor) -> Tensor:
        if i == 0:
            self.seed, self.matrices = self.seed + 1, {}
        return super().dense(i, error_size, output_size, like)


class FromTheGlobalGenerator(Stored):
    def _draw(self, key: Any, shape: Any, factor: float, like: Tensor) -> Tensor:
        return torch.randn(shape, dtype=like.dtype) * factor


class Transposed(Stored):
    """B read row by row where it should be read column by column."""

    def dense(self, i: int, error_size: int, output_size: int, like: Tensor) -> Tensor:
        return super().dense(i, error_size, output_size, like).t().reshape(error_size, output_size)


class ChannelsLast(Signal):
    """B_i e laid out over the feature map with the channels last."""

    def shaped_like(self, out: Tensor) -> Tensor:
        channels, *rest = out.shape[1:]
        signal = super().shaped_like(out).contiguous()
        return signal.view(-1, *rest, channels).movedim(-1, 1).contiguous()


class InMemoryOrder(Rule):
    def signal(self, i: int, e: Tensor) -> Signal:
        last = i == len(self.blocks) - 1
        return super().signal(i, e) if last else ChannelsLast(i, e, self.feedback)


class ZeroFeedback(Stored):
    def weight(self, j: int, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


class WeightTransport(Stored):
    """FA that sends the error through the weights after all."""

    def weight(self, j: int, weight: Tensor) -> Tensor:
        return weight.detach()


class NumberedFromOne(Stored):
    def weight(self, j: int, weight: Tensor) -> Tensor:
        return super().weight(j + 1, weight)


def with_storage(check: Callable[..., None], storage: type[Stored]) -> Callable[[type[Rule], Problem], None]:
    """Return the check with feedback of that class and the seed that all checks use."""
    return lambda rule, problem: check(rule, problem, storage(seed=3 - (storage is RedrawnEachStep)))


MUTANTS = {
    "update before recompute": (UpdatesBeforeRecompute, check_equals_dfa, "mlp_relu"),
    "update before recompute, with dropout and BatchNorm": (UpdatesBeforeRecompute, check_equals_dfa, "everything"),
    "buffers not restored": (DoesNotPutBuffersBack, check_equals_dfa, "batchnorm"),
    "buffers not restored, momentum=None": (DoesNotPutBuffersBack, check_equals_dfa, "batchnorm_momentum_none"),
    "RNG not forked": (DoesNotForkTheGenerator, check_equals_dfa, "dropout"),
    "only the last block learns": (UpdatesOnlyTheLastBlock, check_equals_dfa, "mlp_relu"),
    "B redrawn at each use, MEM-DFA": (MemDFA, with_storage(check_equals_twin, RedrawnEachUse), "mlp_relu"),
    "B redrawn each step, DFA": (DFA, with_storage(check_equals_twin, RedrawnEachStep), "mlp_relu"),
    "B redrawn each step, MEM-DFA": (MemDFA, with_storage(check_equals_twin, RedrawnEachStep), "conv_pool"),
    "B redrawn at each use, FA": (FA, with_storage(check_equals_twin, RedrawnEachUse), "mlp_relu"),
    "B from the global generator": (DFA, with_storage(check_equals_twin, FromTheGlobalGenerator), "mlp_relu"),
    "B transposed": (DFA, with_storage(check_equals_twin, Transposed), "mlp_relu"),
    "B in memory order": (mutant(InMemoryOrder, DFA), check_equals_twin, "conv_grouped_strided_dilated"),
    "FA with the weights": (FA, with_storage(check_equals_twin, WeightTransport), "conv_pool"),
    "FA with another layer's B": (FA, with_storage(check_equals_twin, NumberedFromOne), "conv_pool"),
    "FA backward zeroed": (FA, with_storage(check_equals_twin, ZeroFeedback), "conv_pool"),
    "NaN not looked for": (mutant(LooksAtTheErrorTooLate, DFA), check_refuses_nan, "mlp_relu"),
}
for base in (DFA, MemDFA):
    for mixin in (SumOverTheBatch, LastBlockIsGivenBe, BackwardZeroed, WrongSign, LossAfterTheUpdate):
        MUTANTS[f"{mixin.__name__}, {base.__name__}"] = (mutant(mixin, base), check_equals_twin, "conv_pool")
for mixin in (LastBlockIsGivenBe, BackwardZeroed, SumOverTheBatch):
    MUTANTS[f"{mixin.__name__}, against DFA"] = (mutant(mixin, MemDFA), check_equals_dfa, "residual")
for base, check in ((BP, check_equals_autograd), (BP, check_equals_twin), (FA, check_equals_twin)):
    for mixin in (SumOverTheBatch, ErrorZeroed, LossAfterTheUpdate):
        name = f"{mixin.__name__}, {base.__name__}, {check.__name__}"
        MUTANTS[name] = (mutant(mixin, base), check, "mlp_tanh_mse")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_caught(name):
    rule, check, problem = MUTANTS[name]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(rule, BY_NAME[problem])


RIGHT = {
    (rule, check, problem)
    for checks, rules in (
        ((check_equals_dfa,), (MemDFA, MemDFAWithOwnPass)),
        ((check_equals_autograd,), (BP,)),
        ((check_equals_twin,), (BP, FA, DFA, MemDFA, MemDFAWithOwnPass)),
        ((check_refuses_nan,), (DFA,)),
    )
    for check in checks
    for rule in rules
    for problem in {problem for _, mutant_check, problem in MUTANTS.values()}
    if check is not check_equals_twin or BY_NAME[problem].twin
}


@pytest.mark.parametrize(
    ("rule", "check", "problem"),
    sorted(RIGHT, key=str),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_same_checks_pass_the_right_rules(rule, check, problem):
    """So that a mutant is caught for what is wrong with it."""
    check(rule, BY_NAME[problem])


# ----------------------------------------------------------------- FA's own backward pass, and the pass without trace


def without(flag: str) -> Callable[..., Tensor]:
    """Return forward_without_trace with one of its precautions left out."""

    def forward(blocks: nn.Sequential, x: Tensor) -> Tensor:
        rule = MemDFAWithOwnPass(blocks, OPTIMIZERS["sgd"])
        setattr(rule, flag, False)
        return rule.first_pass(x)

    return forward


@pytest.mark.parametrize(("flag", "problem"), [("put_back", "batchnorm"), ("fork", "dropout")])
def test_a_pass_that_leaves_a_trace_is_caught(flag, problem):
    problem = BY_NAME[problem]
    blocks = as_blocks(problem.build())
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError):
        assert_left_as_it_was(blocks, lambda: without(flag)(blocks, problem.x))


@pytest.mark.parametrize("check", [check_equals_twin, check_fa_with_weights_is_bp])
@pytest.mark.parametrize("problem", ["conv_pool", "conv_same_odd", "linear_on_tokens"])
@pytest.mark.parametrize("wrong", [0, 1], ids=["input_gradient_zeroed", "weight_gradient_zeroed"])
def test_a_wrong_backward_of_fas_layers_is_caught(wrong, problem, check, monkeypatch):
    from memdfa_lab.core import transport

    for layer in (transport._Linear, transport._Convolution):
        right = layer.backward

        def backward(ctx: Any, grad: Tensor, right: Any = right) -> tuple[Any, ...]:
            gradients = list(right(ctx, grad))
            if gradients[wrong] is not None:
                gradients[wrong] = torch.zeros_like(gradients[wrong])
            return tuple(gradients)

        monkeypatch.setattr(layer, "backward", staticmethod(backward))
    with pytest.raises(AssertionError):
        check(FA, BY_NAME[problem])


@pytest.mark.parametrize("storage", STORAGES)
def test_the_comparison_sees_each_part_of_what_training_leaves_behind(storage):
    problem = BY_NAME["everything"]
    good = train(make_rule("memdfa", problem, "adamw", storage), problem)
    assert_same_training(good, train(make_rule("memdfa", problem, "adamw", storage), problem))
    state = {name: value + 1 for name, value in good.optimizer[0].items()}
    for part, value in {
        "losses": [*good.losses[:-1], good.losses[-1] + 1e-6],
        "tensors": [*good.tensors[:-1], good.tensors[-1].nextafter(torch.tensor(9.0))],
        "optimizer": [state, *good.optimizer[1:]],
        "rng": good.rng.roll(1),
    }.items():
        with pytest.raises(AssertionError):
            assert_same_training(good, replace(good, **{part: value}))
