"""Reversible networks, whose blocks compute their input from their output, and residual networks to compare with."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.generators import seeded
from memdfa_lab.lab.architectures import ACTIVATIONS, Shape, check_shape
from memdfa_lab.rivals.reversible import Coupling


class Head(nn.Linear):
    """A dense layer on the mean over all pixels, if there are any."""

    changes_nothing = True

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.flatten(2).mean(2) if h.dim() > 2 else h)


def reversible(
    input_shape: int | Shape,
    widths: int | Sequence[int],
    depth: int,
    classes: int,
    activation: str = "relu",
    batch_norm: bool = False,
    coupled: bool = True,
    seed: int | None = 0,
) -> nn.Sequential:
    """Return a reversible network as blocks: a first layer, `depth` couplings for each of `widths`, and Linear.

    For an `input_shape` (n,), with x (N, n), F and G of each coupling are an activation and a Linear layer; for images
    (C, H, W) they are an activation and a 3x3 convolution. With `batch_norm` BatchNorm comes first. A layer before each
    further width changes the width, for images with stride 2. `ml.Reversible` keeps the inputs of these layers and of
    the first: one for each width. The head is Linear on the mean over pixels.

    With `coupled=False` the network is a chain of residual units with the same weights and arithmetic that cannot be
    reversed, to train by BP in comparison. Weights are He's; those of F and G are divided by the square root of the
    number of couplings, so that the output does not grow with depth. They depend on `seed`, not on the global
    generator. Raises TypeError if widths is neither a number nor a list; ValueError for an unknown activation, no
    widths, odd widths, and numbers below 1.
    """
    given: Any = [widths] if isinstance(widths, Integral) else widths
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"widths must be an even whole number, or a list of them such as [8, 16], got {widths!r}")
    if not (widths := list(given)):
        raise ValueError("widths is an empty list: give an even width for each stage of the network, such as [8, 16]")
    images = not isinstance(input_shape, int)
    before = check_shape(input_shape)[0] if images else check_int("input_shape", input_shape)
    kind = lookup("activation", activation, ACTIVATIONS)
    for name, size in {"depth": depth, "classes": classes, **{f"width {w}": w for w in widths}}.items():
        check_int(name, size)
    if any(width % 2 for width in widths):
        raise ValueError(f"a coupling splits its input into halves: give even widths, got {widths}")

    def layer(before: int, width: int, stride: int = 1, scale: float = 1.0) -> Any:
        made: Any = nn.Conv2d(before, width, 3, stride, 1) if images else nn.Linear(before, width)
        nn.init.zeros_(made.bias)
        nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
        with torch.no_grad():
            made.weight.mul_(scale)
        return made

    def part(half: int) -> nn.Module:
        norm = [nn.BatchNorm2d(half) if images else nn.BatchNorm1d(half)] if batch_norm else []
        return nn.Sequential(*norm, kind(), layer(half, half, scale=(len(widths) * depth) ** -0.5))

    with nullcontext() if seed is None else seeded(seed):
        blocks: list[nn.Module] = [] if images else [nn.Flatten()]
        for k, width in enumerate(widths):
            blocks.append(layer(before, width, 2 if k else 1))
            blocks += [Coupling(part(width // 2), part(width // 2), coupled) for _ in range(depth)]
            before = width
        return as_blocks([*blocks, Head(before, classes)])
