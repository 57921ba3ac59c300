"""What a step asks of blocks and of the model, and that a refusal leaves everything as it was."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import BY_NAME, EVERY_RULE, RULE_NAMES, make_rule, record, rotated, train
from reference import assert_identical, assert_same_training, refuses, refuses_and_keeps
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import memdfa_lab as ml

DIRECT = ["dfa", "memdfa"]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


class Unit(nn.Module):
    """A layer, and a function of the module and the layer's output."""

    def __init__(self, then: Any, layer: Any = None, **attributes: Any):
        super().__init__()
        self.layer = layer or nn.Linear(12, 12)
        self.then = then
        vars(self).update(attributes)

    def forward(self, h: Tensor) -> Any:
        return self.then(self, self.layer(h))


def net(*units: nn.Module) -> nn.Sequential:
    """Return a block whose buffers and masks would tell of a step that was begun, then the units and a last layer."""
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.1), *units, nn.Linear(12, 5))


# ------------------------------------------------------------------------------------------- what breaks the contract

BREAKS = {
    "pools examples": (lambda m, a: a.view(3, 2, 12).mean(1), ValueError, "makes 3 rows of 6", "the first block"),
    "joins all": (lambda m, a: a.sum(), TypeError, "()", "takes no signal"),
    "leaves out": (lambda m, a: a[:4], ValueError, "makes 4 rows of 6"),
    "whole numbers": (lambda m, a: a.long(), TypeError, "torch.int64", "floats"),
    "a pair": (lambda m, a: (a, a), TypeError, "a tensor to a tensor", "tuple"),
    "no graph": (lambda m, a: a.detach() * 2, RuntimeError, "never learn", "use_reentrant=False"),
    "an error": (lambda m, a: a @ a, RuntimeError, "(6, 12)", "cannot be multiplied"),
}
ROWS = {"pools examples": 3, "leaves out": 4}


@rotated("name rule", BREAKS, DIRECT, turns=2)
def test_a_block_that_breaks_the_contract_is_refused_and_all_is_as_it_was(name, rule):
    then, error, *hints = BREAKS[name]
    learner, x = ml.RULES[rule](net(Unit(then)), SGD), X.clone()
    before = torch.get_rng_state(), random.getstate()
    with refuses_and_keeps(learner, error, "block 1, Unit", "no weight was changed", *hints):
        learner.step(x, Y[: ROWS.get(name)])
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), Unit(lambda m, a: a, nn.Hardtanh(inplace=True))])
def test_a_batch_is_not_overwritten_before_it_is_refused(first, rule):
    learner, x = EVERY_RULE[rule](nn.Sequential(first, nn.Linear(8, 5)), SGD), X.clone()
    with refuses_and_keeps(learner, RuntimeError, "block 0", "inplace=False"):
        learner.step(x, Y)
    assert torch.equal(x, X)


@rotated(
    "change rule", [lambda x: x.double(), lambda x: x.byte(), lambda x: x[:, 1:], lambda x: x[..., None]], RULE_NAMES
)
def test_a_batch_that_the_first_block_does_not_take_is_refused_with_its_shape_and_dtype(change, rule):
    learner, x = ml.RULES[rule](net(), SGD), change(X)
    dtype = ["its weights are torch.float32"] if x.dtype != X.dtype else []
    with refuses_and_keeps(learner, Exception, "block 0", str(tuple(x.shape)), str(x.dtype), *dtype):
        learner.step(x, Y)


@rotated("context rule", [torch.no_grad, torch.inference_mode], RULE_NAMES, turns=2)
def test_a_step_without_gradients_is_refused(context, rule):
    learner = ml.RULES[rule](net(), SGD)
    with context(), refuses_and_keeps(learner, RuntimeError, f"torch.{context.__name__}()"):
        learner.step(X, Y)


def test_a_block_that_drops_the_batch_of_one_is_refused_at_that_batch():
    for rule in DIRECT:
        learner = ml.RULES[rule](nn.Sequential(nn.Linear(8, 12), Unit(lambda m, a: a.squeeze()), nn.Linear(12, 5)), SGD)
        learner.step(X, Y)
        with refuses_and_keeps(learner, ValueError, "block 1, Unit, makes 12 rows of 1"):
            learner.step(X[:1], Y[:1])


def test_a_length_that_changes_later_is_noticed_before_anything_is_taught():
    for rule in DIRECT:
        unit = Unit(lambda m, a: a[: len(a) - m.drop], drop=0)
        learner = ml.RULES[rule](nn.Sequential(nn.Linear(8, 12), unit, nn.Linear(12, 5)), SGD)
        learner.step(X, Y)
        unit.drop = 1
        with refuses_and_keeps(learner, ValueError, "block 1, Unit, makes 5 rows of 6"):
            learner.step(X, Y[:5])


# ------------------------------------------------------------------------------------------------- blocks that rest


class Sometimes(nn.Linear):
    """Layer dropout that puts out its input, or what has no graph at all, half of the time."""

    def __init__(self, rest: Any):
        super().__init__(12, 12)
        self.rest = rest

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) if torch.rand(()) < 0.5 else self.rest(h)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("rest", [lambda h: h, lambda h: h * 2, torch.ones_like])
def test_a_block_that_rests_in_some_steps_learns_in_the_others(rest, rule):
    torch.manual_seed(2)
    model, moved = nn.Sequential(nn.Linear(8, 12), Sometimes(rest), nn.Linear(12, 5)), []
    learner = ml.RULES[rule](model, partial(torch.optim.SGD, lr=0.1))
    for _ in range(8):
        before = model[1].weight.clone()
        learner.step(X, Y)
        moved.append(not torch.equal(before, model[1].weight))
    assert set(moved) == {True, False}


# ------------------------------------------------------------------------------------------- the model as it is now


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.01)])
def test_freezing_and_unfreezing_between_steps_is_that_of_one_optimizer_over_all(optimizer):
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), *net(nn.Linear(12, 12), nn.Tanh())[3:])]
    models[0][0].requires_grad_(False)
    models[0][3].weight.requires_grad_(False)
    models += [copy.deepcopy(models[0]) for _ in range(3)]
    made = optimizer(models[0].parameters())
    rules = [ml.BP(models[1], optimizer), ml.DFA(models[2], optimizer), ml.MemDFA(models[3], optimizer)]
    for freeze in ([], [], [(0, True)], [(3, True)], [(4, False)], [(0, False), (5, False)], [(5, True)]):
        for place, on in freeze:
            for model in models:
                model[place].requires_grad_(on)
        plain(models[0], made)
        for rule in rules:
            rule.step(X, Y)
    assert_identical(models[1].state_dict(), models[0].state_dict())
    assert_identical(models[2].state_dict(), models[3].state_dict())
    fresh = ml.BP(copy.deepcopy(models[1]).requires_grad_(), optimizer)
    models[1].requires_grad_()
    rules[0].step(X, Y)
    fresh.load_state_dict(rules[0].state_dict())
    fresh.step(X, Y), rules[0].step(X, Y)
    assert_identical(fresh.state_dict(), rules[0].state_dict())


CHANGES = {
    "a parameter": (lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(12, 12))), "3.weight is another one"),
    "assigned": (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), "0.weight is another one"),
    "a module": (lambda m: m.__setitem__(3, nn.Linear(12, 12)), "3 is another one"),
    "one more": (lambda m: m.append(nn.Sigmoid()), "is new"),
    "one less": (lambda m: m.__delitem__(4), "is gone"),
    "a norm": (lambda m: nn.utils.parametrizations.weight_norm(m[3]), "3.", "is"),
}


@rotated("name rule", CHANGES, EVERY_RULE, turns=2)
def test_a_part_that_was_replaced_after_the_rule_was_made_is_noticed(name, rule):
    change, *hints = CHANGES[name]
    model = net(nn.Linear(12, 12), nn.Tanh())
    learner = EVERY_RULE[rule](model, SGD)
    learner.step(X, Y)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with refuses(ValueError, "the model has changed", "make the rule again", *hints):
        learner.step(X, Y)
    assert_identical(model.state_dict(), before)


# ----------------------------------------------------------------------------------------------- pass 2 is pass 1


def carried(m: Any, a: Tensor) -> Tensor:
    m.memory = torch.tanh(a + (0 if m.memory is None else m.memory.detach()))
    return m.memory


def counted(m: Any, a: Tensor) -> Tensor:
    m.times += 1
    return a * m.times


def listed(m: Any, a: Tensor) -> Tensor:
    m.norms.append(a.norm().item())
    m.seen[len(m.seen)] = True
    m.last.append(len(m.seen))
    return a * len(m.norms) + m.last[-1]


def written(m: Any, a: Tensor) -> Tensor:
    m.mean.lerp_(a.detach().mean(0), 0.1)
    return a - m.mean


def grown(m: Any, a: Tensor) -> Tensor:
    m.history.resize_(len(m.history) + 1)[-1] = a.detach().mean()
    return a + m.history.sum()


class Grows(Unit):
    def __init__(self) -> None:
        super().__init__(grown)
        self.register_buffer("history", torch.zeros(0))


STATES = {
    "numpy": lambda: Unit(lambda m, a: a * torch.from_numpy(np.random.rand(12).astype("float32"))),  # noqa: NPY002
    "Python": lambda: Unit(lambda m, a: a * random.random()),
    "torch's generator": lambda: Unit(
        lambda m, a: a * torch.rand(a.shape, generator=m.g), g=torch.Generator().manual_seed(1)
    ),
    "numpy's generator": lambda: Unit(lambda m, a: a * m.g.random(), g=np.random.default_rng(1)),
    "numpy's old one": lambda: Unit(lambda m, a: a * m.g.rand(), g=np.random.RandomState(1)),
    "Python's generator": lambda: Unit(lambda m, a: a * m.g.random(), g=random.Random(1)),
    "carried": lambda: Unit(carried, memory=None),
    "counted": lambda: Unit(counted, times=0),
    "listed": lambda: Unit(listed, norms=[], seen={}, last=deque(maxlen=3)),
    "written": lambda: Unit(written, mean=torch.zeros(12)),
    "grown": Grows,
}


@pytest.mark.parametrize("name", STATES)
def test_state_and_randomness_of_any_kind_are_those_of_one_pass(name):
    ends = []
    for rule in DIRECT:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
        unit = STATES[name]()
        learner = ml.RULES[rule](net(unit, nn.Linear(12, 12), STATES[name]()), SGD)
        losses = [learner.step(x, Y) for x in (X, -X, 2 * X)]
        held = {key: value for key, value in vars(unit).items() if key in ("memory", "times", "norms", "seen", "mean")}
        held |= {"last": list(getattr(unit, "last", [])), "python": random.random(), "numpy": np.random.rand()}  # noqa: NPY002
        held |= {"memory": held.get("memory", torch.zeros(())).detach()} if "memory" in held else {}
        ends.append((record(losses, learner.blocks, learner.optimizers), held))
    assert_same_training(ends[0][0], ends[1][0])
    assert_identical(ends[0][1], ends[1][1])


OUTSIDE = iter(range(1, 1000))


def test_what_cannot_be_restored_is_noticed_once_and_check_says_where():
    torch.manual_seed(0)
    model = net(Unit(lambda m, a: a.tanh()), Unit(lambda m, a: a * next(OUTSIDE)), nn.ReLU())
    learner = ml.MemDFA(model, SGD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.step(X, Y)
        learner.step(X, Y)
    assert len(caught) == 1
    assert "the second forward pass gave other logits than the first" in str(caught[0].message)
    before = copy.deepcopy(learner.state_dict())
    table = ml.check(learner, X, Y)
    assert_identical(learner.state_dict(), before)
    assert list(table["by"]) == ["autograd", "autograd", "autograd", "hand"]  # by hand there is no dropout
    assert list(table["difference"] > 0) == [False, False, True, True]
    assert table["module"][2] == "Sequential"


@pytest.mark.parametrize("name", ["everything", "residual", "dropout", "batchnorm_momentum_none"])
def test_the_passes_of_a_network_that_does_the_same_twice_do_not_differ(name, recwarn):
    learner, problem = make_rule("memdfa", BY_NAME[name]), BY_NAME[name]
    train(learner, problem)
    assert set(ml.check(learner, problem.x, problem.y)["difference"]) == {0.0}
    assert not [warning for warning in recwarn if "logits" in str(warning.message)]
    with refuses(TypeError, "a rule, such as ml.MemDFA"):
        ml.check(problem.build(), problem.x, problem.y)


# -------------------------------------------------------------------------------------- precisions, casts, shortcuts


class Cast(nn.Module):
    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer.to(dtype), dtype

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h.to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("middle", [nn.Linear, lambda *sizes: nn.Sequential(nn.Linear(*sizes), nn.LayerNorm(12))])
def test_blocks_of_other_precisions_are_taught_in_their_own(middle, dtype):
    torch.manual_seed(0)
    base = [nn.Linear(8, 12), nn.ReLU(), middle(12, 12), nn.ReLU(), nn.Linear(12, 5)]
    float32 = copy.deepcopy(nn.Sequential(*base))
    ml.DFA(float32, partial(torch.optim.SGD, lr=0.1), feedback=ml.feedback.Regenerated(seed=1)).step(X, Y)
    mixed = nn.Sequential(*base[:2], Cast(base[2], dtype), nn.ReLU(), Cast(base[4], X.dtype))
    models = {"mixed, dfa": mixed, "mixed, memdfa": copy.deepcopy(mixed)}
    for name, model in models.items():
        rule = ml.MemDFA if "mem" in name else ml.DFA
        rule(model, partial(torch.optim.SGD, lr=0.1), feedback=ml.feedback.Regenerated(seed=1)).step(X, Y)
    assert_identical(models["mixed, dfa"].state_dict(), models["mixed, memdfa"].state_dict())
    for one, other in zip(mixed.parameters(), float32.parameters(), strict=True):
        assert (one - other).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_one_autocast_context_around_all_steps_trains_as_one_a_step(rule):
    ends = []
    for around in (True, False):
        torch.manual_seed(0)
        learner = ml.RULES[rule](net(nn.Linear(12, 12), nn.Tanh()), SGD)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            for _ in range(3):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    learner.step(X, Y)
            seen = ml.predict(learner, X)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ends.append((learner.state_dict()["blocks"], seen if around else ml.predict(learner, X)))
    assert_identical(*ends)


def nothing(optimizer: Any, *given: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("way", ["global hook", "own hook", "replaced", "replaced in the class"])
def test_whoever_listens_to_the_optimizer_is_heard(way, rule, monkeypatch):
    kind = type("MySGD", (torch.optim.SGD,), {}) if way == "replaced in the class" else torch.optim.SGD
    learner = ml.RULES[rule](nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)), partial(kind, lr=0.1))
    handles = []
    if way == "global hook":
        handles.append(register_optimizer_step_pre_hook(nothing))
    for optimizer in learner.optimizers:
        if way == "own hook":
            optimizer.register_step_pre_hook(nothing)
        if way == "replaced":
            optimizer.step = lambda: None
    if way == "replaced in the class":
        monkeypatch.setattr(kind, "step", lambda self: None)
    before = copy.deepcopy(learner.state_dict()["blocks"])
    learner.step(X, Y)
    for handle in handles:
        handle.remove()
    assert_identical(learner.state_dict()["blocks"], before)


class Saves(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(super().forward, h, use_reentrant=False)


def test_a_block_that_checkpoints_itself_learns_as_without():
    for rule in ("bp", "dfa", "memdfa"):
        ends = []
        for kind in (nn.Linear, Saves):
            torch.manual_seed(0)
            learner = ml.RULES[rule](net(kind(12, 12), nn.Tanh()), SGD)
            learner.step(X, Y)
            ends.append(list(learner.blocks.state_dict().values()))
        assert_identical(*ends)
