"""Losses by name, for integer labels: a mean over the batch, from the network's output (N, C) and y (N,)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error against one-hot labels, over batch and classes."""
    return F.mse_loss(output, _one_hot(output, y))


def bce(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of each class's sigmoid against one-hot labels, over batch and classes."""
    return F.binary_cross_entropy_with_logits(logits, _one_hot(logits, y))


def _one_hot(output: Tensor, y: Tensor) -> Tensor:
    # F.one_hot looks at the labels, and takes another way where there are none: memory could not be predicted.
    return output.new_zeros(len(y), output.shape[1]).scatter_(1, y[:, None], 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": mse, "bce": bce}
