"""The gradient of one block: from its input h_{i-1} and a signal s at its output h_i to the gradients of its weights.

For a = h_{i-1} W^T + b and h_i = f(a), with s of h_i's shape (N, n_i):

    dW = (s * f'(a))^T h_{i-1},    db = sum over the batch of s * f'(a).

Autograd does this for any block: `ByAutograd` below. For common blocks `by_hand` computes the same numbers in less
memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memdfa_lab.core import by_hand
from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.by_hand import ByHand
from memdfa_lab.core.signal import Signal


class BlockGradient(Protocol):
    """A block on its input h (N, ...): a forward pass, then the gradient of the weights for a signal at the output."""

    def forward(self) -> Tensor:
        """Run the block, keep what its gradient needs, and return the output."""

    def begin(self) -> None:
        """Run the part of the batch that is learned first, unless the block has run."""

    def learn(self, signal: Signal, in_place_sgd: torch.optim.Optimizer | None = None) -> bool:
        """Leave the gradient in the weights, and return True; return False if the block has not used its weights.

        Where `in_place_sgd` would only add -lr dW, it may be added at once.
        """

    def output(self) -> Tensor:
        """Return the block's output; a block that has not run is run, and keeps nothing."""


def block_gradient(
    block: nn.Module, h: Tensor, during: AbstractContextManager[Any] | None = None, make: Callable[..., ByHand] = ByHand
) -> BlockGradient:
    """Return the gradient of a block on h (N, ...), by hand where possible; nothing has run yet.

    `during` is entered around each forward pass. `make` makes the gradient by hand.
    """
    during = during or nullcontext()
    return by_hand.block_gradient(block, h, during, make) or ByAutograd(block, h, during)


class ByAutograd:
    """`BlockGradient` of any block, by autograd."""

    def __init__(self, block: nn.Module, h: Tensor, during: AbstractContextManager[Any]):
        self.block, self.h, self.during = block, h.detach(), during
        self.graph: Tensor | None = None

    def forward(self) -> Tensor:
        self.out = self.forward_with_graph().detach()
        return self.out

    def forward_with_graph(self) -> Tensor:
        with self.during:
            self.graph = run_block(self.block, self.h)
        return self.graph

    def begin(self) -> None:
        if self.graph is None:
            self.forward()

    def learn(self, signal: Signal, in_place_sgd: torch.optim.Optimizer | None = None) -> bool:
        self.begin()
        graph, self.graph = self.graph, None
        if graph is None or not graph.requires_grad:  # the block is not taught in this step, as in layer dropout
            return False
        graph.backward(signal.cast(self.out.dtype).shaped_like(self.out))
        return True

    def output(self) -> Tensor:
        if not hasattr(self, "out"):
            self.forward()
            self.graph = None
        return self.out
