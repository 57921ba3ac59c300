"""What a network puts out in evaluation mode, and how often that is right."""

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_int
from memdfa_lab.core.rule import Rule


def predict(model: Rule | nn.Module, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Return the network's output (N, C) for x (N, ...), in eval mode and in batches; the mode is restored.

    Raises TypeError if x is not a tensor, ValueError for a batch size below 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (N, ...), not a {type(x).__name__}: use torch.as_tensor")
    check_int("batch_size", batch_size)
    blocks = model.blocks if isinstance(model, Rule) else model
    like = next(blocks.parameters())
    modes = [(module, module.training) for module in blocks.modules()]
    blocks.eval()
    try:
        with torch.no_grad():
            return torch.cat([blocks(batch.to(like)) for batch in x.split(batch_size)])
    finally:
        for module, training in modes:
            module.training = training


def accuracy(model: Rule | nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Return the part of the examples x (N, ...) whose largest output is the label y (N,).

    Raises ValueError if there is no example, or not a label for each.
    """
    if not isinstance(y, Tensor) or y.shape != (len(x),) or not len(x):
        given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"y must be a tensor of {len(x)} labels, one or more, one for each example; got {given}")
    return (predict(model, x, batch_size).argmax(1).cpu() == y.cpu()).float().mean().item()
