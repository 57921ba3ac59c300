"""Backpropagation one block at a time: each block is run again for its gradient, and updated before the one below it.

Memory holds one block's graph and gradients, and what the rule keeps in order to find the blocks' inputs again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.compat import buffers_of
from memdfa_lab.core.generators import drawn, hold, states
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.recompute import state_restored
from memdfa_lab.core.rule import Rule

T = TypeVar("T")


class ByBlock(Rule):
    """What rules that go back one block at a time have in common.

    All runs of a block but the last leave no trace: its buffers and attributes are restored. The last run, from which
    the block learns, changes them once, as in BP. Blocks before `learns_from`, the first that learns, are run once. A
    signal is the gradient at a block's output; it is passed in a list, which is empty if there is no gradient. Raises
    ValueError for clip_global_norm.
    """

    learns_from = 0

    def check(self) -> None:
        if self.clip_global_norm is not None:
            raise ValueError("a step in backward has no norm over all gradients: use clip_norm, BP or CheckpointBP")
        self._draws: set[int] = set()  # the generators from which a forward pass drew
        self._changes = [any(map(_may_change, block.modules())) for block in self.chain]

    def to_first(self, h: Tensor) -> Tensor:
        """Find the first block that learns, and return its input for the batch h (N, ...)."""
        self.learns_from = next((i for i, block in enumerate(self.parameters) if block), 0)
        for i in range(self.learns_from):
            h = self.forward(i, h)
        return h

    def hold(self) -> Callable[[], None]:
        """Return a function that restores the present state of the generators from which blocks draw."""
        return hold(self.device, self._draws) if self._draws else _nothing

    def first_pass(self, run: Callable[[], T]) -> T:
        """Return run(), which takes the batch through the blocks and calls `hold` on its way.

        run() is called again if a block drew from a generator that was not held.
        """
        while True:
            before, back = states(self.device), hold(self.device)
            out = run()
            draws = drawn(before, states(self.device))
            if draws <= self._draws:
                return out
            self._draws |= draws
            del out
            back()

    def run(self, i: int, h: Tensor, name: str = "forward") -> Tensor:
        """Return block i's output on h (N, ...); everything else that the block changes is restored.

        It runs with a graph, which is dropped: without a graph, torch uses another kernel for attention.
        """
        with phase(name, i), self.restored(i):
            return run_block(self.chain[i], h.detach()).detach()

    def restored(self, i: int) -> AbstractContextManager[None]:
        """Restore on leaving the buffers and attributes that block i changes."""
        return state_restored(self.chain[i]) if self._changes[i] else nullcontext()

    def learn_last(self, h: Tensor, y: Any) -> tuple[Tensor, list[Tensor], Callable[[], None]]:
        """Run the last block on h (N, ...), and teach it.

        Return the loss, the signal for the block below, and a function that sets all generators as BP would leave them.
        """
        last, caught = len(self.chain) - 1, list[Tensor]()
        with phase("forward", last):
            out = with_graph(self.chain[last], h, caught if last > self.learns_from else None)
        loss, e = self.error(out, y)
        after = hold(self.device)
        ends, signals = [out], [e]
        del out, e, h
        self.go_back(ends, signals)
        self.update(last)
        return loss, caught, after

    def learn(self, i: int, h: Tensor, signals: list[Tensor]) -> None:
        """Run block i on h (N, ...), teach it by the signal, and replace the signal by that for the block below."""
        caught = list[Tensor]()
        with phase("recompute", i):
            ends = [with_graph(self.chain[i], h, caught if i > self.learns_from else None)]
        del h
        self.go_back(ends, signals)
        signals[:] = caught
        caught.clear()
        self.update(i)

    def go_back(self, ends: list[Tensor], signals: list[Tensor]) -> None:
        """Run the backward pass from the output in `ends` with the signal in `signals`, if any; empty both lists.

        Only autograd then holds these tensors, and frees them on the way, as in the middle of BP's graph.
        """
        if signals and ends[0].requires_grad:
            start = label("error", _Start.apply(ends.pop(), signals))
            self.backward(start, start.detach())
        ends.clear()
        signals.clear()


def _may_change(module: nn.Module) -> bool:
    """Tell whether a forward pass may change the module; torch's own modules change buffers only."""
    says_not = getattr(type(module), "changes_nothing", False)
    return bool(buffers_of(module)) or not (says_not or type(module).__module__.startswith("torch.nn.modules."))


def _nothing() -> None:
    pass


def with_graph(part: nn.Module, h: Tensor, caught: list[Tensor] | None) -> Tensor:
    """Return the part's output on h (N, ...); the backward pass puts h's gradient into `caught`, if it is a list."""
    h = h.detach()
    if caught is not None and h.is_floating_point():
        h = _Catch.apply(h.requires_grad_(), caught)
    return run_block(part, h)


class _Start(torch.autograd.Function):
    """The start of a backward pass: it takes the signal out of the list, and passes it on."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, signals: list[Tensor]) -> Tensor:
        ctx.signals = signals
        return h.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.signals.pop(), None


class _Catch(torch.autograd.Function):
    """The identity. Unlike a leaf it stores its gradient without copying it or changing its layout."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.caught.append(gradient)
        return None, None
