"""Networks written as papers write them, such as "conv5x5(20) maxpool2 relu 500 relu classes".

| part               | modules                                                                                   |
|--------------------|-------------------------------------------------------------------------------------------|
| conv5x5(20)/2      | convolution with 20 filters and stride 2, padded by half the kernel                       |
| conv5x5(20,valid)  | the same without padding; conv5x5(20,nobias) is without bias                              |
| separable(64)/2    | 3x3 convolution of each channel with stride 2, then 1x1 with 64 filters, bn and relu both |
| maxpool3/2         | pooling, 3x3 with stride 2; avgpool too                                                   |
| maxpool3/2(ceil)   | windows may extend past the edge; only their inner part counts (TensorFlow's SAME)        |
| mean               | average over all pixels                                                                   |
| 500, classes       | dense layer of 500 units, or of one unit per class; images are flattened before it        |
| bn, relu, ...      | BatchNorm, one of ACTIVATIONS                                                             |
| dropout0.2         | dropout with probability 0.2                                                              |
| resnet18, ...      | torchvision's residual network, with a stem for small images                              |
| [500 relu]x20      | these parts 20 times                                                                      |
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from memdfa_lab.core.checks import check_int, of_an_extra

Shape = tuple[int, int, int]  # (C, H, W) of one image
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "none": nn.Identity,
}
CONVOLUTION = re.compile(r"conv(\d+)x\1\((\d+)(,valid|,nobias)?\)(?:/(\d+))?")
SEPARABLE = re.compile(r"separable\((\d+)\)(?:/(\d+))?")
DROPOUT = re.compile(r"dropout(0\.\d+)")
POOLING = re.compile(r"(max|avg)pool(\d+)(?:/(\d+))?(\(ceil\))?")
ON_IMAGES = (CONVOLUTION, SEPARABLE, POOLING, re.compile("mean|resnet(18|34|50|101|152)"))


def layers(text: str, shape: Shape, classes: int) -> list[nn.Module]:
    """Return the modules of a network, in order, for images of a shape (C, H, W) and a number of classes.

    Raises ValueError for a part that is not in the table above, or that does not fit the part before it.
    """
    text = re.sub(r"\[([^\]]*)\]x(\d+)", lambda found: " ".join([found[1]] * int(found[2])), text)
    modules: list[nn.Module] = []
    size: tuple[int, ...] = shape  # of the output so far: (C, H, W), or (n,) after a dense layer
    for part in text.replace("classes", str(classes)).split():
        if dropout := DROPOUT.fullmatch(part):
            modules.append(nn.Dropout(float(dropout[1])))
        elif re.search(r"(?<!\d)0", part):
            raise ValueError(f"each number in {part!r} must be a whole number from 1 on")
        elif part.isdecimal():
            if len(size) == 3:
                modules.append(nn.Flatten())
            modules.append(nn.Linear(math.prod(size), int(part)))
            size = (int(part),)
        elif part == "bn":
            modules.append(nn.BatchNorm2d(size[0]) if len(size) == 3 else nn.BatchNorm1d(size[0]))
        elif part in ACTIVATIONS:
            modules.append(ACTIVATIONS[part]())
        elif not any(pattern.fullmatch(part) for pattern in ON_IMAGES):
            raise ValueError(f"{part!r} is not a part of a network: help(memdfa_lab.lab.architectures) lists them")
        elif len(size) != 3:
            raise ValueError(f"{part!r} takes images, but comes after a dense layer: put it before")
        elif part == "mean":
            modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            size = size[:1]
        elif part.startswith("resnet"):
            modules += _resnet(part, size[0], classes)
            size = (classes,)
        else:
            found = list(_on_images(part, *size))
            modules += [module for module, _ in found]
            size = found[-1][1]
            if min(size) < 1:
                raise ValueError(f"images of shape {shape} are too small for {part!r}")
    return modules


def check_shape(given: object) -> Shape:
    """Return the shape (C, H, W) of images. Raises ValueError for anything else."""
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 3:
        raise ValueError(f"the input shape must be (C, H, W), such as (1, 28, 28), got {given!r}")
    channels, height, width = (check_int("a size in the input shape", size) for size in given)
    return channels, height, width


def _on_images(part: str, channels: int, height: int, width: int) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Yield the modules of a convolution or pooling, each with the shape (C, H, W) of its output."""
    sides = (height, width)
    if found := CONVOLUTION.fullmatch(part):
        kernel, filters, stride = int(found[1]), int(found[2]), int(found[4] or 1)
        padding = 0 if found[3] == ",valid" else kernel // 2
        size = (_windows(side + 2 * padding, kernel, stride) for side in sides)
        bias = found[3] != ",nobias"
        yield nn.Conv2d(channels, filters, kernel, stride, padding, bias=bias), (filters, *size)
    elif found := POOLING.fullmatch(part):
        kernel, stride, ceil = int(found[2]), int(found[3] or found[2]), found[4] is not None
        pool: Any = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[found[1]]
        size = (_windows(side, kernel, stride, ceil) for side in sides)
        yield pool(kernel, stride, ceil_mode=ceil), (channels, *size)
    elif found := SEPARABLE.fullmatch(part):
        filters, stride = int(found[1]), int(found[2] or 1)
        shape = (channels, *(_windows(side + 2, 3, stride) for side in sides))
        yield nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), shape
        yield nn.BatchNorm2d(channels), shape
        yield nn.ReLU(), shape
        yield nn.Conv2d(channels, filters, 1, bias=False), (filters, *shape[1:])
        yield nn.BatchNorm2d(filters), (filters, *shape[1:])
        yield nn.ReLU(), (filters, *shape[1:])


def _windows(side: int, kernel: int, stride: int, ceil: bool = False) -> int:
    """Return the number of windows along a side; with `ceil` the last may extend past the edge if it begins inside."""
    rest = side - kernel
    return 1 + (min(math.ceil(rest / stride), (side - 1) // stride) if ceil else rest // stride)


def _resnet(name: str, channels: int, classes: int) -> list[nn.Module]:
    with of_an_extra():
        from torchvision.models import resnet  # here, so that `import memdfa_lab` does not load torchvision

    net = getattr(resnet, name)(num_classes=classes)
    stem = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    units = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    return [*stem, *units, net.avgpool, nn.Flatten(), net.fc]


def _uniform(layer: nn.Linear | nn.Conv2d) -> None:
    bound = 1 / math.sqrt(layer.weight[0].numel())
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)


# name -> a function that initialises a Linear or convolution, whose bias is zero
INITIALISATIONS: dict[str, Callable[[nn.Linear | nn.Conv2d], object]] = {
    "he_normal": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"),  # the authors'
    "uniform": _uniform,  # in +-1/sqrt(fan_in), the biases too: Nøkland's for BP
    "zero": lambda layer: nn.init.zeros_(layer.weight),  # Nøkland's for DFA
    "orthogonal": lambda layer: nn.init.orthogonal_(layer.weight, gain=1.05),  # a signal passes 100 layers of tanh
    "xavier_uniform": lambda layer: nn.init.xavier_uniform_(layer.weight),  # BioTorch's
}
