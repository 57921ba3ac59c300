"""A deep network's step, built from a shallow network's step: equal blocks have equal events, which are repeated.

In a chain of blocks that are all alike, except for the first and the last, one more block adds the same events to each
pass over the blocks and changes no others. Under checkpointing the same holds for one more segment; under a schedule
that gives the order of the blocks, it holds for each visit. Nothing is fitted: tests/test_deep.py compares with
`predict`, event for event.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from operator import itemgetter

from memdfa_lab.memory.events import Event
from memdfa_lab.memory.trace import Trace

SCHEDULED = 12  # blocks of the shallow chain under a schedule: every kind of visit occurs there
EACH = 4  # blocks in each segment of the shallow chain, of which the second is repeated


def deep_trace(predict: Callable[[int], Trace], blocks: int, segmented: bool = False) -> Trace:
    """Return a rule's step in a chain of this many blocks, all alike but the first and the last.

    predict(blocks) predicts the step of a chain of this many blocks. `segmented`: the rule recomputes in
    round(sqrt(blocks)) segments. A repeated block's events are those of the shallow chain, so that blocks and storages
    in the trace carry the shallow chain's numbers.
    """
    segments, shallow = (round(math.sqrt(blocks)), 3 * EACH) if segmented else (1, EACH)
    sizes = [stop - start for start, stop in pairwise(blocks * k // segments for k in range(segments + 1))]
    if min(sizes) < EACH - 1:
        return predict(blocks)
    trace = predict(shallow)
    return Trace(_repeated(trace.events, sizes), _resting(predict, trace, shallow, blocks))


def _resting(predict: Callable[[int], Trace], trace: Trace, shallow: int, blocks: int) -> dict[str, int]:
    one_more = predict(shallow + 1).resting_by_category
    resting = trace.resting_by_category.items()
    return {name: value + (blocks - shallow) * (one_more[name] - value) for name, value in resting}


def scheduled_trace(
    predict: Callable[[int], Trace], blocks: int, schedule: Callable[[int], Iterable[tuple[str, int]]]
) -> Trace:
    """Return the same for a rule that visits blocks in the order of schedule(blocks), as in `rivals.binomial`."""
    if blocks <= SCHEDULED:
        return predict(blocks)
    trace = predict(SCHEDULED)
    places: list[int | None] = []  # events between two blocks belong to the first of them
    for event in trace.events:
        places.append(places[-1] if places and event.block is None else event.block)
    groups = [list(group) for _, group in groupby(zip(trace.events, places, strict=True), itemgetter(1))]
    start = groups.pop(0) if groups[0][0][1] is None else []
    seen = dict(zip(_visits(schedule(SCHEDULED), SCHEDULED), groups, strict=True))
    visits = [start, *(seen[kind] for kind in _visits(schedule(blocks), blocks))]
    return Trace([event for visit in visits for event, _ in visit], _resting(predict, trace, SCHEDULED, blocks))


def _visits(schedule: Iterable[tuple[str, int]], blocks: int) -> Iterator[tuple[object, ...]]:
    """Yield the kind of each visit of a block: visits of one kind have the same events."""
    kept, goes_back = -1, False
    for action, i in schedule:
        if action in ("run", "teach"):
            yield action, goes_back, i == kept, i == 0, i == blocks - 1
            goes_back = goes_back or action == "teach"
        kept = i if action == "keep" else -1


def _repeated(events: list[Event], sizes: list[int]) -> list[Event]:
    """Return the events of a deep step, with so many blocks in each segment, from those of a shallow one.

    The second block of each segment is repeated or left out, and so is the middle segment.
    """
    # The block of each event. Memory freed between two blocks belongs to the first of them. There torch 2.6 frees the
    # gradient of a weight, in the backward pass.
    blocks: list[int | None] = []
    for event in events:
        between = bool(blocks) and event.block is None and event.phase in ("", "backward")
        blocks.append(blocks[-1] if between else event.block)
    copies = {None: [EACH], 0: sizes[:1], 1: sizes[1:-1], 2: sizes[-1:]}  # by segment of the shallow chain
    deep: list[Event] = []
    before: int | None = None
    in_segments = groupby(zip(events, blocks, strict=True), lambda at: None if at[1] is None else at[1] // EACH)
    for segment, group in in_segments:
        visits = [(block, [event for event, _ in visit]) for block, visit in groupby(group, itemgetter(1))]
        for size in copies[segment][:: 1 if before == 0 else -1]:  # towards the last segment, or back from it
            for block, visit in visits:
                second = block is not None and block % EACH == 1
                deep += visit * (1 + size - EACH if second else 1)
        before = segment
    return deep
