"""A deep network's step from a shallow one's: blocks that are alike do alike, so that their events can be repeated.

In a chain of which all blocks but the first and the last are alike, one more of them adds the same events to each pass
over the blocks, and changes no others; under checkpointing, so does one more segment. And a storage either holds the
batch, and grows by the same bytes with each example, or does not: which of them do, a batch tells that is a multiple of
a large prime. So one prediction of a shallow chain gives the step at any depth and batch, event for event: nothing is
fitted, and tests/test_deep.py holds it to `predict`, to the byte.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from memdfa_lab.memory.trace import CATEGORIES, Trace

PRIME = 1_000_003  # larger than any size that is not the batch's, so that it divides the bytes of what holds the batch


class Step(NamedTuple):
    """What a step holds: what rests, and in `changes` the bytes of each birth (above 0) and free, in order."""

    resting_by_category: dict[str, int]
    changes: np.ndarray
    categories: np.ndarray  # of each: its place in CATEGORIES
    phases: np.ndarray

    @property
    def resting_bytes(self) -> int:
        return sum(self.resting_by_category.values())

    @property
    def totals(self) -> np.ndarray:
        """The bytes above rest, before the step and after each event."""
        return np.concatenate([[0], self.changes.cumsum()])

    @property
    def peak_bytes(self) -> int:
        return int(self.totals.max())

    @property
    def peak_by_category(self) -> dict[str, int]:
        at = int(self.totals.argmax())
        sums = np.bincount(self.categories[:at], self.changes[:at], len(CATEGORIES))  # floats, exact to 2^53 bytes
        return {name: int(value) for name, value in zip(CATEGORIES, sums, strict=True) if value}


class Visit(NamedTuple):
    """Events that follow one another at one block, from start to stop; None: between the passes over the blocks."""

    block: int | None
    start: int
    stop: int


class Run(NamedTuple):
    """Events from start to stop, so many times over."""

    start: int
    stop: int
    times: int


class Chain:
    """The steps of one rule in chains of any number of blocks, all alike but for the first and the last.

    `predicted(blocks, batch)` predicts one of them, `resting(blocks)` what it rests by category, whatever the batch.
    `linear_from`: the batch from which on every storage that holds one grows in proportion to it, if it is a multiple
    of `period`; any other batch is predicted by itself. `segmented`: the rule runs forward again in
    round(sqrt(blocks)) segments. `least_batch` is the smallest that the network takes.
    """

    def __init__(
        self,
        predicted: Callable[[int, int], Trace],
        resting: Callable[[int], Mapping[str, int]],
        linear_from: int = 2,
        period: int = 1,
        segmented: bool = False,
        least_batch: int = 1,
    ):
        self.predicted, self.resting, self.period, self.segmented = predicted, resting, period, segmented
        self.least_batch, self.linear_from = least_batch, max(linear_from, least_batch)
        self.shallow = [3, 3, 3] if segmented else [4]  # the sizes of its segments, as in `_sizes`
        self._steps: dict[tuple[int, int], tuple[Step, list[Visit]]] = {}
        self._a_block: dict[str, int] | None = None

    def step(self, blocks: int, batch: int) -> Step:
        """Return the step at this depth (blocks: the hidden layers and the last) and batch."""
        step, runs = self._shallow(blocks, batch)
        places = np.concatenate([np.tile(np.arange(run.start, run.stop), run.times) for run in runs])
        return Step(step.resting_by_category, *(values[places] for values in step[1:]))

    def peak_bytes(self, blocks: int, batch: int) -> int:
        """Return the step's peak above rest, in a time that does not grow with its depth."""
        step, runs = self._shallow(blocks, batch)
        return _peak_bytes(step.changes, runs)

    def held_bytes(self, blocks: int, batch: int) -> int:
        """Return all that is held at the peak, with what rests."""
        step, runs = self._shallow(blocks, batch)
        return step.resting_bytes + _peak_bytes(step.changes, runs)

    def _shallow(self, blocks: int, batch: int) -> tuple[Step, list[Run]]:
        """Return a shallow step with the deep one's rest, and the deep one's events as runs of its own."""
        sizes, least = self._sizes(blocks), sum(self.shallow)
        if min(sizes) < 2 or blocks < 3:  # a block is the first and the last of its segment: unlike any other
            step, _ = self._at(blocks, batch)
            return step, [Run(0, len(step.changes), 1)]
        step, visits = self._at(least, batch)
        if self._a_block is None:
            one_more = {**self.resting(least + 1), "input": step.resting_by_category["input"]}
            self._a_block = {name: one_more[name] - value for name, value in step.resting_by_category.items()}
        resting = {
            name: value + (blocks - least) * self._a_block[name] for name, value in step.resting_by_category.items()
        }
        return step._replace(resting_by_category=resting), _repeated(visits, self.shallow, sizes)

    def largest_batch(self, budget_bytes: int, blocks: int) -> int:
        """Return a batch that fits while one example more does not (`period` from `linear_from` on); 0 if none fits."""
        start = self.linear_from
        if self.held_bytes(blocks, start) > budget_bytes:
            batches = range(self.least_batch, start)
            fit = bisect_right(batches, budget_bytes, key=lambda batch: self.held_bytes(blocks, batch))
            return batches[fit - 1] if fit else 0
        one, two = self.step(blocks, start), self.step(blocks, start + self.period)  # lines; slopes are whole numbers
        slopes = two.resting_bytes - one.resting_bytes + two.totals - one.totals
        return start + self.period * int(((budget_bytes - one.resting_bytes - one.totals) // slopes).min())

    def deepest(self, budget_bytes: int, batch: int, most: int) -> int:
        """Return a number of blocks that fits while one more does not; 0 if not even 2 do, `most` if these do, too."""

        depths = range(3, most + 1)
        fit = bisect_right(depths, budget_bytes, key=lambda blocks: self.held_bytes(blocks, batch))
        if fit:
            return depths[fit - 1]
        return 2 if self.held_bytes(2, batch) <= budget_bytes else 0  # unlike any others: one more to be predicted

    def _sizes(self, blocks: int) -> list[int]:
        segments = round(math.sqrt(blocks)) if self.segmented else 1
        return [stop - start for start, stop in pairwise(blocks * k // segments for k in range(segments + 1))]

    def _at(self, blocks: int, batch: int) -> tuple[Step, list[Visit]]:
        """Return a step and its visits: predicted by itself, or of the batch far away and brought to this one."""
        on_line = batch >= self.linear_from and batch % self.period == 0
        key = blocks, PRIME * self.period if on_line else batch
        if key not in self._steps:
            trace = self.predicted(*key)
            self._steps[key] = _step(trace), _visits(trace)
        step, visits = self._steps[key]
        return (_of_fewer(step, batch // self.period) if on_line else step), visits


def _of_fewer(step: Step, periods: int) -> Step:
    """Return the step of a batch of so many periods, from that of PRIME."""
    grows = step.changes % PRIME == 0
    resting = {**step.resting_by_category, "input": step.resting_by_category["input"] // PRIME * periods}
    changes = np.where(grows, step.changes // PRIME * periods, step.changes)
    return step._replace(resting_by_category=resting, changes=changes)


def _repeated(visits: list[Visit], shallow: list[int], sizes: list[int]) -> list[Run]:
    """Return a deep step's events as runs of the shallow one's; `shallow`, `sizes`: blocks a segment.

    The middle block of each segment is repeated, or left out, and so is the middle segment.
    """
    segment_of = np.repeat(range(len(shallow)), shallow)
    before, runs = None, []
    for segment, group in groupby(visits, lambda visit: None if visit.block is None else int(segment_of[visit.block])):
        if segment in (None, 0):
            copies = sizes[:1]
        elif segment == len(shallow) - 1:
            copies = sizes[-1:]
        else:  # a pass towards the last segment, or one back from it
            copies = sizes[1:-1] if before == 0 else sizes[-2:0:-1]
        passes = list(group)
        for size in copies:
            for block, start, stop in passes:
                middle = block is not None and block == sum(shallow[:segment]) + 1
                runs.append(Run(start, stop, 1 + size - shallow[segment or 0] if middle else 1))
        before = segment
    return runs


def _peak_bytes(changes: np.ndarray, runs: list[Run]) -> int:
    """Return the most bytes after any event. What is held grows or shrinks evenly from one repetition to the next."""
    totals = np.concatenate([[0], changes.cumsum()])
    once = {
        (start, stop): (int(totals[start + 1 : stop + 1].max() - totals[start]), int(totals[stop] - totals[start]))
        for start, stop in {(run.start, run.stop) for run in runs}
    }
    held = peak = 0
    for start, stop, times in runs:
        if times:
            top, change = once[start, stop]
            peak = max(peak, held + top, held + (times - 1) * change + top)
            held += times * change
    return peak


def _visits(trace: Trace) -> list[Visit]:
    visits: list[Visit] = []
    for place, event in enumerate(trace.events):
        follows = event.block is None and event.phase == ""  # freed on the way from one block to the next
        if visits and (follows or visits[-1].block == event.block):
            visits[-1] = visits[-1]._replace(stop=place + 1)
        else:
            visits.append(Visit(event.block, place, place + 1))
    return visits


def _step(trace: Trace) -> Step:
    return Step(
        trace.resting_by_category,
        np.array([event.change_bytes for event in trace.events], dtype=np.int64),
        np.array([CATEGORIES.index(event.storage.category) for event in trace.events]),
        np.array([event.phase for event in trace.events], dtype=object),
    )
