"""The local gradient by hand against the one by autograd, and what each holds."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from problems import OPTIMIZERS, params, train
from problems import make_rule as make
from reference import assert_close, assert_close_training, surrogate_gradients
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core import by_hand
from memdfa_lab.core.local import ByAutograd, block_gradient
from memdfa_lab.core.signal import Signal
from memdfa_lab.memory import measure, predict

SGD = partial(torch.optim.SGD, lr=0.01)


def by_autograd(monkeypatch):
    monkeypatch.setattr(by_hand, "block_gradient", lambda *given: None)


@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", params())
def test_both_ways_give_the_same_updates_in_float64(problem, optimizer, rule, monkeypatch):
    problem = problem.double()
    ours = train(make(rule, problem, optimizer), problem)
    by_autograd(monkeypatch)
    assert_close_training(ours, train(make(rule, problem, optimizer), problem))


@pytest.mark.parametrize("problem", params())
def test_both_ways_give_the_same_update_in_float32(problem, monkeypatch):
    ours = train(make("memdfa", problem), problem, steps=1)
    by_autograd(monkeypatch)
    for one, other in zip(ours.tensors, train(make("memdfa", problem), problem, steps=1).tensors, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, other.abs().max().item())


def block_of(*layers, features=(12,)):
    """The layers between a first and a last block, so that a signal comes from B."""
    torch.manual_seed(0)
    return nn.Sequential(*layers), torch.randn(6, *features)


CONV = (3, 8, 8)
BY_HAND = {
    "relu": (lambda: [nn.Linear(12, 40), nn.ReLU()], (12,)),
    "in-place relu": (lambda: [nn.Linear(12, 40), nn.ReLU(inplace=True)], (12,)),
    "leaky relu": (lambda: [nn.Linear(12, 40), nn.LeakyReLU(0.2)], (12,)),
    "tanh": (lambda: [nn.Linear(12, 40), nn.Tanh()], (12,)),
    "sigmoid": (lambda: [nn.Linear(12, 40, bias=False), nn.Sigmoid()], (12,)),
    "gelu": (lambda: [nn.Linear(12, 40), nn.GELU()], (12,)),
    "gelu by tanh": (lambda: [nn.Linear(12, 40), nn.GELU("tanh")], (12,)),
    "none": (lambda: [nn.Linear(12, 40)], (12,)),
    "flatten first": (lambda: [nn.Flatten(), nn.Linear(192, 40), nn.ReLU()], CONV),
    "batch norm": (lambda: [nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU()], (12,)),
    "batch norm behind": (lambda: [nn.Linear(12, 40), nn.ReLU(), nn.BatchNorm1d(40)], (12,)),
    "batch norm without weights": (lambda: [nn.Linear(12, 40), nn.BatchNorm1d(40, affine=False), nn.Tanh()], (12,)),
    "batch norm of the batch": (lambda: [nn.Linear(12, 40), nn.BatchNorm1d(40, track_running_stats=False)], (12,)),
    "batch norm in eval mode": (lambda: [nn.Linear(12, 40), nn.BatchNorm1d(40).eval(), nn.ReLU()], (12,)),
    "two activations": (lambda: [nn.Linear(12, 40), nn.Tanh(), nn.Sigmoid()], (12,)),
    "activation, view, activation": (lambda: [nn.Linear(12, 40), nn.Tanh(), nn.Identity(), nn.ReLU()], (12,)),
    "conv, max pool, relu": (lambda: [nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()], CONV),
    "conv, relu, max pool": (lambda: [nn.Conv2d(3, 5, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2)], CONV),
    "conv, tanh, view, max pool": (
        lambda: [nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Identity(), nn.MaxPool2d(2), nn.Flatten()],
        CONV,
    ),
    "conv, overlapping pools": (
        lambda: [nn.Conv2d(3, 5, 3), nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 1)],
        CONV,
    ),
    "conv, norm, relu, avg pool": (
        lambda: [nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)],
        CONV,
    ),
    "dilated conv, flatten": (lambda: [nn.Conv2d(3, 4, 3, dilation=2, bias=False), nn.ReLU(), nn.Flatten()], CONV),
}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_block_by_hand_has_autograds_gradients(name, kept, monkeypatch):
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)  # convolutions run in parts of one example and more
    layers, features = BY_HAND[name]
    block, x = block_of(*layers(), features=features)
    block, x = block.double(), x.double()
    before, other = x.clone(), copy.deepcopy(block)
    expected, ours = ByAutograd(other, x, nullcontext()), block_gradient(block, x)
    assert isinstance(ours, by_hand.ByHand)
    if kept:
        ours.forward()
    gradients = []
    for way, net in ((expected, other), (ours, block)):
        signal = Signal(0, torch.linspace(-1, 1, 60).view(6, 10).double(), FEEDBACK)
        way.learn(signal)
        gradients.append([p.grad for p in net.parameters()])
    assert torch.equal(ours.out, expected.out)
    assert all(map(torch.equal, block.buffers(), other.buffers()))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)
    assert torch.equal(x, before)


FEEDBACK = ml.feedback.Regenerated(1)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(12, 40), nn.Dropout()],
        [nn.Linear(12, 40), nn.LayerNorm(40)],
        [nn.utils.parametrizations.weight_norm(nn.Linear(12, 40))],
        [nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular")],
        [nn.Conv2d(3, 5, 2, padding="same")],
        [nn.ConvTranspose2d(3, 5, 2)],
    ],
)
def test_any_other_block_is_left_to_autograd(layers):
    assert by_hand.block_gradient(nn.Sequential(*layers), torch.randn(6, 3, 8, 8), nullcontext()) is None


def test_hooks_on_a_layer_are_not_passed_over():
    block, x = block_of(nn.Linear(12, 40), nn.ReLU())
    calls = []
    block[1].register_forward_hook(lambda *args: calls.append(1))
    block_gradient(block, x).forward()
    assert calls == [1]


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_weight_are_not_passed_over(register, rule):
    net, calls = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), []
    getattr(net[0].weight, register)(lambda gradient: calls.append(1))
    ml.RULES[rule](net, SGD).step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert calls == [1]


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_a_weight_that_was_frozen_when_the_rule_was_made_stays(rule):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].weight.requires_grad_(False)
    learner, before = ml.RULES[rule](net, SGD), net[0].weight.clone()
    net[0].weight.requires_grad_()
    learner.step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({}, True),
        ({"foreach": True}, True),
        ({"momentum": 0.9}, False),
        ({"weight_decay": 0.1}, False),
        ({"maximize": True}, False),
    ],
)
def test_only_plain_sgd_is_done_where_the_weight_lies(settings, plain):
    layer = nn.Linear(3, 2)
    assert by_hand._plain_lr(torch.optim.SGD(layer.parameters(), lr=0.1, **settings), layer.weight) == (
        0.1 if plain else None
    )
    assert by_hand._plain_lr(torch.optim.Adam(layer.parameters()), layer.weight) is None
    hooked = torch.optim.SGD(layer.parameters(), lr=0.1)
    hooked.register_step_pre_hook(lambda *args: None)
    assert by_hand._plain_lr(hooked, layer.weight) is None


def test_a_learning_rate_for_each_parameter_is_respected():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def two_rates(parameters):
        weight, bias = parameters
        return torch.optim.SGD([{"params": [weight], "lr": 0.0}, {"params": [bias], "lr": 0.5}], lr=0.1)

    rule = ml.MemDFA(net, two_rates)
    before = [p.detach().clone() for p in net.parameters()]
    rule.step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    changed = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize(("width", "batch"), [(800, 128), (256, 2048)])
def test_memdfa_holds_two_activations_and_a_quarter_of_a_signal(width, batch):
    trace = predict("memdfa", lambda: ml.models.mlp(width, [width] * 8, 10), (batch, width), SGD, FEEDBACK)
    activation = 4 * batch * width
    quarter = 4 * batch * -(-width // 64) * 16
    small = 4 * (batch * 10 + -(-width // 64) * 16 * 10 + width + 16)  # e, a quarter of B, db, scalars
    assert trace.peak_by_category["activations"] == 2 * activation
    assert trace.peak_bytes <= 2 * activation + quarter + small


def test_with_momentum_one_gradient_is_added_and_nothing_more():
    def build():
        return ml.models.mlp(256, [256] * 4, 10)

    plain = predict("memdfa", build, (512, 256), SGD, FEEDBACK).peak_bytes
    momentum = predict("memdfa", build, (512, 256), partial(SGD, momentum=0.9), FEEDBACK).peak_bytes
    fused = predict("memdfa", build, (512, 256), partial(torch.optim.Adam, fused=True), FEEDBACK).peak_bytes
    assert momentum - plain == fused - plain == 4 * 256 * 256


def test_no_whole_feedback_matrix_is_made():
    trace = predict("memdfa", lambda: ml.models.mlp(64, [512] * 2, 10), (256, 64), SGD, FEEDBACK)
    drawn = trace.timeline.query("category == 'feedback' and bytes > 0")["bytes"]
    assert drawn.max() == 4 * 128 * 10
    stored = measure(ml.MemDFA(ml.models.mlp(64, [512] * 2, 10), SGD), torch.ones(256, 64), torch.zeros(256).long())
    assert stored.timeline.query("category == 'feedback' and bytes > 0")["bytes"].max() == 4 * 512 * 10


def test_what_lies_between_input_and_output_is_there_for_an_eighth_of_the_batch():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)
        )

    trace = predict("memdfa", build, (64, 3, 32, 32), SGD, FEEDBACK)
    output, part = 4 * 64 * 16 * 16 * 16, 4 * 8 * 16 * 32 * 32  # of the block after pooling; before it, an eighth
    born = trace.timeline.query("bytes > 0 and phase in ('forward', 'recompute', 'local gradient')")["bytes"]
    assert list(born[born > part]) == [output, output]  # pass 1 and pass 2
    assert (born == part).sum() >= 3 * 8  # the convolution's output in both passes, the signal there


NETWORKS = [("mnist_conv", 100), ("mnist_conv", 96), ("liao_cifar", 100), ("moskovitz_1", 100), ("vgg_16", 32)]


@pytest.mark.parametrize("storage", ["stored", "regenerated"])
@pytest.mark.parametrize(("network", "batch"), NETWORKS)
def test_a_convnet_holds_what_one_block_takes(network, batch, storage):
    """Above rest at most the largest block's input, output, gradient of its weights, and one signal, and 10 %."""
    x = torch.empty(batch, *ml.models.get(network).input_shape, device="meta")
    floor = 0
    for block in ml.models.build(network).to("meta"):
        out = block(x)
        floor = max(floor, 4 * (x.numel() + 2 * out.numel() + sum(p.numel() for p in block.parameters())))
        x = out
    assert ml.experiments.profile("memdfa", network, batch, feedback_kind=storage).peak_bytes <= 1.1 * floor


@pytest.mark.parametrize(
    ("kernel", "features", "batch", "sizes"),
    [
        (3, (16, 32, 32), 37, [5] * 7 + [2]),  # eighths
        (3, (16, 4, 4), 100, [64, 36]),  # 64 KiB of output
        (33, (16, 32, 32), 37, [18, 18, 1]),  # as much output as there are filters
    ],
)
def test_parts_are_eighths_but_for_small_outputs_and_large_filters(kernel, features, batch, sizes):
    layer, h = nn.Conv2d(16, 16, kernel, padding="same"), torch.empty(batch, *features)
    assert [part.stop - part.start for part in by_hand._parts(layer, [nn.ReLU()], h)] == sizes
    assert by_hand._parts(layer, [nn.BatchNorm2d(16)], h) == [slice(0, batch)]


@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
@pytest.mark.parametrize("problem", params(lambda problem: "conv" in problem.name or problem.random))
def test_parts_of_the_batch_give_the_same_updates_in_float64(problem, rule, monkeypatch):
    problem = problem.double()
    whole = train(make(rule, problem, "momentum"), problem)
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)  # batches of 6 and 4 in parts of 1 and more
    assert_close_training(train(make(rule, problem, "momentum"), problem), whole)


class Twice(nn.Sequential):
    """Linear, BatchNorm, tanh, and the same BatchNorm again."""

    def __init__(self) -> None:
        norm = nn.BatchNorm1d(8)
        super().__init__(nn.Linear(8, 8), norm, nn.Tanh(), norm)


@pytest.mark.parametrize("layers", [Twice(), nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(-0.2))])
def test_what_by_hand_would_be_wrong_has_autograds_gradients(layers):
    net = nn.Sequential(*layers, nn.Linear(8, 5)).double()
    made = ml.DFA(net, partial(torch.optim.SGD, lr=1.0))
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.tensor([0, 3, 4, 1, 2, 3])
    _, gradients = surrogate_gradients(made, x, y)
    expected = [p - g for p, g in zip(made.blocks[0].parameters(), gradients[0], strict=True)]
    made.step(x, y)
    assert_close([p.detach() for p in made.blocks[0].parameters()], [p.detach() for p in expected])
