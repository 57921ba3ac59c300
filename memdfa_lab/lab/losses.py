"""Losses by name, for whole-number labels: means over the batch, from the network's output (N, C) and y (N,)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of output (N, C) against one-hot labels y (N,), over batch and classes."""
    return F.mse_loss(output, _one_hot(output, y))


def bce(logits: Tensor, y: Tensor) -> Tensor:
    """Return the binary cross-entropy of each class's sigmoid (N, C) against one-hot labels y (N,), over both."""
    return F.binary_cross_entropy_with_logits(logits, _one_hot(logits, y))


def _one_hot(output: Tensor, y: Tensor) -> Tensor:
    # F.one_hot reads the labels, and runs other operations on the meta device: memory could not be predicted.
    return output.new_zeros(len(y), output.shape[1]).scatter_(1, y[:, None], 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": mse, "bce": bce}
