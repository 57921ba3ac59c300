"""The networks of the experiments, by name, with the setting their source trained them in.

Sources: "Chu et al." is the authors' public code for MEM-DFA (repository chutney42/zpp-mem).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from memdfa_lab.blocks import as_blocks
from memdfa_lab.names import known

Shape = tuple[int, int, int]  # (C, H, W) of one image
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "none": nn.Identity,
}


@dataclass(frozen=True)
class Network:
    """A network and its setting: read it with `ml.models.get(name)`, override what you like.

    `layers(input_shape, classes)` gives the modules in order; `lr` holds a learning rate a rule, for plain SGD.
    """

    layers: Callable[[Shape, int], list[nn.Module]]
    input_shape: Shape
    dataset: str
    batch_size: int
    epochs: int
    lr: dict[str, float]
    loss: str = "cross_entropy"
    source: str = "Chu et al."


def names() -> list[str]:
    """Return the names that `build` takes; a ReLU MLP has a name too, such as 784-[800]x32-10."""
    return list(NETWORKS)


def get(name: str) -> Network:
    """Return the network of that name. Raises ValueError, with the nearest name, if there is none."""
    spelt = re.fullmatch(r"(\d+)-\[(\d+)\]x(\d+)-10", str(name))
    if spelt is None:
        return known("network", name, {**NETWORKS, "784-[800]x32-10": NETWORKS["fc_relu"]})
    inputs, width, depth = map(int, spelt.groups())
    return Network(_mlp([width] * depth, "relu"), (1, 1, inputs), "mnist", 128, 1, _same_lr(0.01), source="its name")


def build(name: str, input_shape: Shape | None = None, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """Return a new network of that name as blocks, for input (N, *input_shape), its own shape if not given.

    Weights are He-normal, biases 0, as the authors'; `seed` gives them, whatever the global generator's state.
    """
    network = get(name)
    shape = network.input_shape if input_shape is None else input_shape
    return _initialised(lambda: network.layers(shape, classes), seed)


def mlp(
    in_features: int,
    hidden: Sequence[int],
    classes: int,
    activation: str = "relu",
    batch_norm: bool = False,
    output: str = "none",
    seed: int = 0,
) -> nn.Sequential:
    """Return a multilayer perceptron as blocks: Linear (+ BatchNorm) + activation for each of `hidden`, then Linear.

    Takes (N, in_features), or anything that flattens to it. `output` is the last block's activation. Raises
    ValueError for an activation that is not in ACTIVATIONS and for widths below 1.
    """
    known("activation", activation, ACTIVATIONS)
    known("activation", output, ACTIVATIONS)
    if min(in_features, classes, *hidden) < 1:
        raise ValueError(f"widths must be 1 or more, got {in_features}, {list(hidden)}, {classes}")
    return _initialised(lambda: _dense(in_features, hidden, classes, activation, batch_norm, output), seed)


def _dense(
    in_features: int,
    hidden: Sequence[int],
    classes: int,
    activation: str,
    batch_norm: bool = False,
    output: str = "none",
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(in_features, width), *([nn.BatchNorm1d(width)] if batch_norm else [])]
        layers.append(ACTIVATIONS[activation]())
        in_features = width
    layers.append(nn.Linear(in_features, classes))
    return layers if output == "none" else [*layers, ACTIVATIONS[output]()]


def _mlp(hidden: Sequence[int], activation: str, batch_norm: bool = False, output: str = "none") -> Callable:
    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        return _dense(torch.Size(shape).numel(), hidden, classes, activation, batch_norm, output)

    return layers


def _convnet(
    features: Callable[[int], list[nn.Module]], hidden: int, batch_norm: bool = False
) -> Callable[[Shape, int], list[nn.Module]]:
    """Convolutions made from the number of input channels, then one hidden dense layer."""

    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        with torch.device("meta"):  # the size of the feature map, without computing it
            flat = nn.Sequential(*features(shape[0]))(torch.empty(2, *shape)).flatten(1).shape[1]
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        dense = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), *norm, nn.Linear(hidden, classes)]
        return [*features(shape[0]), *dense]

    return layers


def _mnist_conv(padding: str) -> Callable[[Shape, int], list[nn.Module]]:
    def features(channels: int) -> list[nn.Module]:
        first = [nn.Conv2d(channels, 20, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()]
        return [*first, nn.Conv2d(20, 50, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()]

    return _convnet(features, hidden=500)


def _liao_cifar(batch_norm: bool) -> Callable[[Shape, int], list[nn.Module]]:
    def stage(channels: int, filters: int, pool: nn.Module) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(filters)] if batch_norm else []
        return [nn.Conv2d(channels, filters, 5, padding="same"), pool, nn.ReLU(), *norm]

    def features(channels: int) -> list[nn.Module]:
        # ceil_mode pools as TensorFlow's SAME padding does: windows over the edge, of which only the inside counts.
        first = stage(channels, 32, nn.MaxPool2d(3, 2, ceil_mode=True))
        second = stage(32, 64, nn.AvgPool2d(3, 2, ceil_mode=True))
        return [*first, *second, *stage(64, 64, nn.AvgPool2d(3, 2, ceil_mode=True))]

    return _convnet(features, hidden=128, batch_norm=batch_norm)


def _vgg_16(batch_norm: bool) -> Callable[[Shape, int], list[nn.Module]]:
    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        modules: list[nn.Module] = []
        channels = shape[0]
        for filters in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
            if isinstance(filters, str):
                modules.append(nn.MaxPool2d(2))
            else:
                norm = [nn.BatchNorm2d(filters)] if batch_norm else []
                modules += [nn.Conv2d(channels, filters, 3, padding="same"), *norm, nn.ReLU()]
                channels = filters
        flat = channels * (shape[1] // 32) * (shape[2] // 32)
        return [*modules, *_dense(flat, [4096, 4096], classes, "relu")]

    return layers


def _initialised(make: Callable[[], list[nn.Module]], seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = as_blocks(make())
        for module in blocks.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return blocks


def _same_lr(lr: float) -> dict[str, float]:
    return dict.fromkeys(("bp", "fa", "dfa", "memdfa"), lr)


MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)
# The last three of the dense networks were only profiled, not trained: their epochs and learning rates are ours.
NETWORKS: dict[str, Network] = {
    "fc_relu": Network(_mlp([100, 30], "relu"), MNIST, "mnist", 10, 20, _same_lr(0.01)),
    "fc_sigmoid": Network(
        _mlp([50, 30], "sigmoid", output="sigmoid"), MNIST, "mnist", 10, 30, _same_lr(0.05), loss="mse"
    ),
    "long_fc": Network(_mlp([500] * 30, "sigmoid", True, "sigmoid"), MNIST, "mnist", 10, 1, _same_lr(0.01)),
    "long_fc2": Network(_mlp([500] * 20, "sigmoid", False, "sigmoid"), MNIST, "mnist", 10, 1, _same_lr(0.01)),
    "epic_long_fc": Network(_mlp([50] * 200, "sigmoid", True, "sigmoid"), MNIST, "mnist", 10, 1, _same_lr(0.01)),
    "mnist_conv": Network(_mnist_conv("same"), MNIST, "mnist", 100, 150, _same_lr(0.005)),
    "liao_mnist": Network(_mnist_conv("valid"), MNIST, "mnist", 100, 150, _same_lr(0.005)),
    "liao_cifar": Network(_liao_cifar(False), CIFAR10, "cifar10", 100, 100, _same_lr(1e-5) | {"bp": 0.001}),
    "liao_cifar_bn": Network(_liao_cifar(True), CIFAR10, "cifar10", 100, 100, _same_lr(1e-5) | {"bp": 0.001}),
    "vgg_16": Network(_vgg_16(False), CIFAR10, "cifar10", 100, 80, _same_lr(5e-6) | {"bp": 0.001}),
    "vgg_16_bn": Network(_vgg_16(True), CIFAR10, "cifar10", 100, 80, _same_lr(5e-6) | {"bp": 0.001}),
}
