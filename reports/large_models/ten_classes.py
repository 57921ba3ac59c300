"""Two models of torchvision with ten classes, at sizes of which a step runs on a small machine, for `memdfa bench`."""

import torchvision
from torch import nn


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def vit_b_16() -> nn.Module:
    """Images of 64 x 64: 16 patches."""
    return torchvision.models.vit_b_16(image_size=64, num_classes=10)
