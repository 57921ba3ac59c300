"""Pass 2 of a batch together with pass 1 of the next batch: each block is visited once a step.

A block is taught, and the next batch then passes it at once, with the new weights. The numbers equal those of one
`step` after another, bit for bit: BatchNorm's statistics are restored after pass 1 as in `step`, and each pass draws
from generators in the state that they would have there. That state is known because both passes of a batch draw the
same numbers: pass 2 leaves the generators as pass 1 left them.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.contract import check_lengths, rows, two_sums, warn_if_other
from memdfa_lab.core.generators import drawn, hold, states
from memdfa_lab.core.local import ByAutograd
from memdfa_lab.core.phases import phase
from memdfa_lab.core.precision import first_pass
from memdfa_lab.core.recompute import state_restored, without_trace
from memdfa_lab.core.store import FORWARD, TEACH


def sweep(rule: Any, batches: Iterable[tuple[Tensor, Any]]) -> Iterator[Tensor]:
    """Learn from each batch, and yield its loss; `rule` is a MemDFA; see its `sweep`."""
    coming = iter(batches)
    with rule.autocast():
        batch = _next(rule, coming)
        if batch is not None:
            for i in range(len(rule.chain)):
                with rule.store.block(i, FORWARD):
                    batch.pass_block(i)
    if batch is not None and batch.loss_draws():  # then the generators' state after the loss is not known
        for x, y in chain([(batch.x, batch.y)], coming):
            yield rule.step(x, y)
        return
    while batch is not None:
        with rule.autocast():
            problem, after = None, None
            try:
                after = _next(rule, coming, batch)
            except Exception as given:  # this batch is learned from first
                problem = given
            batch.find_error()
            h = batch.x
            for i in range(len(rule.chain)):
                with rule.store.block(i, TEACH):
                    h = rule.teach(i, rule.recompute(i, h), batch.e)
                    if after is not None:
                        after.pass_block(i)
            batch.check(h)
            rule.store.end_step()
        loss, batch = batch.loss, after
        yield loss
        if problem is not None:
            raise problem


def _next(rule: Any, batches: Iterator[tuple[Tensor, Any]], before: "_Batch | None" = None) -> "_Batch | None":
    """Return the next batch, drawn and begun with the generators as they would be after the batch before."""
    now = hold(rule.device)
    if before is not None:
        before.end()
    try:
        given = next(batches, None)
        return None if given is None else _Batch(rule, *given)
    finally:
        if before is not None:
            now()


class _Batch:
    """A batch on its way through the blocks in pass 1."""

    def __init__(self, rule: Any, x: Tensor, y: Any):
        self.rule, self.y = rule, y
        self.x = self.h = rule.begin(x, y)
        self.narrow = first_pass(rule.pass1, self.x)
        self.lengths: list[int] = []
        self.by_hand = True
        self.begin = self.end = hold(rule.device)  # functions that restore the generators to before and after the pass

    def pass_block(self, i: int) -> None:
        """Run block i in pass 1; its state and the generators are restored."""
        now = hold(self.rule.device)
        self.end()
        try:
            with torch.no_grad(), phase("forward", i):
                way, self.h = without_trace(i, self.rule.chain[i], self.h, narrow=self.narrow)
            self.end = hold(self.rule.device)
        finally:
            now()
        self.by_hand = self.by_hand and way is not ByAutograd
        self.lengths.append(rows(self.h))

    def loss_draws(self) -> bool:
        """Tell whether the loss draws random numbers; its state is restored."""
        loss_fn = self.rule.loss_fn
        restored = state_restored(loss_fn) if isinstance(loss_fn, nn.Module) else nullcontext()
        now, before = hold(self.rule.device), states(self.rule.device)
        try:
            with restored, torch.no_grad():
                loss_fn(self.h, self.y)
            return bool(drawn(before, states(self.rule.device)))
        finally:
            now()

    def find_error(self) -> None:
        """Find the loss and e. Raises RuntimeError if the loss draws random numbers, which pass 2 would follow."""
        self.begin()
        logits, rule = self.h, self.rule
        del self.h
        check_lengths(rule.chain, self.lengths)
        self.sums = None if self.by_hand or self.narrow else two_sums(logits)
        before = states(rule.device)
        self.loss, self.e = rule.error(logits, self.y)
        if drawn(before, states(rule.device)):
            raise RuntimeError("the loss has begun to draw random numbers, and what comes after is not known: use step")
        self.first_e = self.e.clone() if self.narrow and not rule._has_warned else None  # the last block may change e

    def check(self, logits: Tensor) -> None:
        """Warn, once, if pass 2 gave other logits or, after a pass 1 in fewer bits, another e."""
        if self.sums is not None and not self.rule._has_warned:
            self.rule._has_warned = warn_if_other(self.sums, logits)
        if self.first_e is not None:
            self.rule.warn_if_turned(self.first_e, logits, self.y)
