"""The networks by name: sizes as in their source, weights from the seed alone, settings as their table says."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50

import memdfa_lab as ml
from memdfa_lab.lab.models import NETWORKS

VGG_FILTERS = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG_CONVOLUTIONS = sum((9 * a + 1) * b for a, b in pairwise(VGG_FILTERS))

MOSKOVITZ_CONVOLUTIONS = 28 * 96 + 2 * 865 * 96 + 865 * 192 + 3 * 1729 * 192 + 193 * 192 + 193 * 10
MOBILENET_CHANNELS = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
MOBILENET_UNITS = sum(9 * a + 2 * a + a * b + 2 * b for a, b in pairwise(MOBILENET_CHANNELS))


def resnet(make) -> int:
    """Count torchvision's own network, with 3x3 filters in place of the first 7x7 ones."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(num_classes=10).parameters()) - (49 - 9) * 3 * 64


# name -> (blocks, parameters), counted by hand from the source's table
SIZES = {
    "fc_relu": (3, 785 * 100 + 101 * 30 + 31 * 10),
    "fc_sigmoid": (3, 785 * 50 + 51 * 30 + 31 * 10),
    "long_fc": (31, 785 * 500 + 29 * 501 * 500 + 30 * 1000 + 501 * 10),
    "long_fc2": (21, 785 * 500 + 19 * 501 * 500 + 501 * 10),
    "epic_long_fc": (201, 785 * 50 + 199 * 51 * 50 + 200 * 100 + 51 * 10),
    "long_conv": (31, 26 * 5 + 29 * 126 * 5 + 30 * 10 + (5 * 28 * 28 + 1) * 10),
    "mnist_conv": (4, 26 * 20 + 501 * 50 + (50 * 7 * 7 + 1) * 500 + 501 * 10),
    "liao_mnist": (4, 26 * 20 + 501 * 50 + (50 * 4 * 4 + 1) * 500 + 501 * 10),
    "liao_cifar": (5, 76 * 32 + 801 * 64 + 1601 * 64 + (64 * 4 * 4 + 1) * 128 + 129 * 10),
    "liao_cifar_bn": (5, 76 * 32 + 801 * 64 + 1601 * 64 + (64 * 4 * 4 + 1) * 128 + 129 * 10 + 2 * (32 + 64 + 64 + 128)),
    "moskovitz_1": (4, 76 * 64 + 1601 * 64 + (64 * 8 * 8 + 1) * 192 + 193 * 10),
    "moskovitz_2": (9, MOSKOVITZ_CONVOLUTIONS),
    "vgg_16": (16, VGG_CONVOLUTIONS + 513 * 4096 + 4097 * 4096 + 4097 * 10),
    "vgg_16_bn": (16, VGG_CONVOLUTIONS + 2 * 4224 + 513 * 4096 + 4097 * 4096 + 4097 * 10),
    "resnet_18": (1 + 8 + 1, resnet(resnet18)),
    "resnet_34": (1 + 16 + 1, resnet(resnet34)),
    "resnet_50": (1 + 16 + 1, resnet(resnet50)),
    "mobilenet": (1 + 2 * 13 + 1, 27 * 32 + 2 * 32 + MOBILENET_UNITS + 1025 * 10),
    "nokland_2x800": (3, 785 * 800 + 801 * 800 + 801 * 10),
    "nokland_7x240": (8, 785 * 240 + 6 * 241 * 240 + 241 * 10),
    "nokland_100x240": (101, 785 * 240 + 99 * 241 * 240 + 241 * 10),
    "nokland_conv": (6, 76 * 96 + 2401 * 128 + 3201 * 256 + (256 * 3 * 3 + 1) * 2048 + 2049 * 2048 + 2049 * 10),
    "lenet": (5, 28 * 32 + 289 * 64 + 577 * 128 + 129 * 256 + 257 * 10),
    "lenet_mnist": (5, 26 * 6 + 151 * 16 + 401 * 120 + 121 * 84 + 85 * 10),
}


def test_every_network_is_counted_here_and_set_in_the_table():
    assert list(SIZES) == ml.models.names() == list(NETWORKS) == list(ml.models.table()["network"])


@pytest.mark.parametrize("name", ml.models.names())
def test_a_network_has_the_blocks_and_parameters_of_its_source(name):
    with torch.device("meta"):
        network = ml.models.build(name)
    assert (len(network), sum(p.numel() for p in network.parameters())) == SIZES[name]


@pytest.mark.parametrize("name", ml.models.names())
def test_every_network_runs_on_digits_and_on_cifar_10(name):
    for shape in (ml.models.get(name).input_shape, (3, 32, 32)):
        with torch.device("meta"):
            assert ml.models.build(name, shape)(torch.empty(2, *shape)).shape == (2, 10)


def test_digits_come_in_the_shape_that_a_network_takes():
    for shape in {ml.models.get(name).input_shape: name for name in ml.models.names()}.items():
        assert ml.experiments.load_for(shape[1], "mnist5k").input_shape == shape[0]


@pytest.mark.parametrize("name", ml.models.names())
def test_dfa_and_mem_dfa_make_the_same_weights_of_every_network(name):
    data = SimpleNamespace(input_shape=ml.models.get(name).input_shape, classes=10)
    ends = []
    for rule in ("dfa", "memdfa"):
        made = ml.experiments.make_rule(rule, name, data)
        before = [p.detach().clone() for p in made.blocks.parameters()]
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            made.step(torch.randn(2, *data.input_shape, generator=generator), torch.tensor([3, 7]))
        ends.append(made.blocks.state_dict())
        assert any(not torch.equal(a, b) for a, b in zip(before, made.blocks.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def test_a_residual_unit_is_one_block_and_a_depthwise_pair_is_two():
    resnet, mobilenet = (ml.models.sizes(name)["layers"].tolist() for name in ("resnet_18", "mobilenet"))
    assert resnet[1:-2] == ["BasicBlock"] * 7
    assert resnet[-2:] == ["BasicBlock, AdaptiveAvgPool2d, Flatten", "Linear"]
    assert mobilenet[1:3] == ["Conv2d, BatchNorm2d, ReLU"] * 2
    depthwise, pointwise = (block[0] for block in list(ml.models.build("mobilenet"))[1:3])
    assert (depthwise.groups, depthwise.kernel_size, pointwise.groups, pointwise.kernel_size) == (32, (3, 3), 1, (1, 1))


def test_sizes_are_those_of_each_blocks_output_and_feedback():
    table = ml.models.sizes("liao_cifar")
    assert table["block"].tolist() == [1, 2, 3, 4, 5]
    assert table["output"].tolist() == [(32, 16, 16), (64, 8, 8), (1024,), (128,), (10,)]
    assert table["outputs"].tolist() == [8192, 4096, 1024, 128, 10]
    assert table["feedback"].tolist() == [81920, 40960, 10240, 1280, 0]
    assert table["parameters"].sum() == SIZES["liao_cifar"][1]
    assert ml.models.sizes("liao_cifar", (1, 28, 28))["output"][0] == (32, 14, 14)


def test_an_mlp_is_spelt_by_its_widths():
    network = ml.models.build("784-[80]x3-10")
    assert [p.shape[0] for p in network.parameters() if p.dim() == 2] == [80, 80, 80, 10]
    assert network(torch.zeros(2, 784)).shape == (2, 10)


def test_weights_come_from_the_seed_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    one, same, other = (ml.models.build("fc_relu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0][1].weight, same[0][1].weight)
    assert not torch.equal(one[0][1].weight, other[0][1].weight)


def test_weights_are_he_normal_and_biases_zero():
    layer = ml.models.mlp(1000, [1000], 10)[0][1]
    assert layer.weight.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.01)
    assert not layer.bias.any()


def test_same_pooling_gives_tensorflows_sizes_and_counts_only_the_inside():
    # TensorFlow's SAME average pool 3/2 over 4 pixels: windows {0, 1, 2} and {2, 3}.
    pool = ml.models.build("liao_cifar")[1][1]
    assert isinstance(pool, nn.AvgPool2d)
    row = torch.tensor([1.0, 2.0, 3.0, 7.0]).repeat(4, 1)[None, None]
    assert pool(row)[0, 0].tolist() == [[2.0, 5.0], [2.0, 5.0]]


# name -> learning rate of BP, of the others, batch size, epochs, as the source says
SOURCE = {
    "fc_relu": (0.01, 0.01, 10, 20),
    "fc_sigmoid": (0.05, 0.05, 10, 30),
    "mnist_conv": (0.005, 0.005, 100, 150),
    "liao_mnist": (0.005, 0.005, 100, 150),
    "liao_cifar": (0.001, 1e-5, 100, 100),
    "liao_cifar_bn": (0.001, 1e-5, 100, 100),
    "vgg_16": (0.001, 5e-6, 100, 80),
    "vgg_16_bn": (0.001, 5e-6, 100, 80),
    "nokland_2x800": (1e-4, 1e-4, 64, 300),
    "nokland_7x240": (1e-4, 1e-4, 64, 300),
    "nokland_100x240": (1e-4, 1e-4, 64, 300),
    "nokland_conv": (5e-5, 5e-5, 64, 300),
    "lenet": (1e-3, 1e-4, 128, 250),
}


def test_settings_are_the_sources_unless_they_are_said_to_be_ours():
    for name in ml.models.names():
        setting = ml.models.get(name)
        if {"lr", "epochs"} & set(setting.ours):
            assert name not in SOURCE
        else:
            ours = (setting.lr["bp"], setting.lr["dfa"], setting.batch_size, setting.epochs)
            assert (name, ours) == (name, SOURCE[name])
        assert setting.lr["fa"] == setting.lr["memdfa"] == setting.lr["dfa"]


def test_every_setting_names_what_exists():
    columns = set(ml.models.table())
    for name in ml.models.names():
        setting = ml.models.get(name)
        assert set(setting.lr) == set(setting.initialisation) == set(ml.RULES)
        assert setting.optimizer in ml.experiments.OPTIMIZERS
        assert setting.loss in ml.losses.LOSSES
        assert setting.dataset in ml.datasets.names()
        assert setting.distribution in ml.feedback.DISTRIBUTIONS
        assert set(setting.initialisation.values()) <= set(ml.models.INITIALISATIONS)
        assert set(setting.ours) <= columns
        assert setting.source


def test_a_rule_is_made_with_the_networks_own_settings_and_each_can_be_overridden():
    data = SimpleNamespace(input_shape=(1, 28, 28), classes=10)
    bp, dfa = (ml.experiments.make_rule(rule, "nokland_2x800", data) for rule in ("bp", "dfa"))
    assert type(dfa.optimizers[0]) is torch.optim.RMSprop
    assert dfa.optimizers[0].defaults["lr"] == 1e-4
    assert dfa.loss_fn is ml.losses.bce
    assert dfa.feedback.distribution == "uniform"
    assert not any(p.any() for p in dfa.blocks.parameters())
    assert all(p.any() for p in bp.blocks.parameters())

    data.input_shape = (3, 32, 32)
    lenet = ml.experiments.make_rule("fa", "lenet", data)
    assert type(lenet.optimizers[0]) is torch.optim.Adam
    assert (lenet.optimizers[0].defaults["lr"], lenet.optimizers[0].defaults["weight_decay"]) == (1e-4, 1e-4)

    options = {"optimizer": "momentum", "lr": 0.5, "weight_decay": 0.25, "loss": "mse", "distribution": "normal"}
    other = ml.experiments.make_rule("dfa", "lenet", data, initialisation="zero", **options)
    assert other.optimizers[0].defaults.items() >= {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.25}.items()
    assert (other.loss_fn, other.feedback.distribution) == (ml.losses.mse, "normal")
    assert not any(p.any() for p in other.blocks.parameters())


@pytest.mark.parametrize(
    ("how", "deviation", "bound"),
    [
        ("he_normal", (2 / 800) ** 0.5, None),
        ("uniform", (1 / 3 / 800) ** 0.5, (1 / 800) ** 0.5),
        ("xavier_uniform", (2 / 1600) ** 0.5, (6 / 1600) ** 0.5),
        ("zero", 0.0, 0.0),
    ],
)
def test_initialisations_have_the_spread_of_their_name(how, deviation, bound):
    layer = ml.models.build("nokland_2x800", initialisation=how)[1][0]
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.01)
    if bound is not None:
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert layer.bias.any() == (how == "uniform")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ml.models.build("fc_rely"), "did you mean 'fc_relu'?"),
        (lambda: ml.models.build("fc_relu", initialisation="he_norm"), "did you mean 'he_normal'?"),
        (lambda: ml.models.mlp(784, [10], 10, activation="rely"), "unknown activation 'rely'"),
        (lambda: ml.models.mlp(784, [0], 10), "must be a whole number from 1 on"),
    ],
)
def test_a_network_that_is_not_there_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as problem:
        call()
    assert "\n" not in str(problem.value)
