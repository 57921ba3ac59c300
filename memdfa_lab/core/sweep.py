"""Pass 2 of a batch and pass 1 of the next, side by side: each block is visited once a step.

A block is taught, and at once the next batch passes it with the new weights. The numbers are those of `step` after
`step`, bit for bit: BatchNorm's statistics are restored after pass 1 as there, and each pass draws from generators in
the state that they would have. That state is known because both passes of a batch draw the same: where pass 1 ended,
pass 2 will end.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.contract import check_lengths, rows, two_sums, warn_if_other
from memdfa_lab.core.local import ByAutograd
from memdfa_lab.core.phases import phase
from memdfa_lab.core.precision import first_pass
from memdfa_lab.core.recompute import state_of, state_restored, without_trace
from memdfa_lab.core.store import FORWARD, TEACH


def sweep(rule: Any, batches: Iterable[tuple[Tensor, Any]]) -> Iterator[Tensor]:
    """Learn from each batch, and yield its loss; `rule` is a MemDFA, whose `sweep` says more."""
    coming = iter(batches)
    with rule.autocast():
        batch = _next(rule, coming)
        if batch is not None:
            for i in range(len(rule.chain)):
                with rule.store.block(i, FORWARD):
                    batch.pass_block(i)
    if batch is not None and batch.loss_draws():  # then what comes after the loss is not known
        for x, y in chain([(batch.x, batch.y)], coming):
            yield rule.step(x, y)
        return
    while batch is not None:
        with rule.autocast():
            problem, after = None, None
            try:
                after = _next(rule, coming, batch)
            except Exception as given:  # this batch is taught all the same
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
    """Return the next batch, which is drawn, and begun, as it would be after the one before."""
    now = _generators(rule)
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
        self.begin = self.end = _generators(rule)  # put the generators into the state before and after the pass

    def pass_block(self, i: int) -> None:
        """Run block i, which leaves no trace; the generators are as they were."""
        now = _generators(self.rule)
        self.end()
        try:
            with torch.no_grad(), phase("forward", i):
                way, self.h = without_trace(i, self.rule.chain[i], self.h, narrow=self.narrow)
            self.end = _generators(self.rule)
        finally:
            now()
        self.by_hand = self.by_hand and way is not ByAutograd
        self.lengths.append(rows(self.h))

    def loss_draws(self) -> bool:
        """Tell whether the loss draws random numbers, and leave it as it is."""
        loss_fn = self.rule.loss_fn
        restored = state_restored(loss_fn) if isinstance(loss_fn, nn.Module) else nullcontext()
        now, before = _generators(self.rule), _states(self.rule)
        try:
            with restored, torch.no_grad():
                loss_fn(self.h, self.y)
            return not all(map(_same, before, _states(self.rule)))
        finally:
            now()

    def find_error(self) -> None:
        """Find the loss and e. Raises RuntimeError if the loss draws random numbers, which pass 2 would draw after."""
        self.begin()
        logits, rule = self.h, self.rule
        del self.h
        check_lengths(rule.chain, self.lengths)
        self.sums = None if self.by_hand or self.narrow else two_sums(logits)
        before = _states(rule)
        self.loss, self.e = rule.error(logits, self.y)
        if not all(map(_same, before, _states(rule))):
            raise RuntimeError("the loss has begun to draw random numbers, and what comes after is not known: use step")
        self.first_e = self.e.clone() if self.narrow and not rule._has_warned else None  # the last block may change e

    def check(self, logits: Tensor) -> None:
        """Warn, once, if pass 2 ended with other logits, or after a cheap pass 1 with another e."""
        if self.sums is not None and not self.rule._has_warned:
            self.rule._has_warned = warn_if_other(self.sums, logits)
        if self.first_e is not None:
            self.rule.warn_if_turned(self.first_e, logits, self.y)


def _sources(rule: Any) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return how to take and set the state of each generator: of torch, Python and numpy."""
    numpy: Any = sys.modules.get("numpy")
    found = [torch.default_generator, random, getattr(numpy, "random", None)]
    if rule.device == "cuda":
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return [state_of(generator) for generator in found]


def _states(rule: Any) -> list[Any]:
    return [get() for get, _ in _sources(rule)]


def _generators(rule: Any) -> Callable[[], None]:
    """Return a function that puts all generators into the state that they have now."""
    states = [(put, get()) for get, put in _sources(rule)]

    def restore() -> None:
        for put, state in states:
            put(state)

    return restore


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else repr(one) == repr(other)
