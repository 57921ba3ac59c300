"""The networks by name: sizes as in their source, weights from the seed alone, settings as their table says."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from reference import assert_identical, refuses
from torchvision.models import resnet18, resnet34, resnet50

import memdfa_lab as ml
from memdfa_lab.cli import main
from memdfa_lab.lab.settings import RunSettings

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


LARGE = {name for name, (_, parameters) in SIZES.items() if parameters > 1e7}
every_network = pytest.mark.parametrize("name", SIZES)


def test_every_network_is_counted_here_and_set_in_the_table():
    assert list(SIZES) == ml.models.names() == list(ml.models.table()["network"])


@every_network
def test_a_network_has_the_size_of_its_source_and_takes_digits_and_cifar_10(name):
    own = ml.models.get(name).input_shape
    with torch.device("meta"):
        networks = {shape: ml.models.build(name, shape) for shape in (own, (3, 32, 32))}
        for shape, network in networks.items():
            assert network(torch.empty(2, *shape)).shape == (2, 10)
    assert (len(networks[own]), sum(p.numel() for p in networks[own].parameters())) == SIZES[name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in SIZES])
def test_dfa_and_mem_dfa_train_every_network_to_the_same_weights(name):
    shape, ends = ml.models.get(name).input_shape, []
    for rule in ("dfa", "memdfa"):
        learner = ml.experiments.make_rule(rule, name, SimpleNamespace(input_shape=shape, classes=10))
        before = [p.detach().clone() for p in learner.blocks.parameters()]
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            learner.step(torch.randn(2, *shape, generator=generator), torch.tensor([3, 7]))
        ends.append(dict(learner.blocks.state_dict()))
        assert any(not torch.equal(a, b) for a, b in zip(before, learner.blocks.parameters(), strict=True))
    assert_identical(*ends)


def test_sizes_are_those_of_each_blocks_layers_output_and_feedback():
    table = ml.models.sizes("liao_cifar")
    assert table["block"].tolist() == [1, 2, 3, 4, 5]
    assert table["output"].tolist() == [(32, 16, 16), (64, 8, 8), (1024,), (128,), (10,)]
    assert table["outputs"].tolist() == [8192, 4096, 1024, 128, 10]
    assert table["feedback"].tolist() == [81920, 40960, 10240, 1280, 0]
    assert table["parameters"].sum() == SIZES["liao_cifar"][1]
    assert ml.models.sizes("liao_cifar", (1, 28, 28))["output"][0] == (32, 14, 14)
    resnet, mobilenet = (ml.models.sizes(name)["layers"].tolist() for name in ("resnet_18", "mobilenet"))
    assert resnet[1:] == ["BasicBlock"] * 7 + ["BasicBlock, AdaptiveAvgPool2d, Flatten", "Linear"]  # a unit is a block
    assert mobilenet[1:3] == ["Conv2d, BatchNorm2d, ReLU"] * 2  # a depthwise pair is two


def test_digits_come_in_the_shape_that_a_network_takes():
    for name in ("mnist_conv", "liao_cifar", "lenet_mnist"):
        assert ml.experiments.load_for(name, "mnist5k").input_shape == ml.models.get(name).input_shape
    data = ml.experiments.load_for("784-[16]x2-10", "mnist5k")  # it flattens them
    assert data.input_shape == (1, 28, 28)
    learner = ml.experiments.make_rule("memdfa", "784-[16]x2-10", data)
    assert [p.shape for p in learner.blocks.parameters() if p.dim() == 2] == [(16, 784), (16, 16), (10, 16)]
    assert learner.step(data.x_train[:5], data.y_train[:5]).isfinite()


def test_mlps_and_convnets_are_made_of_what_is_asked_for():
    mlp = ml.models.mlp(8, [7, 6], 5, activation="tanh", batch_norm=True, output="sigmoid")
    convnet = ml.models.convnet((2, 6, 5), [3, 4], 5, activation="gelu", batch_norm=True)
    layers = [[type(part).__name__ for part in net.modules() if not list(part.children())] for net in (mlp, convnet)]
    assert layers[0] == ["Flatten", *["Linear", "BatchNorm1d", "Tanh"] * 2, "Linear", "Sigmoid"]
    assert layers[1] == [*["Conv2d", "BatchNorm2d", "GELU"] * 2, "Flatten", "Linear"]
    shapes = [[tuple(p.shape) for p in net.parameters() if p.dim() > 1] for net in (mlp, convnet)]
    assert shapes == [[(7, 8), (6, 7), (5, 6)], [(3, 2, 3, 3), (4, 3, 3, 3), (5, 120)]]


def test_weights_come_from_the_seed_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    one, same, other = (ml.models.build("fc_relu", seed=seed)[0][1].weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("how", "deviation", "bound"),
    [
        ("he_normal", (2 / 800) ** 0.5, None),
        ("uniform", (1 / 3 / 800) ** 0.5, (1 / 800) ** 0.5),
        ("xavier_uniform", (2 / 1600) ** 0.5, (6 / 1600) ** 0.5),
        ("zero", 0.0, 0.0),
        ("orthogonal", 1.05 * (1 / 800) ** 0.5, None),
    ],
)
def test_initialisations_have_the_spread_of_their_name(how, deviation, bound):
    layer = ml.models.build("nokland_2x800", initialisation=how)[1][0]
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.01)
    if bound is not None:
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert layer.bias.any() == (how == "uniform")


TEXT = "conv3x3(4) maxpool2/2 [6 tanh dropout0.5]x2 classes"


def test_a_network_is_written_as_text_wherever_its_name_is_taken(capsys, monkeypatch, tmp_path):
    data = ml.datasets.load("mnist5k").subset(20, 10)
    made = ml.experiments.make_rule("memdfa", TEXT, data).blocks
    assert_identical(made.state_dict(), ml.models.from_layers(TEXT, (1, 28, 28), 10).state_dict())
    assert ml.models.sizes(f"{TEXT}@3x8x8")["output"].tolist() == [(64,), (6,), (6,), (10,)]
    assert ml.experiments.profile("memdfa", f"{TEXT}@1x28x28", 5).peak_bytes > 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ml.experiments, "load_for", lambda *_: data)
    assert main(["train", "--network", TEXT, "--epochs", "1"]) == 0
    assert [path.name for path in (tmp_path / "reports" / "runs").iterdir()] == [
        f"{TEXT.replace('/', '_')}-{data.name}-seed0"
    ]
    for text, message in {
        TEXT: "@3x32x32, with its own shape",
        "nonsense here": "'nonsense' is not a part of a network",
        f"{TEXT}@3y2": "a shape is written as in 3x224x224",
    }.items():
        with refuses(ValueError, message):
            ml.experiments.profile("memdfa", text, 5)


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


@every_network
def test_settings_exist_and_are_the_sources_unless_they_are_marked_as_ours(name):
    setting = ml.models.get(name)
    if not {"lr", "epochs"} & set(setting.ours):
        assert (setting.lr["bp"], setting.lr["dfa"], setting.batch_size, setting.epochs) == SOURCE[name]
    assert setting.lr["fa"] == setting.lr["memdfa"] == setting.lr["dfa"]
    assert set(setting.ours) <= set(ml.models.table())
    assert setting.dataset in ml.datasets.names()
    for rule in ml.RULES:
        RunSettings(rule=rule, network=name).completed()  # refuses names that do not exist


def test_a_rule_is_made_with_the_networks_own_settings_and_each_can_be_changed():
    data = SimpleNamespace(input_shape=(1, 28, 28), classes=10)
    bp, dfa = (ml.experiments.make_rule(rule, "nokland_2x800", data) for rule in ("bp", "dfa"))
    assert type(dfa.optimizers[0]) is torch.optim.RMSprop
    assert dfa.optimizers[0].defaults["lr"] == 1e-4
    assert (dfa.loss_fn, dfa.feedback.distribution) == (ml.losses.bce, "uniform")
    assert not any(p.any() for p in dfa.blocks.parameters())
    assert all(p.any() for p in bp.blocks.parameters())

    data.input_shape = (3, 32, 32)
    options = {"optimizer": "momentum", "lr": 0.5, "weight_decay": 0.25, "loss": "mse", "distribution": "normal"}
    options |= {"initialisation": "zero", "feedback": "shared", "scale": 2.0, "clip_norm": 3.0, "seed": 4}
    learner = ml.experiments.make_rule("dfa", "lenet", data, **options)
    assert learner.optimizers[0].defaults.items() >= {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.25}.items()
    assert (learner.loss_fn, learner.clip_norm) == (ml.losses.mse, 3.0)
    assert vars(learner.feedback).items() >= {"distribution": "normal", "scale": 2.0, "seed": 4}.items()
    assert isinstance(learner.feedback, ml.feedback.Shared)
    assert not any(p.any() for p in learner.blocks.parameters())
