"""A first pass in few bits: DFA and MEM-DFA stay equal, e is near the exact one, and memory is predicted."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import make_rule, params, rotated, train
from reference import assert_identical, refuses
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core import block_float, compat, precision
from memdfa_lab.core.block_float import LARGE_BYTES, BlockFloat, Products
from memdfa_lab.core.signal import SMALL_BYTES
from memdfa_lab.memory import measure, predict

MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PASSES = {"bfloat16": "bfloat16", "int8": "int8", "6bit": "6bit", "noisy": BlockFloat(5, "stochastic", seed=3)}
pytestmark = pytest.mark.filterwarnings("ignore:with pass1")
ALL_FLOAT32 = params(lambda problem: all(p.dtype == torch.float32 for p in problem.build().parameters()))


def by_numpy(t, bits):
    """Return t (rows, columns) in block floating point, by its definition."""
    out = np.zeros_like(t)
    for i, row in enumerate(t):
        largest = np.abs(row).max()
        if largest:
            power = 2.0 ** (math.floor(math.log2(largest)) + 1 - (bits - 1))
            out[i] = np.clip(np.round(row / power), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) * power
    return out


@pytest.mark.parametrize("bits", [2, 3, 6, 8, 12])
def test_numbers_are_those_of_the_definition(bits):
    t = torch.randn(40, 33) * torch.logspace(-8, 8, 40)[:, None]
    t[3] = 0
    assert torch.equal(BlockFloat(bits).rounded(t), torch.from_numpy(by_numpy(t.numpy(), bits)))


def test_stochastic_rounding_is_right_on_average_and_drawn_from_its_key():
    numbers, t = BlockFloat(4, "stochastic"), torch.randn(3, 50)
    generator = torch.Generator().manual_seed(0)
    draws = [numbers.rounded(t, lambda like: torch.rand(like.shape, generator=generator)) for _ in range(4000)]
    step = t.abs().amax(1, keepdim=True).log2().floor().add(1 - 3).exp2()  # between neighbours
    inside = t.abs() < 7 * step  # of the largest numbers there are
    assert ((torch.stack(draws).mean(0) - t).abs() < 0.05 * step)[inside].all()
    products = []
    for key in (5, 5, 6):
        with Products(numbers, key):
            products.append(F.linear(t, t))
    assert torch.equal(products[0], products[1])
    assert not torch.equal(products[0], products[2])


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_products_are_those_of_eight_bits(shape, bias):
    layer, x = nn.Linear(33, 20, bias=bias), torch.randn(shape)
    with torch.no_grad():
        with Products(torch.int8):
            integers = layer(x)
        with Products(BlockFloat(8)):
            emulated = layer(x.flatten(0, -2)).view(*shape[:-1], -1)
    torch.testing.assert_close(integers, emulated, rtol=1e-5, atol=1e-5)
    assert 0 < (integers - layer(x)).norm() / layer(x).norm() < 0.02


@pytest.mark.parametrize("pass1", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("problem", ALL_FLOAT32)
def test_dfa_and_memdfa_with_one_first_pass_are_equal_bit_for_bit(problem, pass1):
    ends = []
    for rule in ("dfa", "memdfa"):
        torch.manual_seed(4)
        learner = make_rule(rule, problem, MOMENTUM, ml.feedback.Regenerated(seed=1), pass1=pass1)
        learned = train(learner, problem)
        ends.append((learned.losses, {**learner.state_dict(), "rule": None}))
    assert_identical(*ends)


@rotated(
    "problem rule pass1 optimizer",
    ALL_FLOAT32,
    ("dfa", "memdfa"),
    PASSES.values(),
    (torch.optim.SGD, MOMENTUM),
    turns=4,
)
def test_memory_is_predicted_to_the_byte(problem, rule, pass1, optimizer):
    factory, feedback = partial(optimizer, lr=0.1), ml.feedback.Regenerated(seed=1)
    learner = make_rule(rule, problem, factory, feedback, pass1=pass1)
    found = predict(
        rule,
        problem.build(),
        problem.x.shape,
        factory,
        feedback,
        loss_fn=problem.loss,
        x_dtype=problem.x.dtype,
        pass1=pass1,
    )
    assert found.peak_bytes == measure(learner, problem.x, problem.y, warm_up=1).peak_bytes


NETWORKS = {"784-[800]x3-10": 128, "784-[256]x3-10": 2048, "784-[512]x3-10": 512, "784-[2048]x3-10": 512}
NETWORKS |= {"784-[64]x8-10": 2048, "3072-[64]x2-10": 2048, "784-[64]x9-10": 128}  # the input is wide
NETWORKS |= {"mnist_conv": 100, "liao_cifar": 100, "vgg_16": 32}


@pytest.mark.parametrize(("network", "batch"), NETWORKS.items())
@pytest.mark.parametrize(("pass1", "size"), [("bfloat16", 2), ("int8", 1)])
def test_the_peak_is_that_of_an_exact_pass_and_one_narrowed_layer_at_most(network, batch, pass1, size):
    net, shape = ml.models.build(network), (batch, *ml.models.input_shape(network))
    feedback = ml.feedback.Regenerated()
    peaks = [predict("memdfa", net, shape, feedback=feedback, pass1=kind).peak_bytes for kind in (None, pass1)]
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    largest = max(layer.weight.numel() + batch * min(layer.in_features, layer.out_features) for layer in layers)
    assert peaks[1] - peaks[0] <= size * (largest / 4 if network == "vgg_16" else largest) + SMALL_BYTES


@pytest.mark.parametrize("pass1", ["bfloat16", "int8"])
def test_large_weights_are_narrowed_in_parts_to_the_same_numbers(monkeypatch, pass1):
    net, x, found = ml.models.mlp(40, [700, 300], 10), torch.randn(3, 40), []
    for large in (LARGE_BYTES[precision.PASS1[pass1]], 1000):
        monkeypatch.setitem(LARGE_BYTES, precision.PASS1[pass1], large)
        with torch.no_grad(), precision.first_pass(pass1, x)():
            out = net(x)
        found.append((out, predict("memdfa", net, x.shape, pass1=pass1).peak_bytes))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] < found[0][1] / 2


def test_e_turns_less_with_more_bits_and_the_angle_leaves_the_rule_as_it_is():
    net, x, y = ml.models.mlp(20, [64] * 4, 5, seed=1), torch.randn(64, 20), torch.arange(64) % 5
    found = {}
    for pass1 in (None, "bfloat16", "int8", "6bit", "4bit", "3bit"):
        rule = ml.MemDFA(net, MOMENTUM, pass1=pass1)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        found[pass1] = ml.alignment.error_angle(rule, x, y)
        assert_identical(dict(net.state_dict()), before)
    assert found[None] == 0
    assert 0 < found["bfloat16"] < found["int8"] < found["6bit"] < found["4bit"] < found["3bit"]
    assert found["int8"] < 2


@pytest.mark.filterwarnings("default:with pass1")
@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
def test_an_e_that_is_far_from_the_exact_one_is_told_once(rule):
    net, x, y = ml.models.mlp(20, [64] * 4, 5, seed=1), torch.randn(64, 20), torch.arange(64) % 5
    learner = ml.RULES[rule](net, MOMENTUM, pass1="2bit")
    angle = ml.alignment.error_angle(learner, x, y)
    with pytest.warns(UserWarning, match=f"{angle:.0f} degrees"):
        learner.step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "this processor multiplies")
        learner.step(x, y)  # it has been said
        ml.RULES[rule](ml.models.mlp(20, [64] * 4, 5, seed=1), MOMENTUM, pass1="int8").step(x, y)


def test_rows_of_int8_that_are_too_long_for_a_sum_in_int32_are_multiplied_in_bfloat16():
    size = block_float.LONGEST + 1
    net, h = nn.Linear(size, 2, bias=False), torch.full((3, size), 1.99)
    nn.init.constant_(net.weight, 1.99)
    with torch.no_grad(), precision.first_pass("int8", h)():
        torch.testing.assert_close(net(h).float(), torch.full((3, 2), 1.99**2 * size), rtol=0.01, atol=0)


def no_product(*matrices):
    raise NotImplementedError("not on this device")


def test_where_torch_multiplies_no_int8_pass1_runs_in_bfloat16_and_says_so(monkeypatch):
    x, y, states = torch.randn(6, 8), torch.arange(6) % 5, []
    for pass1, missing in (("bfloat16", False), ("int8", True)):
        rule = ml.MemDFA(ml.models.mlp(8, [12], 5, seed=1), MOMENTUM, pass1=pass1)
        if missing:
            monkeypatch.setattr(torch, "_int_mm", no_product)
            compat.has_int8_product.cache_clear()
            with pytest.warns(UserWarning, match="multiplies no int8 on cpu: pass1='int8' runs in bfloat16"):
                rule = ml.MemDFA(ml.models.mlp(8, [12], 5, seed=1), MOMENTUM, pass1=pass1)
        rule.step(x, y)
        states.append(rule.blocks.state_dict())
    compat.has_int8_product.cache_clear()
    assert_identical(*states)


@pytest.mark.parametrize(("told", "warned"), [({"arm_i8mm": True}, False), ({"arm_i8mm": False}, True), ({}, False)])
def test_arm_processors_are_asked_by_their_own_names(told, warned, monkeypatch):
    monkeypatch.setattr(compat.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert compat.has_fast_product(torch.int8, "cpu") != warned


def test_the_angle_of_e_is_that_of_the_same_network_in_memory(tmp_path):
    net, x, y = ml.models.mlp(8, [12, 12], 5), torch.randn(9, 8), torch.arange(9) % 5
    angle = ml.alignment.error_angle(ml.MemDFA(copy.deepcopy(net), MOMENTUM, pass1="int8"), x, y)
    with ml.offload.Disk(tmp_path) as disk:
        rule = ml.MemDFA(net, MOMENTUM, pass1="int8", offload=disk)
        assert ml.alignment.error_angle(rule, x, y) == angle > 0


@pytest.mark.parametrize("pass1", ["bfloat16", "int8", "8bit"])
def test_numbers_that_are_not_finite_do_not_vanish(pass1):
    net = ml.models.mlp(8, [12, 12], 5)
    learner = ml.MemDFA(net, MOMENTUM, pass1=pass1)
    learner.step(torch.randn(6, 8), torch.arange(6) % 5)
    with torch.no_grad():
        net[1][0].weight[2, 3] = math.nan
    with pytest.raises(FloatingPointError):
        learner.step(torch.randn(6, 8), torch.arange(6) % 5)


class Alone(nn.Linear):
    """A layer that multiplies float32 alone."""

    def forward(self, h):
        if h.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("no kernel for this dtype")
        return super().forward(h)


def test_what_has_no_cheap_kernel_runs_in_float32_and_is_named():
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), Alone(12, 12), nn.Tanh(), nn.Linear(12, 5))
    learner = ml.MemDFA(net, MOMENTUM, pass1="bfloat16")
    with pytest.warns(UserWarning, match="Alone.*float32.*no kernel"):
        assert learner.step(torch.randn(6, 8), torch.arange(6) % 5).isfinite()


def test_a_first_pass_that_there_is_not_or_not_here_is_refused(monkeypatch):
    net = ml.models.mlp(8, [12], 5)
    for rule in ("bp", "fa"):
        with refuses(ValueError, "pass1 is for DFA and MEM-DFA"):
            ml.RULES[rule](net, MOMENTUM, pass1="int8")
    with refuses(ValueError, "pass1 is for DFA and MEM-DFA"):
        ml.experiments.profile("checkpoint", "fc_relu", 4, measured=True, pass1="int8")
    with refuses(ValueError, "unknown pass1 'int9'", "int8"):
        ml.MemDFA(net, MOMENTUM, pass1="int9")
    with refuses(ValueError, "float32", "float64"):
        ml.MemDFA(ml.models.mlp(8, [12], 5).double(), MOMENTUM, pass1="int8")
    with refuses(ValueError, "bits", "from 2"):
        ml.precision.BlockFloat(1)
    with refuses(ValueError, "rounding", "nearest"):
        ml.precision.BlockFloat(4, "up")
    monkeypatch.setattr(precision, "has_fast_product", lambda *given: False)
    with pytest.warns(UserWarning, match="saves no time"):
        ml.MemDFA(net, MOMENTUM, pass1="int8")
