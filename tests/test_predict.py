"""Predicted equals measured, event for event: for the package's networks, the problems, and whatever a block does."""

from __future__ import annotations

import copy
import gc
import itertools
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from problems import BY_NAME, EVERY_RULE, OPTIMIZERS, STORAGES, Problem, make_rule, params, rotated
from reference import refuses
from test_ledger import STEADY, assert_torch_is_clean, fails
from test_memory import check_account, events, tiny_net
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab.memory import Trace, measure, predict
from memdfa_lab.memory.shapes import ShapesAlone

LARGE = {"epic_long_fc", "mobilenet", "nokland_100x240", "resnet_18", "resnet_34", "resnet_50", "vgg_16", "vgg_16_bn"}


def assert_same_account(predicted: Trace, measured: Trace) -> None:
    assert events(predicted) == events(measured)
    assert predicted.resting_by_category == measured.resting_by_category


@lru_cache(maxsize=1)  # with lr 0 it stays as it is, but for BatchNorm's statistics
def network(name: str) -> nn.Sequential:
    return ml.models.build(name)


NETWORKS = [
    pytest.param(name, id=name, marks=[pytest.mark.slow] * (name in LARGE))
    for name in (*ml.models.names(), "784-[800]x32-10")
]


@rotated("name rule optimizer storage", NETWORKS, EVERY_RULE, STEADY, STORAGES.values(), turns=5, quick=2)
def test_predicted_equals_measured_for_the_packages_networks(name, rule, optimizer, storage):
    shape, loss = ml.models.get(name).input_shape, ml.losses.LOSSES[ml.models.get(name).loss]
    make = STEADY[optimizer]
    learner = EVERY_RULE[rule](network(name), make, loss, storage())
    for batch in (2, 5):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        measured = measure(learner, x, torch.arange(batch), warm_up=1 if batch == 2 else 0)
        assert_same_account(predict(rule, network(name), (batch, *shape), make, storage(), loss_fn=loss), measured)


@rotated("problem rule storage", params(), EVERY_RULE, STORAGES, turns=4)
def test_predicted_equals_measured_for_the_problems(problem, rule, storage):
    if (problem.name, rule) != ("frozen_ends", "last_layer"):  # it cannot train what is frozen
        check_predicted(problem, rule, "adamw", storage)


def check_predicted(problem: Problem, rule: str, optimizer="sgd", storage="stored", **options) -> None:
    """Compare the prediction with the measurement, and both with what is true of every account."""
    make, kind = OPTIMIZERS.get(optimizer, optimizer), STORAGES[storage](seed=3)
    shape = tuple(problem.x.shape)
    predicted = predict(rule, problem.build(), shape, make, kind, loss_fn=problem.loss, **options)
    measured = measure(make_rule(rule, problem, make, kind, **options), problem.x, problem.y, warm_up=1)
    assert_same_account(predicted, measured)
    check_account(measured)


def check_net(make, shape: tuple[int, ...], rules=("bp", "memdfa"), optimizer="sgd", **settings) -> None:
    """Check the prediction for a net that is no problem of the list."""
    for rule in rules:
        check_predicted(Problem("net", make, shape, **settings), rule, optimizer)


@rotated("dtype layout", [torch.float32, torch.float64, torch.bfloat16], [torch.contiguous_format, torch.channels_last])
def test_predicted_equals_measured_in_other_precisions_and_layouts(dtype, layout):
    def make() -> nn.Sequential:
        first = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(4, 6, 3, padding="same", groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5)]
        return nn.Sequential(*first, *second).to(memory_format=layout)

    check_net(make, (3, 8, 8), EVERY_RULE, dtype=dtype)


LOSSES = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"]
LOSSES += ["binary_cross_entropy_with_logits", "binary_cross_entropy"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_predicted_equals_measured_for_torchs_losses(name, reduction):
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        one_hot = torch.zeros_like(logits).scatter_(1, y[:, None], 1)
        output = logits.sigmoid() if name == "binary_cross_entropy" else logits
        return getattr(F, name)(output, one_hot, reduction=reduction)

    check_net(tiny_net, (4,), loss=loss)


class Odd(nn.Module):
    """What prediction must not do from memory, and what looks alike and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        with torch.no_grad():
            other = torch.add(h, 1, out=torch.empty(0))  # resized
            other.resize_(3, 4).resize_(9, 9)
            other.untyped_storage().resize_(0)
            other.set_(torch.ones(7)).set_(torch.ones(9)[:7]).unsqueeze_(0).t_()
            numbers = [torch.full((3,), 1), torch.full((3,), 1.0), torch.full((3,), True), torch.tensor([1.0, 2.0])]
            numbers += [number * 2 for number in numbers] + [number * 2.0 for number in numbers]
            square = torch.ones(3, 3)
            numbers.append(h[:, :2] + torch.tensor([1.0, 2.0]))
            parts = [*h.unsafe_split(2), *h.split(3), (square * 2).contiguous(), (square.t() * 2).contiguous()]
            torch._foreach_add_([square, parts[-1]], 1)
            numbers += torch._foreach_mul([square, parts[-1]], 2.0)
            if h.std() > -1:
                h.new_ones(3).to(torch.float64)
            del other, numbers, square, parts
        return h * 1


@pytest.mark.filterwarnings("ignore:no test has shown")
def test_predicted_equals_measured_whatever_a_block_does():
    check_net(lambda: nn.Sequential(Odd(), Odd(), Odd(), nn.Linear(4, 5)), (4,), EVERY_RULE)


class Attention(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h).view(1, 1, 6, 4)
        return F.scaled_dot_product_attention(h, h, h).view(6, 4)


def test_predicted_equals_measured_for_attention():
    check_net(lambda: nn.Sequential(Attention(4, 4), nn.Linear(4, 5)), (4,))


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.Adam, fused=True),
        partial(torch.optim.SGD, momentum=0.9, foreach=True),
        partial(torch.optim.Adam, foreach=True),
    ],
)
def test_predicted_equals_measured_for_optimizers_of_another_kind(make):
    check_net(tiny_net, (4,), optimizer=make)


class Offset(nn.Linear):
    """A layer with a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.offset = torch.randn(8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(h) + self.offset)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:no test has shown")
@pytest.mark.parametrize("make", [Offset, lambda: nn.utils.weight_norm(nn.Linear(8, 8))])
def test_a_model_that_holds_plain_tensors_is_predicted_and_kept(make):
    """weight_norm's weight is one, too: it is worked out in each forward pass."""
    net, x, y = nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 5)), torch.ones(6, 8), torch.arange(6) % 5
    for keep in (0, 10**6):
        predicted = predict("memdfa", net, (6, 8), keep_bytes=keep)
        measured = measure(ml.MemDFA(net, OPTIMIZERS["sgd"], keep_bytes=keep), x, y, warm_up=1)
        assert predicted.peak_bytes == measured.peak_bytes


# ------------------------------------------------------------------------------------------ what predict is called with


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}])
def test_options_and_steps_and_labels_are_passed_on(options):
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return ((logits - y) ** 2).mean()

    net = BY_NAME["mlp_relu"].build()
    learner = ml.DFA(copy.deepcopy(net), STEADY["sgd"], loss, **options)
    measured = measure(learner, torch.ones(6, 8), torch.ones(6, 5), steps=2, warm_up=1)
    predicted = predict("dfa", net, (6, 8), STEADY["sgd"], loss_fn=loss, y_shape=(6, 5), steps=2, **options)
    assert_same_account(predicted, measured)
    resting = predict("dfa", net, (6, 8), STEADY["sgd"], loss_fn=loss, y_shape=(6, 5), steps=0, **options)
    assert (resting.events, resting.resting_by_category) == ([], measured.resting_by_category)


def test_a_model_and_a_function_and_a_rules_name_and_class_are_the_same():
    model = ml.models.build("fc_relu")
    first = predict("memdfa", model, (4, 1, 28, 28))
    assert_same_account(predict("memdfa", lambda: ml.models.build("fc_relu"), (4, 1, 28, 28)), first)
    assert_same_account(predict(ml.MemDFA, model, (4, 1, 28, 28)), first)


def test_predict_touches_nothing():
    problem, storage = BY_NAME["everything"], ml.feedback.Stored()
    net = problem.build()
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    tensors = {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    for rule in EVERY_RULE:
        predict(rule, net, tuple(problem.x.shape), OPTIMIZERS["adamw"], storage)
    assert torch.equal(torch.get_rng_state(), rng)
    assert storage.matrices == {}
    assert gc.isenabled()
    assert {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()} == tensors
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in net.parameters())
    assert_torch_is_clean()


class InPlace(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).add(h.detach().add_(1))


def test_what_a_rule_refuses_predict_refuses_and_leaves_torch_clean():
    net = nn.Sequential(InPlace(4, 4), InPlace(4, 4), nn.Linear(4, 5))
    for rule in ("dfa", "memdfa"):
        with refuses(RuntimeError, "InPlace works in place on its input"):
            predict(rule, net, (6, 4))
    net = tiny_net()
    net[1].register_forward_pre_hook(fails)
    with refuses(RuntimeError, "in the middle"):
        predict("bp", net, (5, 4))
    assert_torch_is_clean()
    assert torch.ones(2).device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("memdfaa", tiny_net, (6, 4)), ValueError, "did you mean 'memdfa'"),
        (("bp", "fc_relu", (6, 4)), TypeError, "ml.models.build"),
        (("bp", lambda: 3, (6, 4)), TypeError, "got 3"),
        *[(("bp", tiny_net, shape), ValueError, "x_shape must be") for shape in ((), 6, None)],
        *[(("bp", tiny_net, shape), ValueError, "a size in x_shape") for shape in ((0, 4), (6, 4.0))],
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments, error, hint):
    with refuses(error, hint):
        predict(*arguments)


def test_a_loss_of_another_y_than_labels_wants_its_shape():
    with refuses(ValueError, "the loss does not take", "say its y_shape"):
        predict("bp", tiny_net, (6, 4), loss_fn=F.binary_cross_entropy_with_logits)
    assert predict("bp", tiny_net, (6, 4), loss_fn=F.binary_cross_entropy_with_logits, y_shape=(6, 5)).peak_bytes > 0


@pytest.mark.parametrize("steps", [0, 1])
def test_what_depends_on_a_value_is_refused_in_a_line(steps):
    with refuses(ValueError, "depends on a value", "measure"):
        predict("memdfa", tiny_net, (6, 4), torch.optim.NAdam, steps=steps)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)

    def forward(self, t: Tensor) -> Tensor:
        return self.embedding(t).mean(1)


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_whole_numbers_are_predicted_as_measured(rule):
    net = nn.Sequential(Words(), nn.Linear(12, 5))
    words = torch.arange(42).view(6, 7) % 30
    predicted = predict(rule, net, (6, 7), x_dtype=torch.long)
    assert events(predicted) == events(
        measure(EVERY_RULE[rule](net, OPTIMIZERS["sgd"]), words, torch.arange(6) % 5, warm_up=1)
    )
    with refuses(ValueError, "does not take floats", "x_dtype=torch.long"):
        predict(rule, net, (6, 7))


# ----------------------------------------------------------------------------------------- large, many, side by side


@pytest.mark.slow
def test_a_network_too_large_for_any_machine():
    width, depth, batch = 16384, 1000, 4096
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make = partial(ml.models.mlp, width, [width] * depth, 10)
    trace = predict("memdfa", make, (batch, width), STEADY["sgd"], ml.feedback.Regenerated())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB: the events and the modules
    P = depth * width * (width + 1) + 10 * (width + 1)
    assert trace.resting_by_category["parameters"] == 4 * P > 10**12
    assert trace.peak_bytes < 2**30


def test_what_predictions_remember_is_bounded(monkeypatch):
    module, net = sys.modules["memdfa_lab.memory.shapes"], ml.models.build("fc_relu")
    monkeypatch.setattr(module, "MOST_SEEN", 50)
    monkeypatch.setattr(module.ShapesAlone, "seen", {})
    expected = [predict("bp", net, (batch, 1, 28, 28)).peak_bytes for batch in (3, 4)]
    for batch, peak in zip((3, 4) * 2, expected * 2, strict=True):
        assert predict("bp", net, (batch, 1, 28, 28)).peak_bytes == peak
        assert 0 < len(module.ShapesAlone.seen) <= 50


def test_predictions_in_several_threads_are_each_right_and_leave_nothing_patched():
    def peak(width: int) -> int:
        return predict("memdfa", lambda: ml.models.mlp(20, [width] * 3, 4), (8, 20)).peak_bytes

    expected, interval = list(map(peak, range(3, 43))), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(peak, range(3, 43))) == expected
    finally:
        sys.setswitchinterval(interval)
    assert_torch_is_clean()


# Layouts: where images have one channel or one pixel, they lie with channels first and last at once

LAYOUTS = {
    "batchnorm": lambda channels: nn.BatchNorm2d(channels),
    "batchnorm in eval mode": lambda channels: nn.BatchNorm2d(channels).eval(),
    "groupnorm": lambda channels: nn.GroupNorm(1, channels),
    "relu": lambda channels: nn.ReLU(),
    "hardswish": lambda channels: nn.Hardswish(),
    "elu": lambda channels: nn.ELU(),
    "leaky relu": lambda channels: nn.LeakyReLU(),
    "softplus": lambda channels: nn.Softplus(),
    "prelu": lambda channels: nn.PReLU(channels),
    "softmax": lambda channels: nn.Softmax(1),
    "max pool": lambda channels: nn.MaxPool2d(3, 1, 1),
    "adaptive pool": lambda channels: nn.AdaptiveAvgPool2d(1),
    "convolution": lambda channels: nn.Conv2d(channels, 5, 3, padding=1),
    "convolution of one pixel": lambda channels: nn.Conv2d(channels, 5, 1),
    "transposed": lambda channels: nn.ConvTranspose2d(channels, 5, 3, padding=1),
    "upsample": lambda channels: nn.Upsample(scale_factor=2),
}
FORMATS = torch.contiguous_format, torch.channels_last


SIZES = [(3, 4, 1, 1), (3, 1, 2, 2), (1, 4, 1, 1), (3, 1, 1, 1), (3, 4, 2, 2)]
NO_VARIANCE = ("batchnorm", (1, 4, 1, 1))  # which BatchNorm refuses


@pytest.mark.parametrize(("name", "shape"), [pair for pair in itertools.product(LAYOUTS, SIZES) if pair != NO_VARIANCE])
def test_outputs_and_gradients_have_the_strides_of_the_cpu(name, shape):
    def laid_out(shape, layout, make):
        n, c, h, w = shape
        strides = (c * h * w, h * w, w, 1) if layout is torch.contiguous_format else (h * w * c, 1, w * c, c)
        return make(n * c * h * w).as_strided(shape, strides)

    def run(make, layout, of_error):
        net = LAYOUTS[name](shape[1])
        x = laid_out(shape, layout, make).requires_grad_()
        out = net(x)
        gradients = torch.autograd.grad(out, [x, *net.parameters()], laid_out(out.shape, of_error, make))
        return [tensor.stride() for tensor in (out, *gradients)]

    for layout, of_error in itertools.product(FORMATS, FORMATS):
        expected = run(torch.randn, layout, of_error)
        with ShapesAlone():
            assert run(torch.empty, layout, of_error) == expected, (layout, of_error)


@pytest.mark.parametrize("size", [8, 1])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_whose_bias_alone_is_trained_is_predicted_event_for_event(layer, size):
    first, second = nn.Conv2d(3, 4, 3, padding=1), layer(4, 5, 3, padding=1)
    second.weight.requires_grad_(False)
    net = nn.Sequential(first, nn.Sequential(second, nn.ReLU(), nn.Flatten()), nn.Linear(5 * size**2, 3))
    x, y = torch.randn(6, 3, size, size), torch.arange(6) % 3
    for rule in (ml.BP, ml.MemDFA):
        learner = rule(copy.deepcopy(net), STEADY["sgd"], feedback=ml.feedback.Stored(1))
        measured = measure(learner, x, y, warm_up=1)
        assert_same_account(predict(rule, net, tuple(x.shape), STEADY["sgd"], ml.feedback.Stored(1)), measured)


def test_a_model_whose_images_shrink_to_one_pixel_is_predicted_to_the_byte():
    model = torchvision.models.resnet18(num_classes=10)
    shape = (6, 3, 32, 32)
    for rule in (ml.BP, ml.DFA, ml.MemDFA):
        learner = rule(copy.deepcopy(model), STEADY["sgd"], feedback=ml.feedback.Regenerated(1))
        measured = measure(learner, torch.randn(shape), torch.arange(6) % 10, warm_up=1)
        predicted = predict(rule, copy.deepcopy(model), shape, STEADY["sgd"], ml.feedback.Regenerated(1))
        assert predicted.peak_bytes == measured.peak_bytes, rule
