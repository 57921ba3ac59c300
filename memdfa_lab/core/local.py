"""The gradient of one block: from its input h_{i-1} and a signal s at its output h_i to the gradients of its weights.

For a = h_{i-1} W^T + b and h_i = f(a), with s of h_i's shape (N, n_i):

    dW = (s * f'(a))^T h_{i-1},    db = sum over the batch of s * f'(a).

Autograd does this for any block: `ByAutograd` below. For common blocks `by_hand` computes the same numbers in less
memory.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memdfa_lab.core import by_hand
from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.compat import storage_id
from memdfa_lab.core.signal import Signal


class BlockGradient(Protocol):
    """A block on its input h (N, ...): a forward pass, then the gradient of the weights for a signal at the output."""

    def forward(self) -> Tensor:
        """Run the block, keep what its gradient needs, and return the output."""

    def begin(self) -> None:
        """Run what is learned first, unless the block has run."""

    def learn(self, signal: Signal, in_place_sgd: torch.optim.Optimizer | None = None) -> None:
        """Leave the gradient in the weights. A weight that this optimizer would change by -lr dW may be changed now."""

    def output(self) -> Tensor:
        """Return the block's output; a block that has not run is run, and keeps nothing."""


def block_gradient(block: nn.Module, h: Tensor, during: AbstractContextManager[Any] | None = None) -> BlockGradient:
    """Return the gradient of a block on h (N, ...), by hand where that can be; nothing has run yet.

    `during` is entered around each forward pass.
    """
    during = during or nullcontext()
    return by_hand.block_gradient(block, h, during) or ByAutograd(block, h, during)


class ByAutograd:
    """`BlockGradient` of any block, by autograd."""

    def __init__(self, block: nn.Module, h: Tensor, during: AbstractContextManager[Any]):
        self.block, self.h, self.during = block, h.detach(), during
        self.graph: Tensor | None = None

    def forward(self) -> Tensor:
        with self.during:
            self.graph = run_block(self.block, self.h)
        self.out = self.graph.detach()
        return self.out

    def begin(self) -> None:
        if self.graph is None:
            self.forward()

    def learn(self, signal: Signal, in_place_sgd: torch.optim.Optimizer | None = None) -> None:
        self.begin()
        graph, self.graph = self.graph, None
        assert graph is not None
        if graph.requires_grad:
            graph.backward(signal.shaped_like(self.out))
        elif storage_id(graph) != storage_id(self.h):  # a block that returns its input, as layer dropout does, may rest
            raise RuntimeError(
                f"{type(self.block).__name__} puts out a tensor without a graph, so that it would never learn: set "
                "use_reentrant=False in its checkpoint, or leave torch.no_grad out"
            )

    def output(self) -> Tensor:
        if not hasattr(self, "out"):
            self.forward()
            self.graph = None
        return self.out
