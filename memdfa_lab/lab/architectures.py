"""The layers of each network of the experiments, in order; what it is trained with stands in networks.csv.

Each entry of LAYERS gives a network's modules for images of a shape (C, H, W) and a number of classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

Shape = tuple[int, int, int]  # (C, H, W) of one image
Layers = Callable[[Shape, int], list[nn.Module]]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "none": nn.Identity,
}


def dense(
    in_features: int,
    hidden: Sequence[int],
    classes: int,
    activation: str,
    batch_norm: bool = False,
    output: str = "none",
) -> list[nn.Module]:
    """Return Flatten, Linear (+ BatchNorm) + activation for each of `hidden`, and the last Linear (+ activation)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(in_features, width), *([nn.BatchNorm1d(width)] if batch_norm else [])]
        layers.append(ACTIVATIONS[activation]())
        in_features = width
    layers.append(nn.Linear(in_features, classes))
    return layers if output == "none" else [*layers, ACTIVATIONS[output]()]


def convolutions(
    shape: Shape, filters: Sequence[int], classes: int, activation: str, batch_norm: bool = False
) -> list[nn.Module]:
    """Return a 3x3 convolution (+ BatchNorm) + activation for each of `filters`, Flatten, and Linear."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for count in filters:
        layers += [nn.Conv2d(channels, count, 3, padding=1), *([nn.BatchNorm2d(count)] if batch_norm else [])]
        layers.append(ACTIVATIONS[activation]())
        channels = count
    return [*layers, nn.Flatten(), nn.Linear(channels * height * width, classes)]


def mlp(hidden: Sequence[int], activation: str, batch_norm: bool = False, output: str = "none") -> Layers:
    """Return the layers of an MLP for whatever flattens to its input."""

    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        return dense(torch.Size(shape).numel(), hidden, classes, activation, batch_norm, output)

    return layers


def _convnet(
    features: Callable[[int], list[nn.Module]],
    hidden: Sequence[int],
    activation: str = "relu",
    batch_norm: bool = False,  # after the activation, as in liao_cifar
    output: str = "none",
) -> Layers:
    """Convolutions made from the number of input channels, then dense layers."""

    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        with torch.device("meta"):  # the size of the feature map, without computing it
            flat = nn.Sequential(*features(shape[0]))(torch.empty(2, *shape)).flatten(1).shape[1]
        modules = dense(flat, hidden, classes, activation, output=output)
        if batch_norm:
            modules.insert(-1, nn.BatchNorm1d(hidden[-1]))
        return [*features(shape[0]), *modules]

    return layers


def long_conv(depth: int) -> Layers:
    """Return the layers of long_conv with that many convolutions."""

    def features(channels: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for filters_below in (channels, *[5] * (depth - 1)):
            layers += [nn.Conv2d(filters_below, 5, 5, padding="same"), nn.BatchNorm2d(5), nn.Sigmoid()]
        return layers

    return _convnet(features, [], output="sigmoid")


def _mnist_conv(padding: str) -> Layers:
    def features(channels: int) -> list[nn.Module]:
        first = [nn.Conv2d(channels, 20, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()]
        return [*first, nn.Conv2d(20, 50, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()]

    return _convnet(features, [500])


def _liao_cifar(batch_norm: bool) -> Layers:
    def stage(channels: int, filters: int, pool: nn.Module) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(filters)] if batch_norm else []
        return [nn.Conv2d(channels, filters, 5, padding="same"), pool, nn.ReLU(), *norm]

    def features(channels: int) -> list[nn.Module]:
        # ceil_mode pools as TensorFlow's SAME padding does: windows over the edge, of which only the inside counts.
        first = stage(channels, 32, nn.MaxPool2d(3, 2, ceil_mode=True))
        second = stage(32, 64, nn.AvgPool2d(3, 2, ceil_mode=True))
        return [*first, *second, *stage(64, 64, nn.AvgPool2d(3, 2, ceil_mode=True))]

    return _convnet(features, [128], batch_norm=batch_norm)


def _moskovitz_1(channels: int) -> list[nn.Module]:
    first = [nn.Conv2d(channels, 64, 5, padding="same"), nn.MaxPool2d(2), nn.ReLU()]
    return [*first, nn.Conv2d(64, 64, 5, padding="same"), nn.MaxPool2d(2), nn.ReLU()]


def _moskovitz_2(shape: Shape, classes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = shape[0]
    sizes = [(96, 3, 1), (96, 3, 1), (96, 3, 2), (192, 3, 1), (192, 3, 1), (192, 3, 2), (192, 3, 1), (192, 1, 1)]
    for filters, kernel, stride in [*sizes, (classes, 1, 1)]:
        layers += [nn.Conv2d(channels, filters, kernel, stride, kernel // 2), nn.ReLU()]
        channels = filters
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _vgg_16(batch_norm: bool) -> Layers:
    def features(channels: int) -> list[nn.Module]:
        modules: list[nn.Module] = []
        for filters in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
            if isinstance(filters, str):
                modules.append(nn.MaxPool2d(2, ceil_mode=True))
            else:
                norm = [nn.BatchNorm2d(filters)] if batch_norm else []
                modules += [nn.Conv2d(channels, filters, 3, padding="same"), *norm, nn.ReLU()]
                channels = filters
        return modules

    return _convnet(features, [4096, 4096])


def _resnet(name: str) -> Layers:
    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        from torchvision.models import resnet  # not above: `import memdfa_lab` stays light

        net = getattr(resnet, name)(num_classes=classes)
        stem = [nn.Conv2d(shape[0], 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]  # for small images
        units = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
        return [*stem, *units, net.avgpool, nn.Flatten(), net.fc]

    return layers


def _mobilenet(shape: Shape, classes: int) -> list[nn.Module]:
    def convolution(channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(filters), nn.ReLU()]

    channels = 32
    layers = convolution(shape[0], channels, 3)
    sizes = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for filters, stride in sizes:  # depthwise, a filter a channel, then pointwise, 1x1
        layers += [*convolution(channels, channels, 3, stride, channels), *convolution(channels, filters, 1)]
        channels = filters
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _nokland_conv(channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for filters in (96, 128, 256):
        layers += [nn.Conv2d(channels, filters, 5, padding="same"), nn.Tanh(), nn.MaxPool2d(3, 2)]
        channels = filters
    return layers


def _lenet(channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for filters in (32, 64, 128):
        pool = nn.AdaptiveAvgPool2d(1) if filters == 128 else nn.MaxPool2d(2)
        layers += [nn.Conv2d(channels, filters, 3), nn.ReLU(), pool]
        channels = filters
    return layers


def _lenet_mnist(channels: int) -> list[nn.Module]:
    first = [nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return [*first, *second, nn.Conv2d(16, 120, 5), nn.ReLU()]


LAYERS: dict[str, Layers] = {
    "fc_relu": mlp([100, 30], "relu"),
    "fc_sigmoid": mlp([50, 30], "sigmoid", output="sigmoid"),
    "long_fc": mlp([500] * 30, "sigmoid", batch_norm=True, output="sigmoid"),
    "long_fc2": mlp([500] * 20, "sigmoid", output="sigmoid"),
    "epic_long_fc": mlp([50] * 200, "sigmoid", batch_norm=True, output="sigmoid"),
    "long_conv": long_conv(30),
    "mnist_conv": _mnist_conv("same"),
    "liao_mnist": _mnist_conv("valid"),
    "liao_cifar": _liao_cifar(batch_norm=False),
    "liao_cifar_bn": _liao_cifar(batch_norm=True),
    "moskovitz_1": _convnet(_moskovitz_1, [192]),
    "moskovitz_2": _moskovitz_2,
    "vgg_16": _vgg_16(batch_norm=False),
    "vgg_16_bn": _vgg_16(batch_norm=True),
    "resnet_18": _resnet("resnet18"),
    "resnet_34": _resnet("resnet34"),
    "resnet_50": _resnet("resnet50"),
    "mobilenet": _mobilenet,
    "nokland_2x800": mlp([800] * 2, "tanh"),
    "nokland_7x240": mlp([240] * 7, "tanh"),
    "nokland_100x240": mlp([240] * 100, "tanh"),
    "nokland_conv": _convnet(_nokland_conv, [2048, 2048], "tanh"),
    "lenet": _convnet(_lenet, [256]),
    "lenet_mnist": _convnet(_lenet_mnist, [84]),
}
