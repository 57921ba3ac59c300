"""A deep network's step from a shallow one's: equal blocks have equal events, so these can be repeated.

In a chain of blocks that are all alike, except for the first and the last, one more block adds the same events to each
pass over the blocks and changes no others. Under checkpointing the same holds for one more segment. Nothing is fitted:
tests/test_deep.py compares with `predict`, event for event.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from memdfa_lab.memory.events import Event
from memdfa_lab.memory.trace import Trace


class Visit(NamedTuple):
    """Events from start to stop that follow one another at one block; None between two passes over the blocks."""

    block: int | None
    start: int
    stop: int


class Chain:
    """The steps of one rule in chains of any number of blocks, all alike but the first and the last.

    predict(blocks) predicts the step of a chain of so many blocks. `segmented`: the rule runs forward again in
    round(sqrt(blocks)) segments.
    """

    def __init__(self, predict: Callable[[int], Trace], segmented: bool = False):
        self.predict, self.segmented = cache(predict), segmented
        self.shallow = [3, 3, 3] if segmented else [4]  # blocks in each segment of the chain that is predicted

    def trace(self, blocks: int) -> Trace:
        """Return the step of a chain of this many blocks.

        A repeated block's events are those of the shallow chain: the trace's blocks and storages have its numbers.
        """
        sizes, least = self._segment_sizes(blocks), sum(self.shallow)
        if min(sizes) < 2 or blocks < 3:  # a block is the first and the last of its segment: unlike any other
            return self.predict(blocks)
        trace, one_more = self.predict(least), self.predict(least + 1)
        resting = {
            name: value + (blocks - least) * (one_more.resting_by_category[name] - value)
            for name, value in trace.resting_by_category.items()
        }
        return Trace(_repeated(trace.events, self.shallow, sizes), resting)

    def held_bytes(self, blocks: int) -> int:
        """Return the bytes in memory at the step's peak, with those between steps."""
        return self.trace(blocks).held_bytes

    def _segment_sizes(self, blocks: int) -> list[int]:
        segments = round(math.sqrt(blocks)) if self.segmented else 1
        return [stop - start for start, stop in pairwise(blocks * k // segments for k in range(segments + 1))]


def _repeated(events: list[Event], shallow: list[int], sizes: list[int]) -> list[Event]:
    """Return the events of a deep step from those of a shallow one; `shallow` and `sizes` are blocks in each segment.

    The middle block of each segment is repeated or left out, and so is the middle segment.
    """
    segment_of = np.repeat(range(len(shallow)), shallow)
    before: int | None = None
    deep: list[Event] = []
    visits = groupby(_visits(events), lambda visit: None if visit.block is None else int(segment_of[visit.block]))
    for segment, group in visits:
        if segment in (None, 0):
            copies = sizes[:1]
        elif segment == len(shallow) - 1:
            copies = sizes[-1:]
        else:  # a pass towards the last segment, or back from it
            copies = sizes[1:-1] if before == 0 else sizes[-2:0:-1]
        visited = list(group)
        for size in copies:
            for block, start, stop in visited:
                middle = block is not None and block == sum(shallow[:segment]) + 1
                deep += events[start:stop] * (1 + size - shallow[segment or 0] if middle else 1)
        before = segment
    return deep


def _visits(events: list[Event]) -> list[Visit]:
    visits: list[Visit] = []
    for place, event in enumerate(events):
        on_the_way = event.block is None and event.phase == ""  # freed between one block and the next
        if visits and (on_the_way or visits[-1].block == event.block):
            visits[-1] = visits[-1]._replace(stop=place + 1)
        else:
            visits.append(Visit(event.block, place, place + 1))
    return visits
