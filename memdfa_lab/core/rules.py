"""The four learning rules, one under the other: backpropagation, FA, DFA and MEM-DFA.

h_0 = x, block i makes h_i from h_{i-1}, the last h is the logits, and e = dloss/dlogits, of shape (N, C). The rules
differ in the signal that a block is taught, the error at its output, and in what they keep in memory at once:

| rule    | signal at the output of block i          | in memory at once        |
|---------|------------------------------------------|--------------------------|
| BP      | the next block's, through W_{i+1}^T      | every h_i                |
| FA      | the next block's, through a random B     | every h_i                |
| DFA     | e B_i, straight from the output          | every h_i                |
| MEM-DFA | e B_i                                    | one block's h_{i-1}, h_i |

Sources: FA, Lillicrap et al. 2016; DFA, Nøkland 2016; MEM-DFA, Chu et al. 2020 (arXiv 2012.11745).
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_number, lookup
from memdfa_lab.core.contract import check_lengths, rows, two_sums, warn_if_other
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.local import BlockGradient, ByAutograd
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.state import OptimizerFactory
from memdfa_lab.core.transport import FeedbackTransport


class BP(Rule):
    """Backpropagation: the exact gradient, at the price of every activation in memory."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        for i in range(len(self.blocks)):
            h = self.forward(i, h)
        loss, e = self.error(h, y)
        self.backward(h, e)
        self.update_all(range(len(self.blocks)))
        return loss


class FA(Rule):
    """Feedback alignment: BP, with a fixed random B in place of each weight on the way back."""

    def transport(self) -> FeedbackTransport:
        return FeedbackTransport(self.feedback, self.blocks)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        transport = self.transport()
        with transport:
            for i in range(len(self.blocks)):
                h = self.forward(i, h)
        loss, e = self.error(h, y)
        with transport.backward_pass():
            self.backward(h, e)
        self.update_all(range(len(self.blocks)))
        return loss


class DFA(Rule):
    """Direct feedback alignment: each block is taught from the output; what that needs is kept until then."""

    teaches_blocks = True

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        kept: deque[BlockGradient] = deque()
        for i in range(len(self.blocks)):
            kept.append(self.keep(i, h))
            h = kept[-1].output()
        check_lengths(self.chain, [rows(block.output()) for block in kept])
        loss, e = self.error(h, y)
        for i in range(len(self.blocks)):
            self.teach(i, kept.popleft(), e)
        if self.clip_global_norm is not None:
            self.update_all(range(len(self.blocks)))
        return loss


class MemDFA(Rule):
    """MEM-DFA: DFA's updates, bit for bit, with one block's activations at a time and one more forward pass.

    A block must do the same twice. What it draws from the generators of torch, numpy and Python, its buffers and its
    attributes are restored before the second pass; if the logits differ all the same, the step warns, once, and
    `ml.check` says which block it is. Where torch takes another kernel with a graph than without (attention, for
    example), they differ by about 1e-7, and so do the updates from DFA's.

    `keep_bytes`: as many blocks as fit into it, from the first on, are kept from pass 1 as in DFA, and only the rest is
    run again. 0 is the paper's MEM-DFA; with infinity no block is run twice. Raises ValueError for less than 0.
    """

    teaches_blocks = True

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
        *,
        clip_global_norm: float | None = None,
        precision: str | None = None,
        keep_bytes: float = 0,
    ):
        both: Any = {"clip_global_norm": clip_global_norm, "precision": precision}
        super().__init__(blocks, optimizer, loss_fn, feedback, clip_norm, **both)
        if keep_bytes and clip_global_norm is not None:
            raise ValueError("clip_global_norm runs each block once more: leave keep_bytes out, or take DFA")
        if keep_bytes != math.inf:
            check_number("keep_bytes", keep_bytes)
        if keep_bytes and kept_bytes is None:
            raise ValueError("keep_bytes needs the counter of memdfa_lab.memory: import that first")
        self.keep_bytes = keep_bytes
        self._has_warned = False  # that the second pass differs from the first
        self._fitting: dict[tuple[torch.Size, torch.dtype], int] = {}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        kept: deque[BlockGradient] = deque()
        for i in range(self._how_many_fit(h)):
            kept.append(self.keep(i, h))
            h = kept[-1].output()
        lengths = [rows(block.output()) for block in kept]
        run_twice: list[type] = []

        def see(way: type, h: Tensor) -> None:
            run_twice.append(way)
            lengths.append(rows(h))

        logits = forward_without_trace(self.chain[len(kept) :], h, len(kept), see)
        check_lengths(self.chain, lengths)
        sums = two_sums(logits) if ByAutograd in run_twice else None  # by hand, the second pass cannot differ
        loss, e = self.error(logits, y)
        del logits
        if self.clip_global_norm is not None:
            self.find_norm(h, e)
        for i in range(len(self.blocks)):  # h_i comes from the old W_i, which is not needed again
            h = self.teach(i, kept.popleft() if kept else self.recompute(i, h), e)
        if sums is not None and not self._has_warned:
            self._has_warned = warn_if_other(sums, h)
        return loss

    def _how_many_fit(self, x: Tensor) -> int:
        """Return how many of the first blocks fit into `keep_bytes`; counted once for each shape of x."""
        key = (x.shape, x.dtype)
        if key not in self._fitting:
            sizes = kept_bytes(self.blocks, x) if self.keep_bytes and kept_bytes is not None else []
            self._fitting[key] = sum(total <= self.keep_bytes for total in accumulate(sizes))
        return self._fitting[key]


RULES: dict[str, type[Rule]] = {"bp": BP, "fa": FA, "dfa": DFA, "memdfa": MemDFA}
ALL_RULES: dict[str, type[Rule]] = {**RULES}  # `rivals` adds the baselines
# How many bytes each block keeps from a forward pass on x. `memory` counts them, and puts its counter here.
kept_bytes: Callable[[nn.Sequential, Tensor], list[int]] | None = None


def find_rule(name: str) -> type[Rule]:
    """Return the rule or baseline of that name. Raises ValueError, with the nearest name, if there is none."""
    return lookup("rule", name, ALL_RULES)
