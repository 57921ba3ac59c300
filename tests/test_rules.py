"""The four rules against their oracles: each other, plain autograd with one optimizer, and numpy twins."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import BY_NAME, OPTIMIZERS, RULE_NAMES, STORAGES, Problem, make_rule, params, record, train
from reference import (
    TOLERANCE,
    assert_close,
    assert_close_training,
    assert_identical,
    assert_matches_twin,
    assert_same_training,
    refuses,
    surrogate_gradients,
    train_plainly,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import BP, DFA, FA, MemDFA


def full_state(rule: Rule) -> list:
    return copy.deepcopy([rule.state_dict()["blocks"], [o and o.state_dict() for o in rule.optimizers]])


def train_with(rule: str, problem: Problem, optimizer, storage="stored", schedule=None, **options):
    made = make_rule(rule, problem, optimizer, storage, **options)
    schedulers = [schedule(o) for o in made.optimizers if o is not None] if schedule else []
    return train(made, problem, each_step=lambda: [scheduler.step() for scheduler in schedulers])


# ------------------------------------------------------------------------------------------ MEM-DFA equals DFA


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", params())
def test_memdfa_trains_as_dfa_bit_for_bit(problem, optimizer, storage):
    dfa, memdfa = (train_with(rule, problem, optimizer, storage) for rule in ("dfa", "memdfa"))
    assert_same_training(dfa, memdfa)


VARIANTS = {
    "step_lr": {"optimizer": "momentum", "schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=2)},
    "weight_decay": {"optimizer": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)},
    "clip_norm": {"optimizer": "adamw", "clip_norm": 0.01},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("problem", params())
def test_memdfa_trains_as_dfa_with_schedule_decay_and_clipping(problem, variant):
    options = VARIANTS[variant]
    dfa, memdfa = (train_with(rule, problem, **options) for rule in ("dfa", "memdfa"))
    assert_same_training(dfa, memdfa)


@pytest.mark.parametrize("variant", VARIANTS)
def test_schedule_decay_and_clipping_each_change_the_training(variant):
    options = VARIANTS[variant]
    plain = "sgd" if variant == "weight_decay" else options["optimizer"]
    problem = BY_NAME["mlp_tanh_mse"]
    with pytest.raises(AssertionError):
        assert_same_training(train_with("memdfa", problem, **options), train_with("memdfa", problem, plain))


@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
@pytest.mark.parametrize("problem", params())
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


def test_memdfa_trains_as_dfa_through_a_reparametrised_weight_with_state_of_its_own():
    """Spectral norm moves its own buffers in each training forward pass: once a step, not twice."""

    def make() -> nn.Module:
        layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(2)]
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Linear(8, 5))

    problem = Problem("spectral_norm", make, (8,))
    assert_same_training(*(train(make_rule(rule, problem), problem) for rule in ("dfa", "memdfa")))


# ------------------------------------------------------------------------------------------- BP equals autograd


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", params())
def test_bp_trains_as_plain_autograd_with_one_optimizer(problem, optimizer):
    plain = train_plainly(problem, OPTIMIZERS[optimizer], steps=4)
    assert_same_training(train(make_rule("bp", problem, optimizer), problem), plain)


# -------------------------------------------------------------------------------------------------- numpy twins


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("problem", params(lambda problem: problem.twin))
def test_each_rule_matches_its_numpy_twin(problem, rule):
    problem = problem.double()
    assert_matches_twin(make_rule(rule, problem), rule.replace("mem", ""), problem)


def test_the_rules_learn_differently():
    """Else the comparisons above would show nothing."""
    problem = BY_NAME["mlp_relu"]
    weights = {rule: train(make_rule(rule, problem), problem).tensors[0] for rule in ("bp", "fa", "dfa")}
    for a, b in (("bp", "fa"), ("bp", "dfa"), ("fa", "dfa")):
        assert (weights[a] - weights[b]).abs().max() > 1e-3


# ------------------------------------------------------------------------------- FA and DFA with the weights as B


def feed_back_weights(rule: Rule) -> None:
    """Make FA's B the weights themselves: every B of the parameters that have one."""
    rule.feedback.matrices = {
        ("weight", j): p.detach().clone() for j, p in enumerate(rule.blocks.parameters()) if p.dim() > 1
    }


@pytest.mark.parametrize("problem", params())
def test_fa_with_the_weights_as_feedback_is_bp(problem):
    problem = problem.double()
    fa = make_rule("fa", problem, "momentum")
    feed_back_weights(fa)
    taught = train(fa, problem, each_step=lambda: feed_back_weights(fa))
    assert_close_training(taught, train(make_rule("bp", problem, "momentum"), problem))


class FlattenLinear(nn.Module):
    """A block that begins with a feature map, so that B_i e arrives at a feature map."""

    def __init__(self, inputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.flatten(1))


class ToChannelsLast(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.contiguous(memory_format=torch.channels_last)


TWO_BLOCKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)), (8,)),
    "feature_map": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), FlattenLinear(48)), (2, 6, 6)),
    "channels_last": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), ToChannelsLast(), FlattenLinear(48)),
        (2, 6, 6),
    ),
    "pooled": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5)),
        (2, 6, 6),
    ),
}


@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
@pytest.mark.parametrize("net", TWO_BLOCKS)
def test_dfa_with_the_next_weights_as_feedback_is_bp_on_two_blocks(net, rule):
    make, shape = TWO_BLOCKS[net]
    problem = Problem(net, make, shape, dtype=torch.float64)
    dfa = make_rule(rule, problem, "momentum")

    def feed_back_last_weight() -> None:
        W = list(dfa.blocks.parameters())[-2]  # (C, n_0)
        like = torch.zeros(1, dtype=torch.float64)
        dfa.feedback.dense(0, *W.shape, like=like).copy_(W.detach())  # Stored keeps it: what is drawn is a view

    feed_back_last_weight()
    taught = train(dfa, problem, each_step=feed_back_last_weight)
    assert_close_training(taught, train(make_rule("bp", problem, "momentum"), problem))


class Attention(nn.Module):
    """A unit whose weights torch uses inside one function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.attention(h, h, h, need_weights=False)[0]


class TwoArms(nn.Module):
    """A unit with a bilinear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return self.bilinear(h, h)


def first_gradient(rule: type[Rule], unit: type[nn.Module]) -> Tensor:
    problem = Problem("unit", lambda: nn.Sequential(nn.Linear(4, 4), unit(), FlattenLinear(12)), (3, 4))
    made = make_rule(rule, problem)
    # The last layer's own B is its weight, so that the error reaches the unit as in BP.
    last = len(list(made.blocks.parameters())) - 2
    made.feedback.matrices[("weight", last)] = list(made.blocks.parameters())[last].detach().clone()
    before = made.blocks[0].weight.detach().clone()
    made.step(problem.x, problem.y)
    return before - made.blocks[0].weight.detach()


@pytest.mark.parametrize("unit", [Attention, TwoArms])
def test_fa_never_sends_the_error_through_a_weight_in_silence(unit):
    try:
        taught = first_gradient(FA, unit)
    except (TypeError, ValueError, NotImplementedError):
        return  # refused: as good as done
    assert (taught - first_gradient(BP, unit)).abs().max() > 1e-4


def test_fa_refuses_a_weight_that_is_computed_in_the_forward_pass():
    problem = Problem(
        "weight_norm",
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 5)),
        (8,),
    )
    rule = make_rule("fa", problem)
    before = full_state(rule)
    with refuses(ValueError, "DFA"):
        rule.step(problem.x, problem.y)
    assert_identical(full_state(rule), before)


def test_fa_leaves_torch_as_it_was():
    problem = BY_NAME["mlp_tanh_mse"]
    model = problem.build()
    rule = FA(model, OPTIMIZERS["sgd"], problem.loss)
    rule.step(problem.x, problem.y)
    (got,) = torch.autograd.grad(problem.loss(model(problem.x), problem.y), model[0].weight)
    plain = copy.deepcopy(model)
    (expected,) = torch.autograd.grad(problem.loss(plain(problem.x), problem.y), plain[0].weight)
    assert torch.equal(got, expected)


# -------------------------------------------------------------------------------------- what a step leaves alone


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("problem", params(lambda problem: not problem.random))
def test_a_step_without_dropout_leaves_the_global_generators_alone(problem, storage, rule):
    made = make_rule(rule, problem, storage=storage)
    numpy_state = np.random.get_state
    before = torch.get_rng_state(), numpy_state()[1].copy(), random.getstate()
    made.step(problem.x, problem.y)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(numpy_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("problem", params())
def test_a_step_leaves_the_batch_alone_and_no_gradients_behind(problem, rule):
    x, y = problem.x, problem.y
    made = make_rule(rule, problem)
    loss = made.step(x, y)
    assert torch.equal(x, problem.x)
    assert torch.equal(y, problem.y)
    assert x.grad_fn is None
    assert not x.requires_grad
    assert loss.dim() == 0
    assert not loss.requires_grad
    assert all(p.grad is None for p in made.blocks.parameters())


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_frozen_parameters_do_not_move_and_all_others_do(rule):
    for name in ("partly_frozen", "frozen_ends"):
        problem = BY_NAME[name]
        made = make_rule(rule, problem, partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))
        before = copy.deepcopy(made.blocks)
        train(made, problem)
        for old, new in zip(before.parameters(), made.blocks.parameters(), strict=True):
            assert torch.equal(old, new) != new.requires_grad


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_gradient_left_by_someone_else_is_not_added(rule):
    problem = BY_NAME["mlp_tanh_mse"]
    made, other = make_rule(rule, problem), make_rule(rule, problem)
    for p in made.blocks.parameters():
        p.grad = torch.ones_like(p)
    assert_same_training(train(made, problem), train(other, problem))


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_batch_that_asks_for_a_gradient_gets_none_and_changes_nothing(rule):
    problem = BY_NAME["mlp_tanh_mse"]
    made, other = make_rule(rule, problem), make_rule(rule, problem)
    x = problem.x.requires_grad_()
    assert torch.equal(made.step(x, problem.y), other.step(problem.x, problem.y))
    assert x.grad is None
    assert_identical(full_state(made), full_state(other))


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_in_eval_mode_the_running_statistics_are_used_and_kept(rule):
    problem = BY_NAME["batchnorm"]
    made = make_rule(rule, problem)
    made.blocks.eval()
    before = {name: buffer.clone() for name, buffer in made.blocks.named_buffers()}
    expected = problem.loss(made.blocks(problem.x), problem.y).detach()
    assert torch.equal(made.step(problem.x, problem.y), expected)
    assert_identical(dict(made.blocks.named_buffers()), before)


# --------------------------------------------------------------------------------------------------- NaN and inf

BAD_VALUES = [float("nan"), float("inf"), float("-inf")]


def assert_bad_batch_changes_nothing(rule: Rule, problem: Problem, x: Tensor) -> None:
    """Train a step, then on x, which must be refused before weights or optimizer state change."""
    rule.step(problem.x, problem.y)
    before = full_state(rule)
    weights = [p.detach().clone() for p in rule.blocks.parameters()]
    with refuses(FloatingPointError, "no weight was changed"):
        rule.step(x, problem.y)
    assert_identical([p.detach() for p in rule.blocks.parameters()], weights, "weights")
    assert_identical(full_state(rule)[1], before[1], "optimizer state")
    assert all(p.grad is None for p in rule.blocks.parameters())


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("name", ["mlp_relu", "conv_pool", "batchnorm", "everything"])
def test_nan_and_inf_in_the_data_are_refused_before_any_weight_changes(name, rule, bad):
    problem = BY_NAME[name]
    x = problem.x
    x.view(-1)[3] = bad
    assert_bad_batch_changes_nothing(make_rule(rule, problem, "adamw"), problem, x)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_inf_in_the_data_is_refused_where_a_squashing_activation_hides_it_from_the_loss(rule):
    problem = BY_NAME["mlp_tanh_mse"]
    x = problem.x
    x[0, 0] = float("inf")
    assert_bad_batch_changes_nothing(make_rule(rule, problem, "adamw"), problem, x)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_loss_with_a_gradient_that_is_not_finite_is_refused(rule):
    """The square root's slope at 0 is infinite, though the loss is finite."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return (logits - logits.detach()).abs().sqrt().mean()

    problem = Problem("sqrt", BY_NAME["mlp_relu"].make, (8,), loss)
    made = make_rule(rule, problem)
    before = full_state(made)
    with refuses(FloatingPointError, "no weight was changed"):
        made.step(problem.x, problem.y)
    assert_identical(full_state(made), before)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_refused_batch_leaves_the_running_statistics_as_they_were(rule):
    """Else BatchNorm's mean is NaN for ever, and the net is lost though no weight has changed."""
    problem = BY_NAME["batchnorm"]
    made = make_rule(rule, problem)
    made.step(problem.x, problem.y)
    before = copy.deepcopy(made.blocks.state_dict())
    with pytest.raises(FloatingPointError):
        made.step(problem.x * float("nan"), problem.y)
    assert_identical(made.blocks.state_dict(), before)


# ------------------------------------------------------------------------------------------------------ clipping


def clipped_by_hand(gradients: list[list[Tensor]], limit: float) -> list[list[Tensor]]:
    clipped = []
    for block in gradients:
        norm = sum(float((g**2).sum()) for g in block) ** 0.5
        clipped.append([g * min(1.0, limit / (norm + 1e-6)) for g in block])  # 1e-6: as torch has it
    return clipped


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
    made = make_rule(rule, problem, clip_norm=limit)
    before = [[p.detach().clone() for p in block] for block in made.parameters]
    made.step(problem.x, problem.y)
    for i, block in enumerate(clipped_by_hand(gradients, limit)):
        moved = [old - new.detach() for old, new in zip(before[i], made.parameters[i], strict=True)]
        assert_close(moved, [0.1 * g for g in block], f"block {i}")


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_each_blocks_optimizer_holds_that_blocks_parameters_and_no_others(rule):
    made = make_rule(rule, BY_NAME["partly_frozen"])
    held = [o and [p for group in o.param_groups for p in group["params"]] for o in made.optimizers]
    assert held[1] is None
    assert [len(block) for block in (held[0], held[2])] == [1, 2]
    assert held[0][0] is made.blocks[0][0].weight


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("rule", RULE_NAMES)
class TestRefusals:
    def make(self, rule: str, **changes) -> Rule:
        return make_rule(rule, BY_NAME["mlp_relu"], **changes)

    def test_an_optimizer_that_is_already_made(self, rule):
        made = torch.optim.SGD(BY_NAME["mlp_relu"].build().parameters(), lr=0.1)
        with refuses(TypeError, "partial(torch.optim.SGD"):
            self.make(rule, optimizer=made)

    @pytest.mark.parametrize("optimizer", [0.1, None])
    def test_an_optimizer_that_cannot_be_called(self, rule, optimizer):
        with refuses(TypeError, "partial(torch.optim.SGD"):
            self.make(rule, optimizer=optimizer)

    @pytest.mark.parametrize("result", [None, "sgd"])
    def test_an_optimizer_factory_that_does_not_make_one(self, rule, result):
        with refuses(TypeError, "optimizer"):
            self.make(rule, optimizer=lambda parameters: result)

    def test_an_optimizer_that_needs_the_whole_network_at_once(self, rule):
        with refuses(ValueError, "LBFGS", "Adam"):
            self.make(rule, optimizer=torch.optim.LBFGS)

    @pytest.mark.parametrize("storage", [0, Stored, torch.ones(3, 3)])
    def test_feedback_that_is_not_feedback(self, rule, storage):
        with refuses(TypeError, "ml.feedback.Stored(seed=0)"):
            self.make(rule, storage=storage)

    @pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
    def test_a_clip_norm_that_is_not_above_zero(self, rule, limit):
        with refuses(ValueError, "clip_norm", "above 0"):
            self.make(rule, clip_norm=limit)

    def test_a_model_that_is_not_a_chain(self, rule):
        with refuses(TypeError, "nn.Sequential"):
            make_rule(rule, Problem("rnn", lambda: nn.RNN(8, 8), (8,)))

    def test_a_loss_that_is_not_a_scalar(self, rule):
        problem = Problem("none", BY_NAME["mlp_relu"].make, (8,), partial(F.cross_entropy, reduction="none"))
        made = make_rule(rule, problem)
        before = full_state(made)
        with refuses(ValueError, "scalar", "mean over the batch"):
            made.step(problem.x, problem.y)
        assert_identical(full_state(made), before)


class InplaceStart(nn.Module):
    """A unit that overwrites what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.relu_())


class Pair(InplaceStart):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(h), h


REFUSED_UNITS = {
    "in_place_at_the_start_of_the_net": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 5)),
        RuntimeError,
        "inplace=False",
    ),
    "in_place_on_another_blocks_output": (
        lambda: nn.Sequential(nn.Linear(8, 12), InplaceStart()),
        RuntimeError,
        "inplace=False",
    ),
    "two_outputs": (lambda: nn.Sequential(nn.Linear(8, 12), Pair()), TypeError, "tuple"),
}


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("unit", REFUSED_UNITS)
def test_a_block_that_would_corrupt_another_is_refused_before_any_weight_changes(unit, rule):
    make, error, hint = REFUSED_UNITS[unit]
    problem = Problem(unit, make, (8,))
    made = make_rule(rule, problem)
    before = full_state(made)
    with refuses(error, hint):
        made.step(problem.x, problem.y)
    assert_identical(full_state(made), before)


# ----------------------------------------------------------------------------------------- saving and loading

RESUMED = """
import sys, torch
sys.path.insert(0, {tests!r})
from problems import BY_NAME, STORAGES, make_rule, train
names = torch.load(sys.argv[1] + "/names.pt", weights_only=True)
for name in names:
    problem, rule, storage, optimizer = name.split()
    problem = BY_NAME[problem]
    torch.manual_seed(99)
    torch.randn(7)
    rule = make_rule(rule, problem, optimizer, STORAGES[storage](seed=17, distribution="uniform", scale=2.0))
    rule.load_state_dict(torch.load(f"{{sys.argv[1]}}/{{name}}.pt", weights_only=True))
    after = train(rule, problem, steps=3)
    torch.save(vars(after), f"{{sys.argv[1]}}/{{name}}.after.pt")
"""
RESUMES = [f"everything {rule} {storage} adamw" for rule in RULE_NAMES for storage in STORAGES]
RESUMES += [f"partly_frozen {rule} stored momentum" for rule in RULE_NAMES]


def test_a_saved_rule_goes_on_bit_for_bit_in_another_process(tmp_path: Path):
    rules = {}
    for name in RESUMES:
        problem, rule, storage, optimizer = name.split()
        feedback = STORAGES[storage](seed=np.int64(5), distribution="he_normal", scale=0.5)
        rules[name] = make_rule(rule, BY_NAME[problem], optimizer, feedback)
        train(rules[name], BY_NAME[problem], steps=2)
        torch.save(rules[name].state_dict(), tmp_path / f"{name}.pt")
    torch.save(RESUMES, tmp_path / "names.pt")
    script = RESUMED.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)
    for name, rule in rules.items():
        here = train(rule, BY_NAME[name.split()[0]], steps=3)
        there = torch.load(tmp_path / f"{name}.after.pt", weights_only=True)
        assert_identical(there, vars(here), name)


def test_a_loaded_state_is_a_copy_that_further_training_of_the_first_does_not_touch():
    problem = BY_NAME["batchnorm"]
    first, second = (make_rule("memdfa", problem, "adamw") for _ in range(2))
    train(first, problem)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(second.state_dict())
    train(first, problem)
    assert_identical(second.state_dict(), before)


def small(net: nn.Module) -> Problem:
    return Problem("small", lambda: copy.deepcopy(net), (8,))


MLP = BY_NAME["mlp_relu"]
FROZEN = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
FROZEN[2].requires_grad_(False)
PARTLY = copy.deepcopy(FROZEN).requires_grad_(True)
PARTLY[2].bias.requires_grad_(False)
WIDER = nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 10), nn.ReLU(), nn.Linear(10, 5))
SHORTER = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))

WRONG_STATES = {
    "another_rule": lambda: make_rule("dfa", MLP),
    "another_storage": lambda: make_rule("memdfa", MLP, storage="regenerated"),
    "another_width": lambda: make_rule("memdfa", small(WIDER)),
    "another_depth": lambda: make_rule("memdfa", small(SHORTER)),
    "another_frozen_block": lambda: make_rule("memdfa", small(FROZEN)),
    "another_frozen_parameter": lambda: make_rule("memdfa", small(PARTLY)),
    "another_optimizer": lambda: make_rule("memdfa", MLP, "momentum"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_of_something_else_is_refused_and_changes_nothing(wrong):
    theirs = WRONG_STATES[wrong]()
    theirs.feedback.seed = 11
    theirs.step(MLP.x * 2, MLP.y)
    ours = make_rule("memdfa", MLP, "adamw")
    ours.step(MLP.x, MLP.y)
    before = copy.deepcopy(ours.state_dict())
    with refuses(ValueError):
        ours.load_state_dict(theirs.state_dict())
    assert_identical(ours.state_dict(), before)


def test_a_state_that_is_not_a_rules_is_refused_and_changes_nothing():
    ours = make_rule("memdfa", MLP)
    before = copy.deepcopy(ours.state_dict())
    with refuses(ValueError, "state_dict"):
        ours.load_state_dict(MLP.build().state_dict())
    assert_identical(ours.state_dict(), before)


def test_rules_are_found_by_name():
    from memdfa_lab.core.rules import RULES

    assert {"bp": BP, "fa": FA, "dfa": DFA, "memdfa": MemDFA} == RULES


def test_tolerance_is_tight_enough_to_tell_float32_from_float64():
    problem = BY_NAME["mlp_tanh_mse"]
    with pytest.raises(AssertionError):
        assert_matches_twin(make_rule("bp", problem), "bp", problem)
    assert TOLERANCE <= 1e-12


# ---------------------------------------------------------------------------------- blocks that put out no graph


class Checkpointed(nn.Module):
    """A residual unit with a checkpoint of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(lambda h: h + self.b(torch.tanh(self.a(h))), h, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("rule", "error", "hint"), [(FA, ValueError, "take that away"), (DFA, RuntimeError, "Checkpointed puts out")]
)
def test_a_unit_with_a_reentrant_checkpoint_is_refused_where_it_would_learn_as_in_bp_or_not_at_all(rule, error, hint):
    net = nn.Sequential(nn.Linear(8, 8), Checkpointed(True), nn.Linear(8, 5))
    with refuses(error, "use_reentrant", hint):
        rule(net, partial(torch.optim.SGD, lr=0.1)).step(torch.randn(6, 8), torch.zeros(6, dtype=torch.long))


def test_a_unit_with_any_other_checkpoint_learns_as_without_it():
    def trained(unit: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), unit, nn.Linear(8, 5))
        for layer in (net[0], unit.a, unit.b, net[2]):
            layer.reset_parameters()
        MemDFA(net, partial(torch.optim.SGD, lr=0.1)).step(torch.randn(6, 8), torch.zeros(6, dtype=torch.long))
        return list(net.parameters())

    plain = Checkpointed(False)
    plain.forward = lambda h: h + plain.b(torch.tanh(plain.a(h)))
    assert_identical(trained(plain), trained(Checkpointed(False)))


class DroppedUnit(nn.Module):
    """A residual unit that hands its input on: layer dropout (Huang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_unit_that_is_dropped_does_not_learn_and_the_others_do(rule):
    problem = Problem("dropped", lambda: nn.Sequential(nn.Linear(8, 8), DroppedUnit(), nn.Linear(8, 5)), (8,))
    before = problem.build().state_dict()
    made = make_rule(rule, problem, "momentum")
    made.step(problem.x, problem.y)
    learnt = {name for name, value in made.blocks.state_dict().items() if not torch.equal(value, before[name])}
    assert learnt == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_state_with_other_parameter_groups_is_refused_and_changes_nothing():
    def rule(seed: int, apart: bool) -> Rule:
        torch.manual_seed(seed)
        groups = (lambda ps: [{"params": [p]} for p in ps]) if apart else list
        return BP(nn.Sequential(nn.Linear(4, 3)), lambda ps: torch.optim.SGD(groups(ps), lr=0.1))

    ours = rule(0, False)
    before = full_state(ours)
    with refuses(ValueError, "SGD of 1 + 1 tensors", "SGD of 2 tensors"):
        ours.load_state_dict(rule(1, True).state_dict())
    assert_identical(full_state(ours), before)


def test_what_a_module_adds_to_its_state_comes_along():
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    one, other = (BP(nn.Sequential(Counting(4, 3)), torch.optim.SGD) for _ in range(2))
    one.blocks[0].count = 7
    other.load_state_dict(one.state_dict())
    assert other.blocks[0].count == 7


@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
def test_a_loss_whose_gradient_is_one_number_all_over(rule):
    """Autograd gives it as one number, expanded; an activation at the end is gone back through in place."""
    make = lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.Sigmoid())  # noqa: E731
    problem = Problem("sum", make, (8,), lambda out, y: out.sum() / len(y), torch.float64)
    model = problem.build()
    last = list(model[2].parameters())
    gradients = torch.autograd.grad(problem.loss(model(problem.x), problem.y), last)
    expected = [p - 0.1 * g for p, g in zip(last, gradients, strict=True)]
    made = make_rule(rule, problem, partial(torch.optim.SGD, lr=0.1))
    made.step(problem.x, problem.y)
    assert_close([p.detach() for p in made.blocks[-1].parameters()], [p.detach() for p in expected])
