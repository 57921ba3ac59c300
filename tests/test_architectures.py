"""Networks written as text: each kind of part is a module of torch's, and the sizes are those of its outputs."""

from itertools import product

import pytest
import torch
from reference import refuses
from torch import nn
from torchvision.models import resnet18

from memdfa_lab.lab.architectures import ACTIVATIONS, layers

IMAGES = (3, 11, 12)
MEAN = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
SEPARABLE = [nn.Conv2d(3, 3, 3, 2, 1, groups=3, bias=False), nn.BatchNorm2d(3), nn.ReLU()]
SEPARABLE += [nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
TWICE = [nn.Conv2d(3, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(264, 5)]
BY_HAND = {
    "conv5x5(4)": [nn.Conv2d(3, 4, 5, 1, 2)],
    "conv3x3(4)/2": [nn.Conv2d(3, 4, 3, 2, 1)],
    "conv5x5(4,valid)": [nn.Conv2d(3, 4, 5)],
    "conv3x3(4,nobias)/3": [nn.Conv2d(3, 4, 3, 3, 1, bias=False)],
    "separable(8)/2": SEPARABLE,
    "maxpool2": [nn.MaxPool2d(2, 2)],
    "maxpool3/2": [nn.MaxPool2d(3, 2)],
    "avgpool3/2": [nn.AvgPool2d(3, 2)],
    "avgpool3/2(ceil)": [nn.AvgPool2d(3, 2, ceil_mode=True)],
    "conv3x3(4) mean 7": [nn.Conv2d(3, 4, 3, 1, 1), *MEAN, nn.Linear(4, 7)],
    "7 relu classes": [nn.Flatten(), nn.Linear(396, 7), nn.ReLU(), nn.Linear(7, 5)],
    "bn 7 bn": [nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(396, 7), nn.BatchNorm1d(7)],
    "[conv1x1(2) tanh]x2 [classes]x1": TWICE,
    "dropout0.25 7 dropout0.5": [nn.Dropout(0.25), nn.Flatten(), nn.Linear(396, 7), nn.Dropout(0.5)],
    **{name: [module()] for name, module in ACTIVATIONS.items()},
}


def assert_same_function(ours, theirs, x):
    """Compare the outputs in evaluation mode, with the weights and buffers of `theirs`."""
    state = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(state))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("text", BY_HAND)
def test_each_part_is_the_module_that_it_names(text):
    ours, theirs = nn.Sequential(*layers(text, IMAGES, 5)), nn.Sequential(*BY_HAND[text])
    assert repr(ours) == repr(theirs)
    assert_same_function(ours, theirs, torch.rand(2, *IMAGES))


def test_a_residual_network_is_torchvisions_with_a_stem_for_small_images():
    theirs = resnet18(num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    ours = nn.Sequential(*layers("resnet18", (1, 8, 8), 7))
    assert_same_function(ours, theirs, torch.rand(2, 1, 8, 8))


WINDOWS = ["maxpool2/1", "avgpool3/2", "maxpool3/2(ceil)", "avgpool2/3(ceil)", "maxpool1/4(ceil)"]
WINDOWS += ["conv5x5(2)/2", "conv4x4(2)/3", "conv3x3(2,valid)/2", "separable(2)/3"]


@pytest.mark.parametrize("text", WINDOWS)
def test_sizes_are_those_of_the_outputs_also_where_windows_go_over_the_edge(text):
    for side, wider in product(range(5, 12), (0, 1)):
        net = nn.Sequential(*layers(f"{text} classes", (2, side, side + wider), 3))
        assert net(torch.rand(2, 2, side, side + wider)).shape == (2, 3)


def test_an_average_counts_the_inside_of_a_window_alone():
    """TensorFlow's SAME average pool 3/2 over 4 pixels has the windows {0, 1, 2} and {2, 3}."""
    (pool,) = layers("avgpool3/2(ceil)", (1, 4, 4), 3)
    assert pool(torch.tensor([1.0, 2.0, 3.0, 7.0]).repeat(1, 4, 1))[0].tolist() == [[2.0, 5.0], [2.0, 5.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv3x5(4)", "'conv3x5(4)' is not a part of a network"),
        ("7 relo", "'relo' is not a part of a network"),
        ("[7 relu", "'[7' is not a part of a network"),
        ("resnet19", "'resnet19' is not a part of a network"),
        ("maxpool3 conv5x5(4,valid)", "(3, 11, 12) are too small for 'conv5x5(4,valid)'"),
        ("[maxpool2]x4", "too small for 'maxpool2'"),
        ("7 maxpool2", "'maxpool2' takes images, but comes after a dense layer"),
        ("7 mean", "'mean' takes images"),
        ("mean conv1x1(2)", "'conv1x1(2)' takes images"),
        ("7 resnet18", "'resnet18' takes images"),
        *((text, f"each number in {text!r}") for text in ("0", "conv3x3(0)", "conv0x0(3)", "maxpool2/0", "avgpool0")),
    ],
)
def test_what_makes_no_network_is_refused(text, message):
    with refuses(ValueError, message):
        layers(text, IMAGES, 5)
