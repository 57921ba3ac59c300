"""What a step is given, looked at before any weight changes: a batch, a loss that takes it, finite numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_batch(x: Any) -> None:
    """Raise TypeError, ValueError or FloatingPointError if x is not a batch (N, ...) of finite real numbers."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_complex():
        given = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"x must be a dense tensor (N, ...) of real numbers, got {given}: use torch.as_tensor")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be a batch (N, ...) of one example or more, got shape {tuple(x.shape)}")
    check_finite("x holds NaN or inf", x)


def check_data(who: str, data: object) -> None:
    """Raise TypeError if this is no data set; `who` takes it."""
    if not hasattr(data, "x_train"):
        raise TypeError(f"{who} takes data as ml.datasets.load returns it, not a {type(data).__name__}")


def scalar_loss(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Any) -> Tensor:
    """Return the loss, 0-d. Raises ValueError, one line, if there is none for these logits and y."""
    try:
        loss = loss_fn(logits, y)
    except (IndexError, RuntimeError, TypeError, ValueError) as problem:
        raise ValueError(f"{_given(logits, y)}: {' '.join(str(problem).split())}") from problem
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss must be a scalar made from the logits, a mean over the batch; got {shape}")
    return loss


def check_finite(problem: str, *tensors: Tensor) -> None:
    """Raise FloatingPointError if there is NaN or infinity in a tensor."""
    for tensor in tensors:
        least, largest = torch.aminmax(tensor.detach())  # isfinite would make four tensors of this size
        if not (torch.isfinite(least) and torch.isfinite(largest)):
            raise FloatingPointError(
                f"{problem}; no weight was changed: look for NaN and inf in the data, lower the learning rate, or clip "
                "(clip_norm=...)"
            )


def _given(logits: Tensor, y: Any) -> str:
    """Say what the loss was given, and what it usually takes."""
    given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
    if isinstance(y, Tensor) and y.numel() and not (y.is_floating_point() or y.is_complex()):
        given += f" from {y.min()} to {y.max()}"
    labels = f"labels are int64 ({len(logits)},) from 0 to {logits.shape[-1] - 1}"
    return f"the loss does not take logits {tuple(logits.shape)} and y {given} ({labels}); no weight was changed"
