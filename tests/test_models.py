"""The networks by name: sizes as in their source, weights from the seed alone."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import memdfa_lab as ml

VGG_FILTERS = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG_CONVOLUTIONS = sum((9 * a + 1) * b for a, b in pairwise(VGG_FILTERS))

# name -> (blocks, parameters), counted by hand from the source's table
SIZES = {
    "fc_relu": (3, 785 * 100 + 101 * 30 + 31 * 10),
    "fc_sigmoid": (3, 785 * 50 + 51 * 30 + 31 * 10),
    "long_fc": (31, 785 * 500 + 29 * 501 * 500 + 30 * 1000 + 501 * 10),
    "long_fc2": (21, 785 * 500 + 19 * 501 * 500 + 501 * 10),
    "epic_long_fc": (201, 785 * 50 + 199 * 51 * 50 + 200 * 100 + 51 * 10),
    "mnist_conv": (4, 26 * 20 + 501 * 50 + (50 * 7 * 7 + 1) * 500 + 501 * 10),
    "liao_mnist": (4, 26 * 20 + 501 * 50 + (50 * 4 * 4 + 1) * 500 + 501 * 10),
    "liao_cifar": (5, 76 * 32 + 801 * 64 + 1601 * 64 + (64 * 4 * 4 + 1) * 128 + 129 * 10),
    "liao_cifar_bn": (5, 76 * 32 + 801 * 64 + 1601 * 64 + (64 * 4 * 4 + 1) * 128 + 129 * 10 + 2 * (32 + 64 + 64 + 128)),
    "vgg_16": (16, VGG_CONVOLUTIONS + 513 * 4096 + 4097 * 4096 + 4097 * 10),
    "vgg_16_bn": (16, VGG_CONVOLUTIONS + 2 * 4224 + 513 * 4096 + 4097 * 4096 + 4097 * 10),
}


def test_every_network_is_counted_here():
    assert set(SIZES) == set(ml.models.names())


@pytest.mark.parametrize("name", ml.models.names())
def test_a_network_has_the_blocks_and_parameters_of_its_source(name):
    network = ml.models.build(name)
    assert (len(network), sum(p.numel() for p in network.parameters())) == SIZES[name]
    network.eval()
    assert network(torch.zeros(2, *ml.models.get(name).input_shape)).shape == (2, 10)


@pytest.mark.parametrize("name", ml.models.names())
def test_every_network_runs_on_three_channels_of_32_by_32(name):
    assert ml.models.build(name, (3, 32, 32)).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


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


def test_every_setting_names_rules_losses_and_datasets_that_exist():
    for name in ml.models.names():
        setting = ml.models.get(name)
        assert set(setting.lr) == set(ml.RULES)
        assert setting.loss in ml.losses.LOSSES
        assert setting.dataset in ml.datasets.names()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ml.models.build("fc_rely"), "did you mean 'fc_relu'?"),
        (lambda: ml.models.mlp(784, [10], 10, activation="rely"), "unknown activation 'rely'"),
        (lambda: ml.models.mlp(784, [0], 10), "widths must be 1 or more"),
    ],
)
def test_a_network_that_is_not_there_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as problem:
        call()
    assert "\n" not in str(problem.value)
