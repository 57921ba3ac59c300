"""The small classifier whose loss teaches a block: what it sees of the block's output, and its losses."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

POOLS = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by how many dimensions a batch has


class Readout(nn.Linear):
    """h (N, ...), averaged to `positions` along each spatial dimension, then one linear layer.

    `mixed`: the shape of the weights of a second layer, `mix`, whose output gives the similarities; None for none.
    """

    def __init__(self, inputs: int, classes: int, positions: int, mixed: Sequence[int] | None = None):
        super().__init__(inputs, classes)
        self.positions, self.mix = positions, None
        if mixed is not None:
            units, dense = mixed[0], len(mixed) == 2
            layer = nn.Linear if dense else partial(CONVOLUTIONS[len(mixed)], kernel_size=3, padding=1)
            self.mix = layer(units, units, bias=False)

    @staticmethod
    def sizes(shape: Sequence[int], positions: int) -> tuple[int, tuple[int, ...]]:
        """Return the inputs, and the shape of the second layer's weights, for a block's output (channels, ...)."""
        inputs = shape[0] * prod(_grid(shape, positions))
        on_map = len(shape) + 1 in CONVOLUTIONS
        return inputs, (shape[0], shape[0], *[3] * (len(shape) - 1)) if on_map else (prod(shape),) * 2

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (N, classes).

        Raises ValueError if h gives another number of inputs than that of the first batch.
        """
        size = _grid(h.shape[1:], self.positions)
        pool: Any = POOLS.get(h.dim())
        seen = (h if pool is None else pool(h, size if len(size) > 1 else size[0])).flatten(1)
        if seen.shape[1] != self.in_features:
            was = f"a readout was made for {self.in_features} inputs, and a block's output now gives {seen.shape[1]}"
            raise ValueError(f"{was}; earlier blocks have learned: keep to one size of x, or take MemDFA")
        return super().forward(seen)

    def features(self, h: Tensor) -> Tensor:
        """Return the second layer's features of each example: on images, each channel's standard deviation."""
        out: Tensor = self.mix(h if h.dim() in CONVOLUTIONS else h.flatten(1))  # type: ignore[misc]
        return out.flatten(2).std(2) if out[0, 0].numel() > 1 else out.flatten(1)

    def dissimilarity(self, features: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared difference between how alike examples are and how alike their labels y (N,) are.

        The similarity of a pair is the cosine of its features (N, units), each row centred. For one-hot labels it is
        1 within a class and -1 / (classes - 1) between classes (Nøkland and Eidnes 2019).
        """
        centred = F.normalize(features - features.mean(1, keepdim=True), dim=1)
        apart = -1 / max(self.out_features - 1, 1)
        alike = (y[:, None] == y).to(features.dtype).mul_(1 - apart).add_(apart)
        return F.mse_loss(centred @ centred.t(), alike)


def _grid(shape: Sequence[int], positions: int) -> list[int]:
    return [min(positions, size) if len(shape) + 1 in POOLS else size for size in shape[1:]]
