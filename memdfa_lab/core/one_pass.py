"""What the rules have in common that go through the network once, and teach each block before the next one runs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memdfa_lab.core.checks import check_finite
from memdfa_lab.core.contract import check_lengths, rows
from memdfa_lab.core.local import BlockGradient
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.terms import OWN, loss_and_error

Shapes = tuple[tuple[int, ...], ...]


class OnePass(Rule):
    """What the rules of one pass have in common.

    A block has learned before the next one runs. An error in the loss of a batch, such as labels out of range, is
    therefore noticed only after all blocks but the last have learned from it; the first batch of a shape is tried
    before. Penalties on weights in the loss are refused: they become known only after those weights have learned.
    """

    teaches_blocks = True
    so_far = "earlier blocks have learned"
    prepares = True  # the first step does what later ones do not
    shapes: Shapes = ()  # of each block's output for one example of this batch
    known: Mapping[tuple[int, ...], Shapes] = {}  # the same, for each size of x that there was

    def check(self) -> None:
        given = {"clip_global_norm": self.clip_global_norm, "pass1": self.pass1, "pack": self.pack}
        given |= {"float16": self.precision == "float16", "feedback that learns": self.feedback.learns}
        if needless := [name for name, value in given.items() if value]:
            raise ValueError(f"{type(self).__name__} goes through the blocks once: leave {needless[0]} out")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last, lengths = self.begin(x, y), len(self.chain) - 1, []
        self.prepare(h, y)
        for i in range(last):
            block = self.run(i, h)
            h = self.teach(i, block, self.local_error(i, block, y)) if self.parameters[i] else block.output()
            lengths.append(rows(h))
            del block  # with its input
        block = self.keep(last, h)
        check_lengths(self.chain, [*lengths, rows(block.output())])
        loss, e = self.error(block.output(), y)
        self.teach(last, block, e)
        return loss

    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Find the shapes of the blocks' outputs on x (N, ...), and make what depends on them, unless that is done.

        Raises ValueError, before any change, if it was made for other shapes.
        """
        size = tuple(x.shape[1:])
        if size not in self.known:
            shapes: list[tuple[int, ...]] = []
            forward_without_trace(self.chain, x, see=lambda way, h: shapes.append(tuple(h.shape[1:])))
            self.known = {**self.known, size: tuple(shapes)}
        self.shapes = self.known[size]

    def run(self, i: int, h: Tensor) -> BlockGradient:
        """Return block i on h (N, ...)."""
        return self.keep(i, h)

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Return the tensor from which block i's signal is made, in place of DFA's e."""
        raise NotImplementedError

    def whole_gradient(self, what: str, loss_fn: Loss, out: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of the whole batch's loss, `what`, with respect to this process's `out` (n, ...)."""

        def compute(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return loss_and_error(loss_fn, out, y, self._owners)[:2]

        loss, e = self.group.error(loss_fn, compute, out.detach(), y)
        check_finite(f"{what} is not finite", loss, e, so_far=self.so_far)
        return e

    def _loss_and_error(self, logits: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        loss, e = super()._loss_and_error(logits, y)
        if self._terms is not None and self._terms.leaves.keys() - {OWN}:
            raise ValueError(
                f"the loss has a penalty on weights, which have learned by then: {type(self).__name__} leaves it out; "
                "set the optimizer's weight_decay, or take MemDFA"
            )
        return loss, e
