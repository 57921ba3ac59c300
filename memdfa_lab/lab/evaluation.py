"""What a network puts out in evaluation mode, how often that is right, and whether that can be said."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_int
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.datasets import as_input


def predict(model: Rule | nn.Module, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Return the network's output (N, C) for x (N, ...), in eval mode and in batches; the mode is restored.

    Raises TypeError if x is not a tensor, ValueError for a batch size below 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (N, ...), not a {type(x).__name__}: use torch.as_tensor")
    check_int("batch_size", batch_size)
    blocks = model.blocks if isinstance(model, Rule) else model
    like = next(blocks.parameters(), x)
    modes = [(module, module.training) for module in blocks.modules()]
    blocks.eval()
    torch.clear_autocast_cache()  # inside torch.autocast, it would have casts of weights from before an update
    try:
        precision = model.autocast() if isinstance(model, Rule) else nullcontext()
        with torch.no_grad(), precision:  # a copy of x, since the first module may work in place
            return torch.cat([blocks(as_input(batch.clone(), like)) for batch in x.split(batch_size)])
    finally:
        for module, training in modes:
            module.training = training


def accuracy(model: Rule | nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Return the part of the examples x (N, ...) whose largest output, of (N, C), is the label y (N,).

    Raises ValueError if there is no example, not a label for each, or if this would mean nothing: for outputs that are
    not scores of two classes or more, and labels that are not from 0 to C - 1.
    """
    if not isinstance(y, Tensor) or y.shape != (len(x),) or not len(x):
        given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"y must be a tensor of {len(x)} labels, one or more, one for each example; got {given}")
    output = predict(model, x, batch_size)
    if not are_scores(output, y):
        raise ValueError(
            "accuracy is for outputs (N, C) of two classes or more, and whole-number labels (N,) from 0 to C - 1; got "
            f"outputs {tuple(output.shape)} and labels {described(y)}"
        )
    return (output.argmax(1).cpu() == y.cpu()).float().mean().item()


def described(y: Tensor) -> str:
    """Return the shape, dtype and, of whole numbers, range of labels, for a message."""
    whole = y.numel() and not (y.is_floating_point() or y.is_complex())
    return f"{tuple(y.shape)} {y.dtype}{f' from {y.min()} to {y.max()}' if whole else ''}"


def are_scores(output: Tensor, y: Tensor) -> bool:
    """Tell whether an output (N, C) has scores of two classes or more, of which each of y (M,) is the number of one."""
    scores = output.dim() == 2 and output.shape[1] > 1
    labels = y.dim() == 1 and not (y.is_floating_point() or y.is_complex())
    return scores and labels and (not len(y) or bool(y.long().min() >= 0 and y.long().max() < output.shape[1]))
