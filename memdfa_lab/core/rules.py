"""The four learning rules side by side: backpropagation (BP), FA, DFA and MEM-DFA.

h_0 = x, block i computes h_i from h_{i-1}, the last h is the logits, and e = dloss/dlogits, of shape (N, C). The rules
differ in the signal that teaches a block, which is the error at its output, and in what they keep in memory at once:

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
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_number, lookup
from memdfa_lab.core.contract import check_lengths, rows, two_sums, warn_if_other
from memdfa_lab.core.feedback import Feedback, Stored
from memdfa_lab.core.local import BlockGradient, ByAutograd
from memdfa_lab.core.precision import BlockFloat, first_pass
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.state import OptimizerFactory, learning, optimizer_tensors
from memdfa_lab.core.store import TEACH, Store
from memdfa_lab.core.sweep import sweep
from memdfa_lab.core.transport import FeedbackTransport


class BP(Rule):
    """Backpropagation: the exact gradient, with every activation in memory."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        for i in range(len(self.blocks)):
            h = self.forward(i, h)
        loss, e = self.error(h, y)
        self.backward(h, e)
        self.update_all(range(len(self.blocks)))
        return loss


class FA(Rule):
    """Feedback alignment: BP with a fixed random B for each weight in the backward pass (Lillicrap et al. 2016)."""

    uses_feedback = True

    def check(self) -> None:
        if self.feedback.learns:
            raise ValueError("only DFA and MEM-DFA learn B, where it teaches a block: give FA Stored or Regenerated")

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
    """Direct feedback alignment: e B_i teaches block i, whose activations are kept until then (Nøkland 2016)."""

    teaches_blocks = uses_feedback = teaches_feedback = True

    def check(self) -> None:
        if self.feedback.learns and self.clip_global_norm is not None:
            raise ValueError("DFA finds the norm of all gradients after B has learned: take MemDFA, or clip_norm")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        kept: deque[BlockGradient] = deque()
        narrow = first_pass(self.pass1, h)
        first = None if narrow is None else self.error(forward_without_trace(self.chain, h, narrow=narrow), y)
        for i in range(len(self.blocks)):
            kept.append(self.keep(i, h))
            h = kept[-1].output()
        check_lengths(self.chain, [rows(block.output()) for block in kept])
        loss, e = first or self.error(h, y)
        if first and not self._has_warned:
            self.warn_if_turned(e, h, y)
        del h, first
        for i in range(len(self.blocks)):
            self.teach(i, kept.popleft(), e)
        if self.clip_global_norm is not None:
            self.update_all(range(len(self.blocks)))
        return loss


class MemDFA(Rule):
    """MEM-DFA (Chu et al. 2020): DFA's updates, bit for bit, with one block's activations and one more forward pass.

    A block must compute the same in both passes. The generators of torch, numpy and Python, the
    block's buffers and its attributes are therefore restored before the second pass. If the logits differ all the same,
    the step warns once, and `ml.check` says which block differs. Where torch uses another kernel with a graph than
    without (attention, for example), the logits differ by about 1e-7, and the updates differ from DFA's as little.

    `keep_bytes`: as many blocks as fit into this many bytes, from the first on, are kept from pass 1 as in DFA, and
    only the other blocks run again. 0 is the paper's MEM-DFA; with infinity no block runs twice. With `pack` the bytes
    are those of the packed blocks, and of the last one's output, which stays exact. Raises ValueError for less than 0.
    """

    teaches_blocks = leaves_blocks = uses_feedback = teaches_feedback = True

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
        pass1: str | BlockFloat | None = None,
        offload: Store | None = None,
        pack: str | BlockFloat | None = None,
        keep_bytes: float = 0,
        **unknown: Any,
    ):
        options: Any = {"clip_global_norm": clip_global_norm, "precision": precision, "pass1": pass1, "pack": pack}
        super().__init__(blocks, optimizer, loss_fn, feedback, clip_norm, offload=offload, **options, **unknown)
        if keep_bytes and offload is not None:
            raise ValueError("keep_bytes keeps blocks in memory, and offload takes them out: give one of them")
        if keep_bytes and clip_global_norm is not None:
            raise ValueError("clip_global_norm runs each block once more: leave keep_bytes out, or take DFA")
        if keep_bytes != math.inf:
            check_number("keep_bytes", keep_bytes)
        if keep_bytes and kept_bytes is None:
            raise ValueError("keep_bytes needs the counter of memdfa_lab.memory: import that first")
        self.keep_bytes = keep_bytes
        self.sweeps = False  # whether the next step's pass 1 runs beside this one's pass 2
        self._fitting: dict[tuple[torch.Size, torch.dtype], int] = {}
        self.store.take(self)

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

        narrow = first_pass(self.pass1, x)
        logits = forward_without_trace(self.chain[len(kept) :], h, len(kept), see, narrow=narrow, store=self.store)
        check_lengths(self.chain, lengths)
        by_autograd = ByAutograd in run_twice and narrow is None  # by hand, the second pass cannot differ
        sums = two_sums(logits) if by_autograd else None
        loss, e = self.error(logits, y)
        first_e = None if narrow is None or self._has_warned else e.clone()  # the last block may change e
        del logits
        if self.clip_global_norm is not None:
            self.find_norm(h, e)
        for i in range(len(self.blocks)):  # h_i comes from the old W_i, which is not needed again
            with self.store.block(i, TEACH):
                if kept:  # h is the last one's output already
                    self.teach(i, kept.popleft(), e)
                else:
                    h = self.teach(i, self.recompute(i, h), e)
        self.store.end_step()
        if sums is not None and not self._has_warned:
            self._has_warned = warn_if_other(sums, h)
        if first_e is not None:
            self.warn_if_turned(first_e, h, y)
        return loss

    def sweep(self, batches: Iterable[tuple[Tensor, Any]]) -> Iterator[Tensor]:
        """Learn from each batch (x, y), and yield its loss: the same numbers as `step` on each batch, bit for bit.

        Pass 2 of a batch and pass 1 of the next go through the blocks together, so that tensors in a store are read and
        written once a step. The next batch is taken before a loss is yielded; the caller must therefore not change
        weights or draw random numbers between losses. Raises what `step` raises, after learning from the batch before;
        ValueError with keep_bytes, clip_global_norm or several ranks. If the loss draws random numbers, `step` is used
        instead; RuntimeError if the loss starts to draw later.
        """
        given = {
            "keep_bytes": self.keep_bytes,
            "clip_global_norm": self.clip_global_norm,
            "several ranks": self.group.size > 1,
        }
        if others := [name for name, value in given.items() if value]:
            raise ValueError(f"a sweep visits each block once: use step with {', '.join(others)}")
        self.sweeps = True
        try:
            yield from sweep(self, batches)
        finally:
            self.sweeps = False

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return what the rule keeps between steps, by category; tensors in a store count as "offloaded"."""
        found = super().tensors()
        if not self.store.offloads:
            return found
        stays = {id(t) for t in [*learning(self.loss_fn), *optimizer_tensors([self.loss_optimizer])]}
        if not isinstance(self.feedback, Stored):
            stays |= {id(B) for B in found["feedback"]}
        parts = {name: [t for t in tensors if id(t) in stays] for name, tensors in found.items()}
        return {**parts, "offloaded": [t for tensors in found.values() for t in tensors if id(t) not in stays]}

    def _how_many_fit(self, x: Tensor) -> int:
        """Return how many blocks, from the first on, fit into `keep_bytes`; computed once for each shape of x."""
        key = (x.shape, x.dtype)
        if key not in self._fitting:
            sizes = kept_bytes(self.blocks, x, self.packing) if self.keep_bytes and kept_bytes is not None else []
            self._fitting[key] = sum(total <= self.keep_bytes for total in accumulate(accumulate(sizes), max))
        return self._fitting[key]


RULES: dict[str, type[Rule]] = {"bp": BP, "fa": FA, "dfa": DFA, "memdfa": MemDFA}
ALL_RULES: dict[str, type[Rule]] = {**RULES}  # `rivals` adds the baselines
# How many bytes each block keeps from a forward pass on x. `memory` counts them, and puts its counter here.
kept_bytes: Callable[..., list[int]] | None = None


def find_rule(name: str) -> type[Rule]:
    """Return the rule or baseline of that name. Raises ValueError, with the nearest name, if there is none."""
    return lookup("rule", name, ALL_RULES)
