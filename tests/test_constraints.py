"""Standardised weights: what a step leaves, for every rule, also where the network rests on a disk or is predicted."""

import copy
import pickle

import numpy as np
import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, make_rule, params, rotated, train
from reference import assert_identical, assert_same_training, refuses
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core.local_losses import LOCAL_RULES
from memdfa_lab.core.rules import RULES
from memdfa_lab.rivals import BASELINES

EVERY = {**RULES, **LOCAL_RULES, **BASELINES}
EVERY.pop("last_layer")  # refuses a frozen last block
NOT_COPIED = "activation_offload", "reversible"  # the first has a file open, the second needs a network of its own


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3, 3), (3, 1), (2, 1, 4), (6,)], ids=str)
def test_a_step_is_the_optimizers_and_then_filters_lose_their_mean_and_get_the_length(optimizer, shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    plain, ours = OPTIMIZERS[optimizer]([one]), ml.standardised(OPTIMIZERS[optimizer], length=1.5)([other])
    one.grad, other.grad = (torch.arange(one.numel(), dtype=torch.float32).view(shape) for _ in range(2))
    plain.step()
    ours.step()
    expected = one.detach().numpy()
    if len(shape) > 1 and expected[0].size > 1:
        filters = expected.reshape(len(expected), -1)
        filters = filters - filters.mean(1, keepdims=True)
        expected = (1.5 * filters / np.linalg.norm(filters, axis=1, keepdims=True)).reshape(shape)
    np.testing.assert_allclose(other.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
@rotated("rule optimizer", [name for name in EVERY if name not in NOT_COPIED], OPTIMIZERS)
def test_a_copy_of_a_rule_goes_on_with_the_projection(rule, optimizer, again):
    problem = BY_NAME["mlp_relu"]
    one = make_rule(EVERY[rule], problem, ml.standardised(OPTIMIZERS[optimizer]))
    one.step(problem.x, problem.y)
    other = again(one)
    torch.manual_seed(0)  # of MeZO's z
    one.step(problem.x, problem.y)
    torch.manual_seed(0)
    other.step(problem.x, problem.y)
    assert_identical(one.blocks.state_dict(), other.blocks.state_dict())
    assert other.blocks[0][0].weight.mean(1).abs().max() < 1e-6


@rotated("problem optimizer", params(), OPTIMIZERS)
def test_memdfa_is_dfa_bit_for_bit_in_memory_and_from_a_disk(problem, optimizer, tmp_path):
    optimizer = ml.standardised(OPTIMIZERS[optimizer])
    dfa, memdfa = (train(make_rule(name, problem, optimizer), problem) for name in ("dfa", "memdfa"))
    assert_same_training(dfa, memdfa)
    if problem.name in ("mlp_relu", "conv_pool"):
        with ml.offload.Disk(tmp_path) as disk:
            rule = make_rule("memdfa", problem, optimizer, offload=disk)
            for x, y in problem.batches(4):
                rule.step(x, y)
            assert_identical(dict(disk.state_dict()), dict(zip(disk.state_dict(), memdfa.tensors, strict=True)))


@pytest.mark.filterwarnings("ignore:no test has shown")  # of readouts on volumes, until now
@rotated("problem rule optimizer", params(lambda problem: not problem.random), EVERY, OPTIMIZERS, turns=2, quick=1)
def test_what_it_holds_is_predicted_to_the_byte(problem, rule, optimizer):
    optimizer, feedback = ml.standardised(OPTIMIZERS[optimizer]), ml.feedback.Stored(3)
    made = make_rule(EVERY[rule], problem, optimizer, feedback)
    measured = ml.memory.measure(made, problem.x, problem.y, warm_up=1)
    how = {"loss_fn": problem.loss, "feedback": feedback}
    predicted = ml.memory.predict(rule, problem.build, tuple(problem.x.shape), optimizer, **how)
    assert (measured.peak_bytes, measured.resting_bytes) == (predicted.peak_bytes, predicted.resting_bytes)


@pytest.mark.parametrize("rule", ["bp", "memdfa", "local_readout"])
@pytest.mark.parametrize(
    "constrained",
    [ml.standardised, lambda made: ml.projected(made, lambda weight: weight + 1)],
    ids=["standardised", "projected"],
)
def test_a_weight_that_is_frozen_later_stays_as_it_is_and_its_bias_learns(rule, constrained):
    problem = BY_NAME["mlp_relu"]
    learner = make_rule(EVERY[rule], problem, constrained(OPTIMIZERS["momentum"]))
    learner.step(problem.x, problem.y)
    layer = learner.blocks[0][0]
    layer.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    learner.step(problem.x, problem.y)
    assert torch.equal(layer.weight, before["weight"])
    assert not torch.equal(layer.bias, before["bias"])


def test_runs_by_name_have_it_as_a_setting_and_each_filter_ends_as_it_says():
    data = ml.datasets.load("mnist5k").subset(40, 10)
    rule = ml.experiments.make_rule("memdfa", "[9 relu]x2 classes", data, standardise=True)
    ml.fit(rule, data, 1, 10)
    *hidden, last = (p.detach() for p in rule.blocks.parameters() if p.dim() == 2)
    assert last.mean(1).abs().min() > 1e-4
    for weight in hidden:
        torch.testing.assert_close(weight.mean(1), torch.zeros(len(weight)), rtol=0, atol=1e-6)
        torch.testing.assert_close(weight.norm(dim=1), torch.full((len(weight),), 2**0.5))


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [("memdfa", {"standardise": True}, {}), ("local_readout", {}, {"readout_positions": 2}), ("mezo", {}, {})],
)
def test_a_run_does_not_go_on_with_another_setting_of_its_own(rule, before, after, tmp_path):
    data = ml.datasets.load("mnist5k").subset(40, 10)
    one, other = (ml.experiments.make_rule(rule, "mnist_conv", data, **settings) for settings in (before, after))
    if rule == "mezo":
        other.eps = 0.5
    ml.fit(one, data, 1, 10, checkpoint=tmp_path / "c.pt")
    with refuses(ValueError, "overwrite=True"):
        ml.fit(other, data, 2, 10, checkpoint=tmp_path / "c.pt")


@pytest.mark.parametrize("rule", ["local_readout", "mezo"])
def test_a_runs_seed_is_that_of_all_that_a_rule_draws(rule):
    data = ml.datasets.load("mnist5k").subset(40, 10)
    assert [ml.experiments.make_rule(rule, "fc_relu", data, seed=seed).seed for seed in (0, 3)] == [0, 3]


def test_an_optimizer_that_is_made_and_a_length_of_zero_are_refused():
    with refuses(TypeError, "pass partial(torch.optim.Adam, lr=0.001)"):
        ml.standardised(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=1))
    with refuses(ValueError, "length must be"):
        ml.standardised(torch.optim.SGD, length=0)
    with refuses(ValueError, "classes must be"):
        ml.standardised(torch.optim.SGD, 0)
