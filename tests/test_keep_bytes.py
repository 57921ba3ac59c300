"""MemDFA(keep_bytes=...): DFA's updates at every budget, memory under it, less to run again the larger it is."""

import copy
import math
from functools import partial

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, Problem, make_rule, params, rotated, train
from reference import assert_identical, assert_same_training, refuses

import memdfa_lab as ml
from memdfa_lab.core import by_hand
from memdfa_lab.memory import measure, predict
from memdfa_lab.memory.predict import kept_bytes

SGD = partial(torch.optim.SGD, lr=0.001)


def check_equals_dfa(problem: Problem, budget: float, optimizer: str = "sgd") -> None:
    memdfa = make_rule("memdfa", problem, optimizer, keep_bytes=budget)
    assert_same_training(train(make_rule("dfa", problem, optimizer), problem), train(memdfa, problem))


@rotated("problem budget optimizer", params(), [1, 300, 1000, 3000, math.inf], OPTIMIZERS, turns=2)
def test_every_budget_trains_as_dfa_bit_for_bit(problem, budget, optimizer):
    check_equals_dfa(problem, budget, optimizer)


@rotated("problem budget", params(lambda problem: "conv" in problem.name or problem.random), [0, 3000, math.inf])
def test_in_parts_of_the_batch_too(problem, budget, monkeypatch):
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)  # batches of 6 and 4 in parts of 1 and more
    check_equals_dfa(problem, budget)


@pytest.mark.parametrize("budget", [0, 2**20, math.inf])
@pytest.mark.parametrize(("network", "batch"), [("mnist_conv", 21), ("liao_cifar", 10)])
def test_convnets_of_full_size_train_as_dfa_bit_for_bit(network, batch, budget):
    shape = ml.models.get(network).input_shape
    check_equals_dfa(Problem(network, partial(ml.models.build, network), shape, batch=batch), budget)


def blocks_run_again(rule: ml.Rule, *batch: torch.Tensor) -> int:
    return measure(rule, *batch, warm_up=1).timeline.query("phase == 'recompute'")["block"].nunique()


@pytest.mark.parametrize("name", ["mlp_relu", "everything", "conv_pool", "dropout"])
def test_what_is_kept_fits_the_budget_and_one_block_more_would_not(name):
    problem = BY_NAME[name]
    sizes = kept_bytes(make_rule("dfa", problem).blocks, problem.x)
    for n in range(1, len(sizes)):
        for budget, fitting in ((sum(sizes[:n]), n), (sum(sizes[:n]) - 1, n - 1)):
            rule = make_rule("memdfa", problem, keep_bytes=budget)
            assert blocks_run_again(rule, problem.x, problem.y) == len(sizes) - fitting


def test_memory_is_the_papers_plus_what_is_kept_and_predicted_to_the_byte():
    build, activation = partial(ml.models.mlp, 784, [256] * 16, 10), 64 * 256 * 4
    x, y = torch.randn(64, 784), torch.arange(64) % 10
    papers = predict("memdfa", build, (64, 784), SGD).peak_bytes
    for n in (0, 1, 4, 16):
        rule = ml.MemDFA(build(), SGD, keep_bytes=n * activation)
        peak = measure(rule, x, y, warm_up=1).peak_bytes
        assert peak == predict("memdfa", build, (64, 784), SGD, keep_bytes=n * activation).peak_bytes
        assert peak <= papers + n * activation
        assert blocks_run_again(rule, x, y) == 17 - n


def test_counting_what_fits_changes_nothing():
    problem = BY_NAME["everything"]
    blocks = make_rule("memdfa", problem).blocks
    state, before = torch.get_rng_state(), copy.deepcopy(blocks.state_dict())
    assert sum(kept_bytes(blocks, problem.x)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert_identical(blocks.state_dict(), before)


@pytest.mark.parametrize("budget", [-1, math.nan, "1"])
def test_a_budget_below_nothing_is_refused(budget):
    with refuses(ValueError, "keep_bytes must be", repr(budget)):
        make_rule("memdfa", BY_NAME["mlp_relu"], keep_bytes=budget)
