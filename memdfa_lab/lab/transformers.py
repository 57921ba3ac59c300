"""Two transformers as blocks: a ViT for images, and a GPT that predicts the next word of a text.

A block is a unit of attention and MLP, with its skip connections. The embedding of patches is a block of its own; the
embedding of words is in the block of the first unit, and the last LayerNorm in that of the last unit.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.generators import seeded
from memdfa_lab.lab.architectures import Shape, check_shape


class Embedding(nn.Module):
    """The sum of a vector for each patch or word and one for its position: (N, C, H, W) or (N, T) to (N, T, width)."""

    def __init__(self, embed: nn.Module, positions: int, width: int):
        super().__init__()
        self.embed, self.position = embed, nn.Parameter(torch.empty(positions, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embed(x)
        h = h.flatten(2).transpose(1, 2) if h.dim() == 4 else h
        if h.shape[1] > len(self.position):
            raise ValueError(f"the network has {len(self.position)} positions, got {h.shape[1]}: shorten the examples")
        return h + self.position[: h.shape[1]]


class Unit(nn.Module):
    """Attention and an MLP, each after a LayerNorm and with a skip around both: (N, T, width) to the same shape.

    With `causal`, a position sees itself and those before it. All weights are in Linear layers, so that FA has
    a B for each; for nn.MultiheadAttention it has none.
    """

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), *wide)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (N, heads, T, width / heads)
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return h + self.mlp(h)


def vit(
    input_shape: Shape, classes: int, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4, seed: int = 0
) -> nn.Sequential:
    """Return a vision transformer as blocks: patches of images (N, C, H, W), `depth` units, their mean, Linear.

    `input_shape` is (C, H, W). The output is (N, classes). The weights depend on `seed`, not on the global
    generator. Raises ValueError for an input shape that patches do not fill, a width that `heads` do not divide, and
    numbers below 1.
    """
    channels, height, across = check_shape(input_shape)
    check_int("patch", patch)
    if height % patch or across % patch:
        raise ValueError(f"patches of {patch} x {patch} do not fill images of {height} x {across}: take another size")
    embed = partial(nn.Conv2d, channels, kernel_size=patch, stride=patch)
    mean = [nn.AdaptiveAvgPool2d((1, None)), nn.Flatten()]  # over positions
    return _network(embed, height // patch * (across // patch), width, depth, heads, False, mean, classes, seed)


def gpt(
    vocabulary: int = 128, length: int = 64, width: int = 64, depth: int = 4, heads: int = 4, seed: int = 0
) -> nn.Sequential:
    """Return a language model as blocks: words (N, T) as whole numbers, `depth` causal units, Linear.

    T is at most `length`. The output is (N, T, vocabulary), at each position the scores of the next word, for
    `ml.losses.token_cross_entropy`. `seed` and errors are as in `vit`.
    """
    embed = partial(nn.Embedding, check_int("vocabulary", vocabulary))
    return _network(embed, check_int("length", length), width, depth, heads, True, [], vocabulary, seed)


def _network(
    embed: Callable[[int], nn.Module],
    positions: int,
    width: int,
    depth: int,
    heads: int,
    causal: bool,
    before_last: list[nn.Module],
    classes: int,
    seed: int,
) -> nn.Sequential:
    for name, size in {"width": width, "depth": depth, "heads": heads, "classes": classes}.items():
        check_int(name, size)
    if width % heads:
        raise ValueError(f"heads must divide the width, got {heads} heads and width {width}")
    with seeded(seed):
        first = Embedding(embed(width), positions, width)
        units = [Unit(width, heads, causal) for _ in range(depth)]
        return as_blocks([first, *units, nn.LayerNorm(width), *before_last, nn.Linear(width, classes)])
