"""`pack`: blocks are taught from rounded numbers, the same in DFA and MEM-DFA, and hold a quarter until then."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, make_rule, params, rotated, train
from reference import assert_same_training, refuses
from test_pass1 import by_numpy
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core import by_hand
from memdfa_lab.core.layers import as_it_is
from memdfa_lab.core.packing import Packing
from memdfa_lab.core.signal import Signal
from memdfa_lab.memory import measure, predict
from memdfa_lab.memory.predict import kept_bytes

SGD = partial(torch.optim.SGD, lr=0.1)
PACKS = ("int8", ml.precision.BlockFloat(4))
FLOAT32 = params(lambda problem: all(p.dtype == torch.float32 for p in problem.build().parameters()))
pytestmark = [pytest.mark.filterwarnings("ignore:with pass1"), pytest.mark.filterwarnings("ignore:autograd runs")]


def check_equals_dfa(rule, problem, optimizer="sgd", pack="int8", **options):
    same = {name: value for name, value in options.items() if name != "keep_bytes"}
    expected, x = train(make_rule("dfa", problem, optimizer, pack=pack, **same), problem), problem.x.clone()
    assert_same_training(expected, train(make_rule(rule, problem, optimizer, pack=pack, **options), problem))
    assert torch.equal(problem.x, x)


@rotated("problem budget optimizer pack", FLOAT32, [0, 300, 1500, math.inf], OPTIMIZERS, PACKS, turns=2, quick=1)
def test_every_budget_trains_as_dfa_bit_for_bit(problem, budget, optimizer, pack):
    check_equals_dfa("memdfa", problem, optimizer, pack, keep_bytes=budget)


@rotated("problem budget pass1", FLOAT32, [0, 1500, math.inf], ["int8", "bfloat16"])
def test_in_parts_of_the_batch_and_after_a_cheap_first_pass_too(problem, budget, pass1, monkeypatch):
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)
    check_equals_dfa("memdfa", problem, keep_bytes=budget)
    if budget == 0:  # else pass 1 is exact in blocks that are kept
        check_equals_dfa("memdfa", problem, pass1=pass1)


SLOPES = {nn.ReLU: lambda h: (h > 0).float(), nn.Tanh: lambda h: 1 - h**2, nn.Sigmoid: lambda h: h - h**2}


def check_updates_are_those_of_rounded_activations(activation):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 20), nn.Linear(20, 12), nn.Linear(12, 4)]
    net = nn.Sequential(*(nn.Sequential(layer, activation()) for layer in layers[:2]), layers[2])
    x, y = torch.randn(9, 6), torch.arange(9) % 4
    rule = ml.DFA(net, SGD, pack="int8")
    outs = [x]
    with torch.no_grad():
        for block in net:
            outs.append(block(outs[-1]))
    logits = outs[3].requires_grad_()
    (e,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y), logits)
    rounded = [x] + [torch.from_numpy(by_numpy(h.detach().numpy(), 8)) for h in outs[1:]]
    expected = []
    for i, layer in enumerate(layers):
        s = e
        if i < 2:
            s = Signal(i, e, rule.feedback).shaped_like(outs[i + 1]) * SLOPES[activation](rounded[i + 1])
        expected += [layer.weight - 0.1 * s.t() @ rounded[i], layer.bias - 0.1 * s.sum(0)]
    rule.step(x, y)
    for parameter, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", SLOPES)
def test_updates_are_those_of_rounded_activations(activation):
    check_updates_are_those_of_rounded_activations(activation)


@pytest.mark.parametrize("problem", FLOAT32)
def test_updates_are_near_those_of_exact_activations(problem):
    ends = []
    for pack in (None, "int8"):
        learner = make_rule("dfa", problem, pack=pack)
        torch.manual_seed(2)
        learner.step(problem.x, problem.y)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in learner.blocks.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in make_rule("dfa", problem).blocks.parameters()])
    assert (ends[1] - ends[0]).norm() <= 0.1 * (ends[0] - start).norm()


def test_a_batchnorm_over_two_examples_that_are_alike_is_taught_as_exactly():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    x, ends = torch.ones(2, 6) + torch.tensor([[0.0], [1e-4]]), []
    for pack in (None, "int8"):
        learner = ml.DFA(copy.deepcopy(net), SGD, pack=pack)
        learner.step(x, torch.tensor([0, 1]))
        ends.append(learner.blocks[0][0].weight)
    torch.testing.assert_close(*ends)


class TeachesAgainExactly(ml.MemDFA):
    def recompute(self, i, h):
        self.packing, packing = None, self.packing
        try:
            return super().recompute(i, h)
        finally:
            self.packing = packing


def test_a_second_pass_that_does_not_round_is_caught():
    with pytest.raises(AssertionError):
        check_equals_dfa(TeachesAgainExactly, BY_NAME["mlp_relu"])


@pytest.mark.parametrize("what", ["source", "hold"])
def test_an_input_or_a_slope_that_is_exact_is_caught(what, monkeypatch):
    if what == "source":
        monkeypatch.setattr(Packing, "source", lambda self, h: None)
    else:
        monkeypatch.setattr("memdfa_lab.core.packing.PackedByHand.hold", staticmethod(as_it_is))
    with pytest.raises(AssertionError):
        check_updates_are_those_of_rounded_activations(nn.Tanh)


@rotated("problem rule budget optimizer", FLOAT32, ("dfa", "memdfa"), [0, 1500], ("sgd", "adamw"), turns=2)
def test_memory_is_predicted_to_the_byte(problem, rule, budget, optimizer):
    options = {"pack": "int8", **({"keep_bytes": budget} if rule == "memdfa" else {})}
    factory, feedback = OPTIMIZERS[optimizer], ml.feedback.Regenerated(seed=1)
    learner = make_rule(rule, problem, optimizer, feedback, **options)
    about = {"loss_fn": problem.loss, "x_dtype": problem.x.dtype, **options}
    found = predict(rule, problem.build(), problem.x.shape, factory, feedback, **about)
    measured = measure(learner, problem.x, problem.y, warm_up=1)
    assert (found.peak_bytes, found.end_bytes) == (measured.peak_bytes, measured.end_bytes)


@pytest.mark.parametrize("name", ["784-[256]x8-10", "mnist_conv", "liao_cifar_bn"])
@pytest.mark.parametrize("pack", [None, "int8"])
def test_what_is_kept_is_counted_and_less_than_what_is_not_packed(name, pack):
    net, shape = ml.models.build(name), (64, *ml.models.input_shape(name))
    sizes = kept_bytes(net, torch.empty(shape, device="meta"), pack and Packing(pack))
    timeline = predict("dfa", net, shape, SGD, pack=pack).timeline
    before_error = (timeline["phase"] == "error").argmax() - 1
    assert sum(sizes) == timeline["total_bytes"][before_error]
    if pack:
        assert sum(sizes) < (0.8 if name == "liao_cifar_bn" else 0.5) * sum(
            kept_bytes(net, torch.empty(shape, device="meta"))
        )


def test_a_budget_counts_what_is_packed_and_one_output_that_is_not():
    build, whole = partial(ml.models.mlp, 784, [256] * 16, 10), 64 * 256 * 4
    packed = whole // 4 + 64 * 4  # and a power of two an example
    x, y = torch.randn(64, 784), torch.arange(64) % 10
    for n in (1, 4, 16):
        budget = (n - 1) * packed + whole
        for keep, kept in ((budget, n), (budget - 1, n - 1)):
            rule = ml.MemDFA(build(), SGD, keep_bytes=keep, pack="int8")
            timeline = measure(rule, x, y, warm_up=1).timeline
            again = 17 - timeline.query("phase == 'recompute'")["block"].nunique()
            assert again == (17 if kept == 16 else kept)  # the last block's output is small, and fits, too


@pytest.mark.parametrize("name", ["mlp_relu", "conv_pool"])
def test_a_sweep_and_a_run_from_disk_make_the_same_updates(name, tmp_path):
    problem, ends = BY_NAME[name], []
    for swept in (False, True):
        net = problem.build()
        store = ml.offload.Disk(tmp_path) if swept else None
        model = store.build(lambda net=net: net) if swept else net
        rule = ml.MemDFA(model, SGD, problem.loss, pack="int8", **({"offload": store} if swept else {}))
        batches = [(problem.x, problem.y)] * 3
        ends.append(torch.stack(list(rule.sweep(batches)) if swept else [rule.step(*batch) for batch in batches]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [ml.DFA, ml.MemDFA, partial(ml.MemDFA, keep_bytes=1000)])
def test_a_block_that_autograd_runs_stays_exact_and_is_named_once(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Softplus()), nn.Linear(8, 4))
    rule = make(net, SGD, pack="int8")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            rule.step(torch.randn(5, 6), torch.arange(5) % 4)
    assert [str(one.message) for one in given] == [
        "autograd runs Linear + Softplus: what it keeps is exact, and not packed"
    ]


@pytest.mark.parametrize(
    ("rule", "options", "hint"),
    [
        (ml.BP, {}, "pack is for DFA and MEM-DFA"),
        (ml.LocalReadout, {}, "leave pack out"),
        (ml.DFA, {"precision": "bfloat16"}, "leave precision out"),
        (ml.MemDFA, {"clip_global_norm": 1.0}, "leave clip_global_norm out"),
        (ml.DFA, {"feedback": ml.feedback.Learned(lr=0.1)}, "leave feedback that learns out"),
        (ml.DFA, {"pack": "int9"}, "did you mean 'int8'"),
        (ml.DFA, {"pack": ml.precision.BlockFloat(9)}, "up to 8 bits"),
        (ml.DFA, {"pack": ml.precision.BlockFloat(8, "stochastic")}, "to nearest"),
        (ml.DFA, {"pack": 8}, "'int8' or a BlockFloat"),
        (ml.MemDFA, {"double": True}, "torch.float64"),
    ],
)
def test_what_cannot_be_packed_is_refused(rule, options, hint):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if options.pop("double", False):
        net = net.double()
    with refuses((ValueError, TypeError), hint):
        rule(net, SGD, **{"pack": "int8", **options})
