"""The baselines against BP, bit for bit; what they hold, by weak references and counted bytes; and what is wrong."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, Problem, make_rule, params, record, train
from reference import assert_identical, assert_same_training, refuses
from test_rules import BAD_VALUES, assert_bad_batch_changes_nothing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memdfa_lab import memory
from memdfa_lab.core import phases
from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import BP
from memdfa_lab.lab import models
from memdfa_lab.rivals import BASELINES
from memdfa_lab.rivals.last_layer import LastLayer
from memdfa_lab.rivals.lean_bp import CheckpointBP, CheckpointStepInBackward, LeanBP, StepInBackward

AS_BP = {name: rule for name, rule in BASELINES.items() if name != "last_layer"}
IN_SEGMENTS = {name: rule for name, rule in AS_BP.items() if name != "step_in_backward"}
IN_BACKWARD = {name: rule for name, rule in AS_BP.items() if name != "checkpoint"}
DEEP = Problem("deep", lambda: models.mlp(8, [12] * 9, 5, activation="tanh"), (8,))


def make(rule: str | type[Rule], problem: Problem, optimizer: Any = "sgd", **options: Any) -> Rule:
    return make_rule(BASELINES.get(rule, rule), problem, optimizer, **options)


def check_equals_bp(rule: str | type[Rule], problem: Problem, optimizer: Any = "momentum", **options: Any) -> None:
    common = {name: value for name, value in options.items() if name != "segments"}
    expected = train(make_rule("bp", problem, optimizer, **common), problem)
    assert_same_training(expected, train(make(rule, problem, optimizer, **options), problem))


# ------------------------------------------------------------------------------------------------- equal to BP


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", AS_BP)
@pytest.mark.parametrize("problem", params())
def test_it_trains_as_bp_bit_for_bit(problem, rule, optimizer):
    check_equals_bp(rule, problem, optimizer)


@pytest.mark.parametrize("rule", IN_SEGMENTS)
@pytest.mark.parametrize("problem", params())
def test_it_trains_as_bp_with_any_number_of_segments(problem, rule):
    for segments in range(1, len(make(rule, problem).chain) + 2):
        check_equals_bp(rule, problem, segments=segments)


@pytest.mark.parametrize("rule", AS_BP)
@pytest.mark.parametrize("name", ["batchnorm", "everything", "partly_frozen"])
def test_clip_norm_limits_each_blocks_gradient_as_in_bp(name, rule):
    check_equals_bp(rule, BY_NAME[name], clip_norm=0.01)
    with pytest.raises(AssertionError):
        assert_same_training(
            *(train(make(rule, BY_NAME[name], clip_norm=limit), BY_NAME[name]) for limit in (0.01, None))
        )


@pytest.mark.parametrize("rule", AS_BP)
def test_it_trains_as_bp_in_eval_mode(rule):
    problem = BY_NAME["everything"]
    both = [make(name, problem) for name in ("bp", rule)]
    for made in both:
        made.blocks.eval()
    assert_same_training(*(train(made, problem) for made in both))


class Partial(nn.Module):
    """A unit with a weight that it does not use, and one that it uses twice."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.used(torch.tanh(self.used(h)))


def _partial() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Partial(), Partial(), nn.Linear(8, 5))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", AS_BP)
def test_a_block_with_a_weight_that_gets_no_gradient_learns_as_in_bp(rule, optimizer):
    check_equals_bp(rule, Problem("partial", _partial, (8,)), optimizer)


@pytest.mark.parametrize("rule", AS_BP)
def test_what_is_frozen_after_the_rule_was_made_stays_as_it_is(rule):
    problem = BY_NAME["mlp_tanh_mse"]
    both = [make(name, problem, "momentum") for name in ("bp", rule)]
    for made in both:
        made.step(problem.x, problem.y)
        made.chain[0][0].weight.requires_grad_(False)
        made.chain[1].requires_grad_(False)
    assert_same_training(*(train(made, problem) for made in both))


@pytest.mark.xfail(reason="a segment is run again with the changed buffers, as by torch.utils.checkpoint", strict=True)
@pytest.mark.parametrize("rule", IN_SEGMENTS)
def test_a_weight_with_state_of_its_own_learns_as_in_bp(rule):
    def make_net() -> nn.Module:
        spectral = nn.utils.parametrizations.spectral_norm
        return nn.Sequential(spectral(nn.Linear(8, 8)), nn.Tanh(), spectral(nn.Linear(8, 8)), nn.Linear(8, 5))

    check_equals_bp(rule, Problem("spectral_norm", make_net, (8,)), "sgd", segments=3)


# ----------------------------------------------------------------------------------------------------- segments


@contextmanager
def listening() -> Iterator[list[tuple[str, int | None]]]:
    """Collect the phases that begin within."""

    class Listener:
        def enter(self, name: str, block: int | None) -> None:
            heard.append((name, block))

        def leave(self) -> None:
            heard.append(("", None))

        def label(self, category: str, tensor: Tensor) -> None:
            pass

    heard: list[tuple[str, int | None]] = []
    listener = Listener()
    phases.listeners.append(listener)
    try:
        yield heard
    finally:
        phases.listeners.remove(listener)


def depth(heard: list[tuple[str, int | None]]) -> int:
    return sum(1 if name else -1 for name, _ in heard)


@pytest.mark.parametrize("rule", IN_SEGMENTS)
@pytest.mark.parametrize(
    ("segments", "again"),
    [
        (None, [3, 4, 5, 0, 1, 2]),  # three: 0-2, 3-5, 6-9
        (1, []),
        (2, [0, 1, 2, 3, 4]),
        (10, [8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (np.int64(99), [8, 7, 6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_each_segment_but_the_last_is_run_again_once_and_says_so(segments, again, rule):
    made = make(rule, DEEP, segments=segments)
    with listening() as heard:
        made.step(DEEP.x, DEEP.y)
    assert [block for name, block in heard if name == "forward"] == list(range(10))
    assert [block for name, block in heard if name == "recompute"] == again
    assert sorted(block for name, block in heard if name == "update") == list(range(10))
    assert depth(heard) == 0


@pytest.mark.parametrize("rule", IN_BACKWARD)
def test_each_block_is_updated_within_the_backward_pass_the_last_one_first(rule):
    made = make(rule, DEEP)
    with listening() as heard:
        made.step(DEEP.x, DEEP.y)
    assert [block for name, block in heard if name == "update"] == list(range(9, -1, -1))
    start = heard.index(("backward", None))
    assert all(depth(heard[start:k]) > 0 for k in range(start + 1, len(heard)))


@pytest.mark.parametrize("rule", IN_SEGMENTS)
@pytest.mark.parametrize("segments", [0, -1, 2.0, 1.5, True, "3", float("nan")])
def test_segments_that_are_no_whole_number_from_1_on_are_refused(segments, rule):
    with refuses(ValueError, "segments", repr(segments)):
        make(rule, BY_NAME["mlp_relu"], segments=segments)


# ------------------------------------------------------------------------------------------------- hooks and errors


def hooks_of(rule: Rule) -> list[Any]:
    return [hook for p in rule.blocks.parameters() for hook in (p._post_accumulate_grad_hooks or {}).values()]


@pytest.mark.parametrize("rule", IN_BACKWARD)
def test_no_hook_is_left_after_a_step_and_the_users_own_stays(rule):
    problem = BY_NAME["everything"]
    made = make(rule, problem)
    calls: list[Tensor] = []
    made.chain[0][1].weight.register_post_accumulate_grad_hook(calls.append)
    for step in range(3):
        made.step(problem.x, problem.y)
        assert len(hooks_of(made)) == 1
        assert len(calls) == step + 1
    torch.save(made.blocks.state_dict(), io.BytesIO())
    copy.deepcopy(made.blocks)


class Interrupted(nn.Module):
    """A layer whose backward pass fails."""

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(self.fail)
        return h

    def fail(self, gradient: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("rule", IN_BACKWARD)
def test_no_hook_is_left_after_an_exception_in_the_backward_pass(rule):
    problem = Problem("fails", lambda: nn.Sequential(*DEEP.make()[:6], Interrupted(), *DEEP.make()[6:]), (8,))
    made = make(rule, problem)
    with listening() as heard, pytest.raises(KeyboardInterrupt):
        made.step(problem.x, problem.y)
    assert depth(heard) == 0
    assert ("update", 9) in heard  # it had begun
    assert not hooks_of(made)


@pytest.mark.parametrize("rule", IN_BACKWARD)
def test_no_hook_is_left_after_an_optimizer_fails(rule):
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError

    made = make(rule, DEEP, partial(Failing, lr=0.1))
    with pytest.raises(ArithmeticError):
        made.step(DEEP.x, DEEP.y)
    assert not hooks_of(made)


class Reentrant(nn.Module):
    """A unit that uses a weight in two reentrant checkpoints: its gradient comes in two parts."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(8, 8), reentrant

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(2):
            h = torch.tanh(checkpoint(self.linear, h, use_reentrant=self.reentrant))
        return h


@pytest.mark.parametrize("rule", IN_BACKWARD)
def test_a_gradient_in_parts_is_refused_and_one_from_a_checkpoint_inside_a_block_is_not(rule):
    def net(reentrant: bool) -> Problem:
        make_net = partial(nn.Sequential, nn.Linear(8, 8), Reentrant(reentrant), nn.Linear(8, 5))
        return Problem("reentrant", lambda: copy.deepcopy(make_net()), (8,))

    check_equals_bp(rule, net(False))
    made = make(rule, net(True), **({"segments": 1} if rule in IN_SEGMENTS else {}))
    with refuses(RuntimeError, "block 1", "use_reentrant=False"):
        made.step(DEEP.x, DEEP.y)
    assert not hooks_of(made)


@pytest.mark.parametrize("rule", BASELINES)
@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("name", ["mlp_relu", "batchnorm", "everything"])
def test_nan_and_inf_are_refused_before_any_weight_changes(name, bad, rule):
    problem = BY_NAME[name]
    x = problem.x
    x.view(-1)[3] = bad
    assert_bad_batch_changes_nothing(make(rule, problem, "adamw"), problem, x)


@pytest.mark.parametrize("rule", BASELINES)
def test_a_loss_that_is_not_finite_is_refused_before_any_weight_changes(rule):
    made = make(rule, DEEP)
    good, factors = made.loss_fn, iter((1.0, float("nan")))
    made.loss_fn = lambda logits, y: good(logits, y) * next(factors)
    assert_bad_batch_changes_nothing(made, DEEP, DEEP.x)
    assert not hooks_of(made)


@pytest.mark.parametrize("rule", BASELINES)
def test_a_step_leaves_the_batch_alone_and_no_gradients_behind(rule):
    problem = BY_NAME["everything"]
    x, made = problem.x, make(rule, problem)
    for p in made.blocks.parameters():
        p.grad = torch.ones_like(p)
    loss = made.step(x, problem.y)
    assert torch.equal(x, problem.x)
    assert loss.dim() == 0
    assert not loss.requires_grad
    assert all(p.grad is None for p in made.blocks.parameters())


# --------------------------------------------------------------------------------------------------- last layer only


def train_last_block_alone(problem: Problem, optimizer: str) -> Any:
    """Train the last block by plain autograd, on features from the others; each in training mode, each run once."""
    blocks = make_rule("bp", problem).blocks
    made = OPTIMIZERS[optimizer](blocks[-1].parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = []
        for x, y in problem.batches(4):
            with torch.no_grad():
                features = blocks[:-1](x)
            loss = problem.loss(blocks[-1](features), y)
            made.zero_grad()
            loss.backward()
            made.step()
            losses.append(loss.detach())
        return record(losses, blocks, [made])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", params(lambda problem: problem.name != "frozen_ends"))
def test_last_layer_trains_as_the_last_block_alone_on_frozen_features(problem, optimizer):
    made = make("last_layer", problem, optimizer)
    before = [p.detach().clone() for block in made.chain[:-1] for p in block.parameters()]
    assert_same_training(train(made, problem), train_last_block_alone(problem, optimizer))
    assert_identical([p.detach() for block in made.chain[:-1] for p in block.parameters()], before)


def test_last_layer_refuses_a_frozen_last_block():
    with refuses(ValueError, "last block is frozen"):
        make("last_layer", BY_NAME["frozen_ends"])


def test_last_layer_trains_a_net_of_one_block_as_bp():
    check_equals_bp(LastLayer, Problem("one", lambda: nn.Sequential(nn.Linear(8, 5)), (8,)))


# ------------------------------------------------------------------------------------------------------- memory

# The shape of 784-[800]x32-10 at batch 128, a tenth as wide.
WIDTH, DEPTH, BATCH = 80, 32, 128
ACTIVATION, GRADIENT = 4 * BATCH * WIDTH, 4 * WIDTH * (WIDTH + 1)


def net() -> nn.Sequential:
    return models.mlp(WIDTH, [WIDTH] * DEPTH, 10)


def measured(rule: type[Rule], **options: Any) -> memory.Trace:
    with torch.random.fork_rng(devices=[]):
        made = rule(net(), OPTIMIZERS["sgd"], **options)
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    return memory.measure(made, x, torch.arange(BATCH) % 10, warm_up=1)


def test_what_each_holds_at_its_peak():
    """In units of one activation and one block's gradients; the small change (loss, e, biases) is under one of each."""
    peaks = {name: measured(rule).peak_bytes for name, rule in {"bp": BP, **BASELINES}.items()}
    A, G = ACTIVATION, GRADIENT
    longest = 6  # of the six segments of 33 blocks
    assert peaks["bp"] > (DEPTH - 1) * G
    assert DEPTH * A <= peaks["step_in_backward"] <= (DEPTH + 2) * A + G
    assert peaks["checkpoint"] <= DEPTH * G + 2 * A + longest * A
    assert (5 + longest - 1) * A <= peaks["checkpoint_step_in_backward"] <= (5 + longest + 2) * A + G
    assert peaks["last_layer"] <= 3 * A


@pytest.mark.parametrize("rule", BASELINES)
def test_prediction_is_measurement_to_the_byte(rule):
    options = {"segments": 4} if rule in IN_SEGMENTS else {}
    predicted = memory.predict(BASELINES[rule], net, (BATCH, WIDTH), OPTIMIZERS["sgd"], **options)
    assert predicted.peak_bytes == measured(BASELINES[rule], **options).peak_bytes
    assert predicted.end_bytes == 0


def test_more_layers_cost_last_layer_nothing():
    def peak(depth: int) -> int:
        return memory.predict(LastLayer, lambda: models.mlp(64, [64] * depth, 10), (32, 64)).peak_bytes

    assert peak(2) == peak(64)


class Watched(nn.Module):
    """A layer that keeps a weak reference to each of its outputs, and counts those alive."""

    alive: weakref.WeakSet[Any]
    most: int

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        out = torch.tanh(self.linear(h))
        Watched.alive.add(out.untyped_storage())
        Watched.most = max(Watched.most, len(Watched.alive))
        return out


def most_outputs_alive(rule: type[Rule], blocks: int, **options: Any) -> int:
    Watched.alive, Watched.most = weakref.WeakSet(), 0
    made = rule(nn.Sequential(*(Watched() for _ in range(blocks))), OPTIMIZERS["sgd"], **options)
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        made.step(torch.ones(4, 8), torch.arange(4))
        assert not Watched.alive
    finally:
        gc.enable()
    return Watched.most


def test_outputs_are_freed_as_soon_as_they_can_be():
    assert most_outputs_alive(BP, 16) == 16
    assert most_outputs_alive(StepInBackward, 16) == 16
    assert most_outputs_alive(LastLayer, 16) == 2
    for rule in IN_SEGMENTS.values():
        assert most_outputs_alive(rule, 16) == 3 + 4  # three inputs of segments, and one segment
        assert most_outputs_alive(rule, 16, segments=1) == 16
        assert most_outputs_alive(rule, 16, segments=16) == 16


@pytest.mark.parametrize("rule", IN_BACKWARD)
def test_one_blocks_gradients_at_a_time(rule):
    made = make(rule, DEEP)
    held: list[int] = []
    update = made.update

    def counting(i: int) -> None:
        held.append(sum(p.grad is not None for p in made.blocks.parameters()))
        update(i)

    made.update = counting
    made.step(DEEP.x, DEEP.y)
    assert held == [2] * 10


# ------------------------------------------------------------------------------------------------------- mutants


class StatisticsTwice(CheckpointBP):
    """Checkpointing as it comes: BatchNorm counts each batch twice."""

    def _run(self, names: Iterator[str], blocks: range, h: Tensor) -> Tensor:
        for i in blocks:
            h = run_block(self.chain[i], h)
        return h


class OtherDropout(CheckpointBP):
    """Checkpointing that does not put the generator back for the second run."""

    def _forward_in_segments(self, h: Tensor) -> Tensor:
        starts = [len(self.chain) * k // self.segments for k in range(self.segments)]
        for start, stop in pairwise([*starts, len(self.chain)]):
            run = partial(self._run, iter(("forward", "recompute")), range(start, stop))
            h = checkpoint(run, h, use_reentrant=False, preserve_rng_state=False)
        return h


class BlockByBlock(StepInBackward):
    """Step in backward written out, block by block; as it stands, it is right."""

    too_early = False

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, graphs = self.begin(x), []
        for i in range(len(self.chain)):
            h = h.detach().requires_grad_()
            graphs.append((h, self.forward(i, h)))
            h = graphs[-1][1]
        loss, signal = self.error(h, y)
        for i in reversed(range(len(self.chain))):
            before, after = graphs.pop()
            wanted = self.parameters[i]
            for p, g in zip(wanted, torch.autograd.grad(after, wanted, signal, retain_graph=True), strict=True):
                p.grad = g
            if self.too_early:
                self.update(i)
                after = self.forward(i, before)
            (signal,) = torch.autograd.grad(after, before, signal)
            if not self.too_early:
                self.update(i)
        return loss


class UpdatesBeforeTheGradientToTheInput(BlockByBlock):
    too_early = True


def updating_when(ready: Callable[[int, int], bool]) -> Callable[[Rule], Any]:
    """Return the context that updates a block whenever `ready(gradients there, gradients in all)`."""

    @contextmanager
    def context(rule: Rule) -> Iterator[None]:
        there = [0] * len(rule.parameters)

        def arrived(i: int, parameter: Tensor) -> None:
            there[i] += 1
            if ready(there[i], len(rule.parameters[i])):
                rule.update(i)

        pairs = [(i, p) for i, block in enumerate(rule.parameters) for p in block]
        handles = [p.register_post_accumulate_grad_hook(partial(arrived, i)) for i, p in pairs]
        yield
        for handle in handles:
            handle.remove()

    return context


WRONG_TIMES = {
    "at the first gradient": lambda there, of_all: there == 1,
    "at the last but one": lambda there, of_all: there == of_all - 1,
    "never": lambda there, of_all: False,
}


@pytest.mark.parametrize("rule", IN_BACKWARD)
@pytest.mark.parametrize("when", WRONG_TIMES)
def test_an_update_at_the_wrong_time_is_caught(when, rule, monkeypatch):
    monkeypatch.setattr(LeanBP, "_updating_in_backward", updating_when(lambda there, of_all: there == of_all))
    check_equals_bp(rule, BY_NAME["mlp_tanh_mse"])  # the right time
    monkeypatch.setattr(LeanBP, "_updating_in_backward", updating_when(WRONG_TIMES[when]))
    with pytest.raises(AssertionError):
        check_equals_bp(rule, BY_NAME["mlp_tanh_mse"])


def test_an_update_that_does_not_wait_for_weights_without_gradient_is_caught(monkeypatch):
    monkeypatch.setattr(LeanBP, "_updating_in_backward", updating_when(lambda there, of_all: there == of_all))
    with pytest.raises(AssertionError):
        check_equals_bp(StepInBackward, Problem("partial", _partial, (8,)))


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (StatisticsTwice, "batchnorm"),
        (StatisticsTwice, "batchnorm_momentum_none"),
        (OtherDropout, "dropout"),
        (UpdatesBeforeTheGradientToTheInput, "mlp_tanh_mse"),
        (UpdatesBeforeTheGradientToTheInput, "residual"),
    ],
)
def test_a_wrong_baseline_is_caught(rule, problem):
    options = {"segments": 3} if issubclass(rule, CheckpointBP) else {}
    with pytest.raises(AssertionError):
        check_equals_bp(rule, BY_NAME[problem], "momentum", **options)


@pytest.mark.parametrize(
    ("rule", "problem"), [(OtherDropout, "batchnorm"), (StatisticsTwice, "dropout"), (BlockByBlock, "residual")]
)
def test_the_same_check_passes_where_the_fault_does_not_matter(rule, problem):
    check_equals_bp(rule, BY_NAME[problem])


class KeepsAGradient(CheckpointStepInBackward):
    """Right in its numbers, but the gradients are not let go."""

    def update(self, i: int) -> None:
        self.kept = [*getattr(self, "kept", []), *(p.grad for p in self.parameters[i])]
        super().update(i)


class KeepsASegment(CheckpointBP):
    """Right in its numbers, but what is run again is not let go."""

    def _run(self, names: Iterator[str], blocks: range, h: Tensor) -> Tensor:
        self.kept = [*getattr(self, "kept", []), super()._run(names, blocks, h)]
        return self.kept[-1]


def test_a_hidden_reference_is_noticed():
    check_equals_bp(KeepsAGradient, DEEP)
    assert measured(KeepsAGradient).peak_bytes > 1.5 * measured(CheckpointStepInBackward).peak_bytes
    check_equals_bp(KeepsASegment, DEEP)
    with pytest.raises(AssertionError):
        assert most_outputs_alive(KeepsASegment, 16) == 3 + 4


def test_baselines_are_found_by_name():
    assert {
        "checkpoint": CheckpointBP,
        "step_in_backward": StepInBackward,
        "checkpoint_step_in_backward": CheckpointStepInBackward,
        "last_layer": LastLayer,
    } == BASELINES
