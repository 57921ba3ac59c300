"""Losses for whole-number labels: means over the batch, from the network's output (N, C) and y (N,).

Class weights are an option of the loss, partial(F.cross_entropy, weight=w). Example weights can be a column of y, as in
`lambda out, y: (F.cross_entropy(out, y[:, 0].long(), reduction="none") * y[:, 1]).mean()`.

`as_mean` knows which losses are weighted means over examples: the loss of a batch then follows from those of its parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.compat import has_global_hooks, has_hooks


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of output (N, C) against one-hot labels y (N,), over batch and classes."""
    return F.mse_loss(output, _one_hot(output, y))


def bce(logits: Tensor, y: Tensor) -> Tensor:
    """Return the binary cross-entropy of each class's sigmoid (N, C) against one-hot labels y (N,), over
    batch and classes.
    """
    return F.binary_cross_entropy_with_logits(logits, _one_hot(logits, y))


def token_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (N, T, V), as language models put them out, against y (N, T).

    F.cross_entropy takes logits (N, V, T). A label of -100 does not count.
    """
    return F.cross_entropy(logits.movedim(-1, 1), y)


def _one_hot(output: Tensor, y: Tensor) -> Tensor:
    # F.one_hot reads the labels, and runs other operations on the meta device: memory could not be predicted.
    return output.new_zeros(len(y), output.shape[1]).scatter_(1, y[:, None], 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy, "mse": mse, "bce": bce}
CROSS_ENTROPY = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


class Mean(NamedTuple):
    """A loss that is a weighted mean: its settings, and a function from the y of examples to their total weight."""

    settings: dict[str, Any]
    weight: Callable[[Tensor], float]


def as_mean(loss_fn: Callable[..., Tensor]) -> Mean | None:
    """Return the losses above, F.nll_loss and cross-entropy with a mean as a Mean; None for any other loss.

    Cross-entropy is F.cross_entropy, a partial of it by keywords, or nn.CrossEntropyLoss. Its mean is over the labels
    that count, each with the weight of its class. With both class weights and label smoothing the result is None.
    """
    if loss_fn is mse or loss_fn is bce:
        return Mean({"loss": loss_fn.__name__}, len)
    if loss_fn is token_cross_entropy or loss_fn is F.nll_loss:
        return Mean({"loss": loss_fn.__name__}, partial(_weight_of_labels, None, -100))
    given: dict[str, Any] = {}
    if type(loss_fn) is nn.CrossEntropyLoss and not has_hooks(loss_fn) and not has_global_hooks():
        given = {name: getattr(loss_fn, name) for name in CROSS_ENTROPY}
    elif type(loss_fn) is partial and loss_fn.func is F.cross_entropy and not loss_fn.args:
        given = loss_fn.keywords
    elif loss_fn is not F.cross_entropy:
        return None
    options = CROSS_ENTROPY | given
    if options.keys() != CROSS_ENTROPY.keys() or options["reduction"] != "mean":
        return None
    weights, ignored = options["weight"], options["ignore_index"]
    if weights is not None and options["label_smoothing"]:  # a label whose class has weight 0 then still has a loss
        return None
    return Mean({"loss": "cross_entropy", **options}, partial(_weight_of_labels, weights, ignored))


def _weight_of_labels(weights: Tensor | None, ignored: int, y: Tensor) -> float:
    if y.is_floating_point():  # probabilities (n, C, ...) count alike, whatever the weights of the classes
        return y.numel() / y.shape[1]
    counts = y != ignored
    return (counts if weights is None else weights[y[counts].long()].double()).sum().item()
