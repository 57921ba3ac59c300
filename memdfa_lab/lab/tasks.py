"""The task of a network, found from its loss and a batch: which labels fit, and which predictions are right."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.checks import lookup
from memdfa_lab.lab import losses

CLASSES, LOGITS, NUMBERS = "classes", "logits", "numbers"  # kinds of losses
KINDS: dict[Any, str] = {
    **dict.fromkeys((F.cross_entropy, F.nll_loss, F.multi_margin_loss, losses.mse, losses.bce), CLASSES),
    **dict.fromkeys((nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss, losses.token_cross_entropy), CLASSES),
    **dict.fromkeys((F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss), LOGITS),
    **dict.fromkeys((F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss), NUMBERS),
    **dict.fromkeys((nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss), NUMBERS),
}
# name -> outputs, y
TASKS = {
    "classification": ("(N, C)", "whole numbers (N,)"),
    "tokens": ("(N, V, T), or (N, T, V) where the loss takes them so,", "whole numbers (N, T)"),
    "segmentation": ("(N, C, H, W), or of more dimensions,", "whole numbers (N, H, W)"),
    "binary": ("(N, 1) or (N,)", "labels of that shape, each 0 or 1"),
    "multilabel": ("(N, K)", "labels (N, K), each 0 or 1"),
    "soft labels": ("(N, C)", "probabilities (N, C), floats that sum to 1"),
    "regression": ("of any shape", "real numbers of that shape"),
}
DIMENSIONS = {"classification": 2, "tokens": 3, "segmentation": 4}  # of the outputs, where y has class numbers


class Task(NamedTuple):
    """A task: its name, the dimension of classes in the outputs, the ignored label, and the kind of loss."""

    name: str
    class_dim: int = 1
    ignored: int = -100
    loss: str | None = None

    @property
    def of_classes(self) -> bool:
        """Whether y has the number of a class for each example or position."""
        return self.name in DIMENSIONS

    @property
    def has_labels(self) -> bool:
        """Whether a prediction can be right or wrong."""
        return self.of_classes or self.name in ("binary", "multilabel")

    def check(self, output: Tensor, y: Tensor, name: str = "y") -> None:
        """Raise ValueError if outputs (N, ...) and y (M, ...) do not fit this task; the message calls y `name`."""
        shape, (outputs, labels) = list(output.shape[1:]), TASKS[self.name]
        most = shape.pop(max(self.class_dim - 1, -1)) - 1 if self.of_classes and shape else 1
        alike, floats = list(y.shape[1:]) == shape, y.is_floating_point()
        column = y.dim() == 1 and shape == [1] and self.loss is None  # torch's losses take y of the outputs' shape
        fits = {
            "binary": shape in ([], [1]) and (alike or column),
            "multilabel": alike,
            "soft labels": alike and floats and len(shape) > 0,
            "regression": alike or column,
        }.get(self.name, alike and not floats and min(output.dim(), 4) == DIMENSIONS.get(self.name) and most > 0)
        fits = fits and (floats or self.loss != LOGITS)
        if not fits or y.is_complex() or not self._in_range(y, most):
            upto = f" from 0 to {most}" if self.of_classes and most > 0 else ", floats" * (self.loss == LOGITS)
            raise ValueError(
                f"the task is {self.name!r}: its outputs are {outputs} and {name} is {labels}{upto}; got outputs "
                f"{tuple(output.shape)} and {name} {described(y)}: correct {name}, or give the right loss or task="
            )

    def _in_range(self, y: Tensor, most: int) -> bool:
        """Tell whether y (M, ...) may be labels, which go from 0 to `most`."""
        if self.of_classes and bool((y == self.ignored).any()):
            y = y[y != self.ignored]
        if not y.numel() or self.name == "regression":
            return True
        if self.name == "soft labels":
            return bool(y.min() >= 0 and (y.sum(1) - 1).abs().max() < 1e-3)
        return bool(y.min() >= 0 and y.max() <= most) and not (y.is_floating_point() and bool((y != y.round()).any()))

    def right(self, output: Tensor, y: Tensor) -> Tensor:
        """Return, for each label that counts, whether it is predicted: by the largest score, or by a logit above 0."""
        if self.of_classes:
            return (output.argmax(self.class_dim) == y)[y != self.ignored]
        return ((output > 0) == (y.reshape(output.shape) > 0)).flatten()


def task_of(loss_fn: Callable[..., Tensor], output: Tensor, y: Tensor, name: str | None = None) -> Task | None:
    """Return the task, from a loss and a batch's outputs (N, ...) and y; None for an unknown loss.

    `name`: one of TASKS, where the caller knows it. Raises ValueError for another name.
    """
    kind, ignored = _kind(loss_fn)
    last = loss_fn is losses.token_cross_entropy or output.shape[1:-1] == y.shape[1:] != output.shape[2:]
    if name is not None:
        lookup("task", name, TASKS)
    elif kind == CLASSES:
        soft = y.is_floating_point() and y.shape[1:] == output.shape[1:]
        named = {dimensions: name for name, dimensions in DIMENSIONS.items()}
        name = "soft labels" if soft else named[min(max(output.dim(), 2), 4)]
    elif kind == LOGITS:
        if y.is_floating_point() and len(y) and bool((y != y.round()).any()) and y.min() >= 0 and y.max() <= 1:
            return None  # probabilities of several labels per example
        name = "binary" if output[:1].numel() == 1 else "multilabel"
    elif kind is None:
        return None
    return Task(name or "regression", -1 if last and output.dim() > 2 else 1, ignored, kind)


def _kind(loss_fn: Any) -> tuple[str | None, int]:
    """Return the kind of a loss, None if unknown, and the label that it ignores."""
    function, settings = loss_fn, {}
    if isinstance(loss_fn, partial):
        function, settings = loss_fn.func, loss_fn.keywords
    elif isinstance(loss_fn, nn.Module):
        function, settings = type(loss_fn), vars(loss_fn)
    return (KINDS.get(function) if isinstance(function, Hashable) else None), settings.get("ignore_index", -100)


def described(y: Tensor) -> str:
    """Return the shape, dtype and range of labels, for a message."""
    real = y.numel() and not y.is_complex()
    return f"{tuple(y.shape)} {y.dtype}{f' from {y.min():.6g} to {y.max():.6g}' if real else ''}"
