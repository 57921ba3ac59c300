"""A deep network's step from a shallow one's: blocks that are alike do alike, so that their events can be repeated.

In a chain of which all blocks but the first and the last are alike, one more of them adds the same events to each pass
over the blocks, and changes no others; under checkpointing, so does one more segment. And a storage that holds a batch
grows by the same bytes with each example. So a few predictions of a shallow chain give the step at any depth and
batch, event for event: nothing is fitted, and tests/test_deep.py holds it to `predict`, to the byte.
"""

import math
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from memdfa_lab.memory.trace import CATEGORIES, Trace

FAR = 100_000  # periods between the two batches of which the slopes are taken
Predicted = Callable[[int, int], Trace]  # (blocks, batch)


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


class _Part(NamedTuple):
    """A shallow step, linear in the batch: `changes + (batch - at) / period * slopes`; a block more rests `a_block`."""

    step: Step
    at: int
    visits: list[Visit]
    period: int = 1
    slopes: np.ndarray | int = 0
    inputs_slope: int = 0
    a_block: Mapping[str, int] = MappingProxyType({})

    def with_batch(self, batch: int) -> Step:
        more = (batch - self.at) // self.period
        resting = dict(self.step.resting_by_category)
        resting["input"] += more * self.inputs_slope
        return self.step._replace(resting_by_category=resting, changes=self.step.changes + more * self.slopes)


class Chain:
    """The steps of one rule in chains of any number of blocks, all alike but for the first and the last.

    `predicted(blocks, batch)` predicts one of them. `linear_from`: the batch from which on every storage grows by as
    many bytes with each `period` examples more; any other batch is predicted by itself. `segmented`: the rule runs
    forward again in round(sqrt(blocks)) segments. `least_batch` is the smallest that the network takes.
    """

    def __init__(
        self,
        predicted: Predicted,
        linear_from: int = 2,
        period: int = 1,
        segmented: bool = False,
        least_batch: int = 1,
    ):
        self.predicted, self.period, self.segmented, self.least_batch = predicted, period, segmented, least_batch
        self.linear_from = max(linear_from, least_batch)
        self.shallow = [3, 3, 3] if segmented else [4]  # the sizes of its segments, as in `_sizes`
        self._parts: dict[tuple[int, int], _Part] = {}

    def step(self, blocks: int, batch: int) -> Step:
        """Return the step at this depth (blocks: the hidden layers and the last) and batch."""
        step, places = self._shallow(blocks, batch)
        return Step(step.resting_by_category, *(values[places] for values in step[1:]))

    def peak_bytes(self, blocks: int, batch: int) -> int:
        """Return the step's peak above rest, sooner than `step` does."""
        step, places = self._shallow(blocks, batch)
        return max(0, int(step.changes[places].cumsum().max()))

    def held_bytes(self, blocks: int, batch: int) -> int:
        """Return all that is held at the peak, with what rests."""
        step, places = self._shallow(blocks, batch)
        return step.resting_bytes + max(0, int(step.changes[places].cumsum().max()))

    def _shallow(self, blocks: int, batch: int) -> tuple[Step, np.ndarray]:
        """Return a shallow step with the deep one's rest, and the deep one's events as places in it."""
        sizes, least = self._sizes(blocks), sum(self.shallow)
        if min(sizes) < 2 or blocks < 3:  # a block is the first and the last of its segment: unlike any other
            step = self._part(blocks, batch).with_batch(batch)
            return step, np.arange(len(step.changes))
        part, a_block = self._part(least, batch), self._part(least, self.linear_from).a_block
        step, more = part.with_batch(batch), blocks - least
        resting = {name: value + more * a_block.get(name, 0) for name, value in step.resting_by_category.items()}
        return step._replace(resting_by_category=resting), _unrolled(part.visits, self.shallow, sizes)

    def largest_batch(self, budget_bytes: int, blocks: int) -> int:
        """Return a batch that fits while one example more does not (`period` from `linear_from` on); 0 if none fits."""
        start = self.linear_from
        if self.held_bytes(blocks, start) > budget_bytes:
            return _last_by_slope(lambda batch: self.held_bytes(blocks, batch), budget_bytes, self.least_batch, start)
        one, two = self.step(blocks, start), self.step(blocks, start + self.period)  # lines; slopes are whole numbers
        slopes = two.resting_bytes - one.resting_bytes + two.totals - one.totals
        return start + self.period * int(((budget_bytes - one.resting_bytes - one.totals) // slopes).min())

    def deepest(self, budget_bytes: int, batch: int, most: int) -> int:
        """Return a number of blocks that fits while one more does not; 0 if not even 2 do, `most` if these do, too."""

        def held(blocks: int) -> int:
            return self.held_bytes(blocks, batch)

        if held(most) <= budget_bytes:
            return most
        fits = _last_by_slope(held, budget_bytes, 3, most)
        return fits or (2 if held(2) <= budget_bytes else 0)  # 2 are unlike any others: one more to be predicted

    def _sizes(self, blocks: int) -> list[int]:
        segments = round(math.sqrt(blocks)) if self.segmented else 1
        return [stop - start for start, stop in pairwise(blocks * k // segments for k in range(segments + 1))]

    def _part(self, blocks: int, batch: int) -> _Part:
        on_line = batch >= self.linear_from and (batch - self.linear_from) % self.period == 0
        at = self.linear_from if on_line else batch
        if (blocks, at) not in self._parts:
            trace = self.predicted(blocks, at)
            part = _Part(_step(trace), at, _visits(trace), self.period)
            self._parts[blocks, at] = self._with_slopes(part, blocks) if at == self.linear_from else part
        return self._parts[blocks, at]

    def _with_slopes(self, part: _Part, blocks: int) -> _Part:
        """Predict once more, with a batch far away and, to see what it rests, a block more if it can be repeated."""
        step, places, longer = part.step, np.arange(len(part.step.changes)), blocks
        if blocks == sum(self.shallow):
            longer = blocks + 1
            places = _unrolled(part.visits, self.shallow, self._sizes(longer))
        far = _step(self.predicted(longer, part.at + FAR * self.period))
        slopes = np.zeros_like(step.changes)
        if alike := np.array_equal(far.categories, step.categories[places]):
            slopes[places] = (far.changes - step.changes[places]) // FAR
        if not alike or (far.changes != step.changes[places] + FAR * slopes[places]).any():
            raise ValueError(f"what this step holds is not linear in the batch from {part.at} on")
        rest = {name: value - step.resting_by_category[name] for name, value in far.resting_by_category.items()}
        return part._replace(slopes=slopes, inputs_slope=rest.pop("input") // FAR, a_block=rest)


def _unrolled(visits: list[Visit], shallow: list[int], sizes: list[int]) -> np.ndarray:
    """Return the places of a deep step's events in the shallow one's; `shallow`, `sizes`: blocks a segment.

    The middle block of each segment is repeated, or left out, and so is the middle segment.
    """
    segment_of = np.repeat(range(len(shallow)), shallow)
    every, before = np.arange(visits[-1].stop), None
    places = []
    for segment, run in groupby(visits, lambda visit: None if visit.block is None else int(segment_of[visit.block])):
        if segment in (None, 0):
            copies = sizes[:1]
        elif segment == len(shallow) - 1:
            copies = sizes[-1:]
        else:  # a pass towards the last segment, or one back from it
            copies = sizes[1:-1] if before == 0 else sizes[-2:0:-1]
        passes = list(run)
        for size in copies:
            for block, start, stop in passes:
                middle = block is not None and block == sum(shallow[:segment]) + 1
                again = 1 + size - shallow[segment or 0]
                places.append(np.tile(every[start:stop], again) if middle else every[start:stop])
        before = segment
    return np.concatenate(places)


def _visits(trace: Trace) -> list[Visit]:
    visits: list[Visit] = []
    for place, event in enumerate(trace.events):
        follows = event.block is None and event.phase == ""  # freed on the way from one block to the next
        if visits and (follows or visits[-1].block == event.block):
            visits[-1] = visits[-1]._replace(stop=place + 1)
        else:
            visits.append(Visit(event.block, place, place + 1))
    return visits


def _last_by_slope(held: Callable[[int], int], budget_bytes: int, low: int, high: int) -> int:
    """Return a number from low on that fits the budget while the next does not; 0 if low does not; `high` must not.

    In few questions, where what is held grows about linearly.
    """
    if low >= high or held(low) > budget_bytes:
        return 0
    least, most, step = held(low), held(high), 1
    guess = low + int((high - low) * (budget_bytes - least) / (most - least))
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if held(guess) <= budget_bytes:
            low, guess = guess, guess + step
        else:
            high, guess = guess, guess - step
        if not low < guess < high:  # between two guesses
            guess, step = (low + high) // 2, 0
        step *= 2
    return low


def _step(trace: Trace) -> Step:
    return Step(
        trace.resting_by_category,
        np.array([event.change_bytes for event in trace.events], dtype=np.int64),
        np.array([CATEGORIES.index(event.storage.category) for event in trace.events]),
        np.array([event.phase for event in trace.events], dtype=object),
    )
