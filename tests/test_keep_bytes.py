"""MemDFA(keep_bytes=...): DFA's updates at every budget, memory under it, less to run again the larger it is."""

import math

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, params, train
from problems import make_rule as make
from reference import assert_same_training

import memdfa_lab as ml
from memdfa_lab.core import by_hand
from memdfa_lab.memory import measure, predict
from memdfa_lab.memory.predict import kept_bytes

SGD = {"optimizer": "sgd"}


@pytest.mark.parametrize("budget", [1, 300, 1000, 3000, math.inf])
@pytest.mark.parametrize("problem", params())
def test_every_budget_trains_as_dfa_bit_for_bit(problem, budget):
    assert_same_training(
        train(make("dfa", problem, "momentum"), problem),
        train(make("memdfa", problem, "momentum", keep_bytes=budget), problem),
    )


@pytest.mark.parametrize("budget", [0, 3000, math.inf])
@pytest.mark.parametrize("problem", params(lambda problem: "conv" in problem.name or problem.random))
def test_in_parts_of_the_batch_too(problem, budget, monkeypatch):
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)  # batches of 6 and 4 in parts of 1 and more
    assert_same_training(
        train(make("dfa", problem), problem),
        train(make("memdfa", problem, keep_bytes=budget), problem),
    )


@pytest.mark.parametrize("budget", [0, 2**20, math.inf])
@pytest.mark.parametrize(("network", "batch"), [("mnist_conv", 21), ("liao_cifar", 10)])
def test_convnets_of_full_size_train_as_dfa_bit_for_bit(network, batch, budget):
    x, y = torch.randn(batch, *ml.models.get(network).input_shape), torch.randint(10, (batch,))
    nets = [ml.models.build(network) for _ in range(2)]
    for rule in (ml.DFA(nets[0], OPTIMIZERS["sgd"]), ml.MemDFA(nets[1], OPTIMIZERS["sgd"], keep_bytes=budget)):
        for _ in range(2):
            rule.step(x, y)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("name", ["mlp_relu", "everything", "conv_pool", "dropout"])
def test_what_is_kept_fits_the_budget_and_one_block_more_would_not(name):
    problem = BY_NAME[name]
    sizes = kept_bytes(make("dfa", problem).blocks, problem.x)
    for n in range(1, len(sizes)):
        budget = sum(sizes[:n])
        for given, fitting in ((budget, n), (budget - 1, n - 1)):
            rule = make("memdfa", problem, keep_bytes=given)
            assert rule._how_many_fit(problem.x) == fitting


def test_memory_is_the_papers_plus_what_is_kept_and_predicted_to_the_byte():
    def build():
        return ml.models.mlp(784, [256] * 16, 10)

    make_sgd = make("dfa", BY_NAME["mlp_relu"]).optimizers[0].__class__
    x, y = torch.randn(64, 784), torch.randint(10, (64,))
    activation = 64 * 256 * 4
    floor = None
    for n in (0, 1, 4, 16):
        keep = n * activation
        rule = ml.MemDFA(build(), lambda p: make_sgd(p, lr=0.01), keep_bytes=keep)
        trace = measure(rule, x, y, warm_up=1)
        predicted = predict("memdfa", build, (64, 784), lambda p: make_sgd(p, lr=0.01), keep_bytes=keep)
        assert trace.peak_bytes == predicted.peak_bytes
        floor = trace.peak_bytes if floor is None else floor
        assert trace.peak_bytes <= floor + keep
        run_again = trace.timeline.query("phase == 'recompute' and bytes > 0")["block"].nunique()
        assert run_again == 17 - n


def test_counting_what_fits_changes_nothing():
    problem = BY_NAME["everything"]
    rule = make("memdfa", problem, keep_bytes=200_000)
    state, before = torch.get_rng_state(), [b.clone() for b in (*rule.blocks.buffers(), *rule.blocks.parameters())]
    assert rule._how_many_fit(problem.x) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, (*rule.blocks.buffers(), *rule.blocks.parameters()), before))


@pytest.mark.parametrize("budget", [-1, math.nan])
def test_a_budget_below_nothing_is_refused(budget):
    with pytest.raises(ValueError, match="keep_bytes"):
        make("memdfa", BY_NAME["mlp_relu"], keep_bytes=budget)
