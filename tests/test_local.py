"""The local gradient by hand against the one by autograd, and what each holds."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from problems import make_rule, params, rotated, train
from reference import assert_close_training
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core import by_hand
from memdfa_lab.core.local import ByAutograd, block_gradient
from memdfa_lab.core.signal import Signal
from memdfa_lab.memory import predict

SGD = partial(torch.optim.SGD, lr=0.01)
FEEDBACK = ml.feedback.Regenerated(1)


@rotated("problem rule", params(), ["dfa", "memdfa"])
def test_both_ways_give_the_same_updates_in_float32(problem, rule, monkeypatch):
    """In float64, where kernels differ, test_rules.py compares with autograd."""
    ours = train(make_rule(rule, problem), problem, steps=1)
    monkeypatch.setattr(by_hand, "block_gradient", lambda *given: None)
    by_autograd = train(make_rule(rule, problem), problem, steps=1)
    for one, other in zip(ours.tensors, by_autograd.tensors, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, other.abs().max().item())


@rotated("problem rule", params(lambda problem: "conv" in problem.name or problem.random), ["dfa", "memdfa"])
def test_parts_of_the_batch_give_the_same_updates(problem, rule, monkeypatch):
    problem = problem.double()
    at_once = train(make_rule(rule, problem, "momentum"), problem)
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)  # batches of 6 and 4 in parts of 1 and more
    assert_close_training(train(make_rule(rule, problem, "momentum"), problem), at_once)


CONV = (3, 8, 8)
BY_HAND = {  # what is in none of the problems
    "in-place relu": (lambda: [nn.Linear(12, 40), nn.ReLU(inplace=True)], (12,)),
    "leaky relu": (lambda: [nn.Linear(12, 40), nn.LeakyReLU(0.2)], (12,)),
    "gelu": (lambda: [nn.Linear(12, 40), nn.GELU()], (12,)),
    "gelu by tanh": (lambda: [nn.Linear(12, 40), nn.GELU("tanh")], (12,)),
    "flatten first": (lambda: [nn.Flatten(), nn.Linear(192, 40), nn.ReLU()], CONV),
    "batch norm behind": (lambda: [nn.Linear(12, 40), nn.ReLU(), nn.BatchNorm1d(40)], (12,)),
    "batch norm without weights": (lambda: [nn.Linear(12, 40), nn.BatchNorm1d(40, affine=False), nn.Tanh()], (12,)),
    "batch norm of the batch": (lambda: [nn.Linear(12, 40), nn.BatchNorm1d(40, track_running_stats=False)], (12,)),
    "two activations": (lambda: [nn.Linear(12, 40), nn.Tanh(), nn.Sigmoid()], (12,)),
    "activation, view, activation": (lambda: [nn.Linear(12, 40), nn.Tanh(), nn.Identity(), nn.ReLU()], (12,)),
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
def test_a_block_ourshas_autograds_gradients(name, kept, monkeypatch):
    monkeypatch.setattr(by_hand, "SMALL_BYTES", 1)  # convolutions run in parts of one example and more
    layers, features = BY_HAND[name]
    torch.manual_seed(0)
    block, x = nn.Sequential(*layers()).double(), torch.randn(6, *features).double()
    before, other = x.clone(), copy.deepcopy(block)
    expected, ours = ByAutograd(other, x, nullcontext()), block_gradient(block, x)
    assert isinstance(ours, by_hand.ByHand)
    if kept:
        ours.forward()
    gradients = []
    for way, net in ((expected, other), (ours, block)):
        way.learn(Signal(0, torch.linspace(-1, 1, 60).view(6, 10).double(), FEEDBACK))
        gradients.append([p.grad for p in net.parameters()])
    assert torch.equal(ours.out, expected.out)
    assert all(map(torch.equal, block.buffers(), other.buffers()))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)
    assert torch.equal(x, before)


class Twice(nn.Sequential):
    """Linear, BatchNorm, tanh, and the same BatchNorm again."""

    def __init__(self) -> None:
        norm = nn.BatchNorm1d(40)
        super().__init__(nn.Linear(12, 40), norm, nn.Tanh(), norm)


@pytest.mark.parametrize(
    ("layers", "features"),
    [
        ([nn.Linear(12, 40), nn.Dropout()], (12,)),
        ([nn.Linear(12, 40), nn.LayerNorm(40)], (12,)),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(12, 40))], (12,)),
        ([nn.Linear(12, 40)], (3, 12)),  # on tokens
        ([nn.Linear(12, 40), nn.LeakyReLU(-0.2)], (12,)),  # the slope does not follow from the output
        (list(Twice()), (12,)),  # one norm, two gradients
        ([nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular")], CONV),
        ([nn.Conv2d(3, 5, 2, padding="same")], CONV),
        ([nn.ConvTranspose2d(3, 5, 2)], CONV),
    ],
)
def test_any_other_block_is_left_to_autograd(layers, features):
    assert isinstance(block_gradient(nn.Sequential(*layers), torch.randn(6, *features)), ByAutograd)


def test_any_block_is_left_to_autograd_under_autocast_and_hooks_on_all_modules():
    block, h = nn.Sequential(nn.Linear(12, 40), nn.ReLU()), torch.randn(6, 12)
    assert isinstance(block_gradient(block, h), by_hand.ByHand)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(block_gradient(block, h), ByAutograd)
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert isinstance(block_gradient(block, h), ByAutograd)
    handle.remove()


def test_batch_norm_by_hand_refuses_what_torch_refuses():
    """One value a channel has no variance; another number of dimensions is a mistake."""
    for norm, h in ((nn.BatchNorm1d(4), torch.ones(1, 3)), (nn.BatchNorm2d(4), torch.ones(2, 3))):
        block = nn.Sequential(nn.Linear(3, 4), norm)
        for run in (block, lambda h, block=block: block_gradient(block, h).forward()):
            with pytest.raises(ValueError, match=r"(?i)expected more than 1 value|more than one value|expected 4D"):
                run(h)


# -------------------------------------------------------------------------------------- hooks, and SGD done in place


def small() -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    """Return a net of two dense blocks, and a batch."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return net, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_hooks_on_a_layer_and_on_a_weight_are_not_passed_over(rule):
    (net, batch), calls = small(), []
    net[1].register_forward_hook(lambda *given: calls.append("layer"))
    net[0].weight.register_hook(lambda gradient: calls.append("gradient"))
    net[0].weight.register_post_accumulate_grad_hook(lambda weight: calls.append("weight"))
    learner = ml.RULES[rule](net, SGD)
    learner.rehearse(*batch)
    calls.clear()
    learner.step(*batch)
    assert calls == ["layer"] * (1 + (rule == "memdfa")) + ["gradient", "weight"]


IN_PLACE = [{}, {"foreach": True}]
BY_THE_OPTIMIZER = [{"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}]


@pytest.mark.parametrize("settings", [*IN_PLACE, *BY_THE_OPTIMIZER])
def test_only_plain_sgd_needs_no_memory_for_the_gradient(settings):
    trace = predict("memdfa", lambda: ml.models.mlp(64, [64], 10), (2, 64), partial(SGD, **settings), FEEDBACK)
    gradients = trace.timeline.query("category == 'gradients' and bytes > 0")["bytes"]
    assert bool(gradients.max() == 4 * 64 * 64) == (settings in BY_THE_OPTIMIZER)


def test_hooks_around_the_optimizers_step_see_the_gradient():
    (net, batch), seen = small(), []
    learner = ml.MemDFA(net, SGD)
    learner.optimizers[0].register_step_pre_hook(lambda optimizer, *given: seen.append(net[0].weight.grad.shape))
    learner.step(*batch)
    assert seen == [(8, 4)]


def test_a_learning_rate_for_each_parameter_is_respected():
    net, batch = small()

    def two_rates(parameters):
        weight, bias = parameters
        return torch.optim.SGD([{"params": [weight], "lr": 0.0}, {"params": [bias], "lr": 0.5}], lr=0.1)

    rule, before = ml.MemDFA(net, two_rates), copy.deepcopy(net)
    rule.step(*batch)
    changed = [not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True)]
    assert changed == [False, True, False, True]


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("width", "batch"), [(800, 128), (256, 2048)])
def test_memdfa_has_two_activations_and_a_quarter_of_a_signal_in_memory(width, batch):
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


def test_a_quarter_of_a_regenerated_matrix_is_drawn_at_a_time():
    trace = predict("memdfa", lambda: ml.models.mlp(64, [512] * 2, 10), (256, 64), SGD, FEEDBACK)
    assert trace.timeline.query("category == 'feedback'")["bytes"].max() == 4 * 128 * 10


def test_what_lies_between_input_and_output_is_there_for_an_eighth_of_the_batch():
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    trace = predict("memdfa", nn.Sequential(*first, nn.Linear(4096, 10)), (64, 3, 32, 32), SGD, FEEDBACK)
    output, part = 4 * 64 * 16 * 16 * 16, 4 * 8 * 16 * 32 * 32  # of the block after pooling; before it, an eighth
    born = trace.timeline.query("bytes > 0 and phase in ('forward', 'recompute', 'local gradient')")["bytes"]
    assert list(born[born > part]) == [output, output]  # pass 1 and pass 2
    assert (born == part).sum() >= 3 * 8  # the convolution's output in both passes, the signal there


NETWORKS = [("mnist_conv", 100), ("mnist_conv", 96), ("liao_cifar", 100), ("moskovitz_1", 100), ("vgg_16", 32)]


@rotated("network storage", NETWORKS, ["stored", "regenerated"])
def test_a_convnet_takes_what_one_block_takes(network, storage):
    """At most the largest block's input, output, gradient of its weights, and one signal, and 10 %."""
    network, batch = network
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
        (3, (16, 8, 8), 100, [25] * 4),  # quarters: eighths would put out less than 256 KiB
        (3, (16, 4, 4), 100, [64, 36]),  # 64 KiB of output
        (33, (16, 32, 32), 37, [18, 18, 1]),  # as much output as there are filters
    ],
)
def test_parts_are_eighths_but_for_small_outputs_and_large_filters(kernel, features, batch, sizes, monkeypatch):
    run, ran = by_hand.run, []
    monkeypatch.setattr(by_hand, "run", lambda layers, h, *more: ran.append(len(h)) or run(layers, h, *more))
    with torch.device("meta"):
        block, h = nn.Sequential(nn.Conv2d(16, 16, kernel, padding="same"), nn.ReLU()), torch.empty(batch, *features)
        block_gradient(block, h).forward()
        block_gradient(nn.Sequential(*block, nn.BatchNorm2d(16)), h).forward()  # which mixes the examples
    assert ran == [*sizes, batch]
