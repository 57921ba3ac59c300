"""A deep network's step from a shallow one's: equal blocks have equal events, so these can be repeated.

In a chain of blocks that are all alike, except for the first and the last, one more block adds the same events to each
pass over the blocks and changes no others. Under checkpointing the same holds for one more segment. Nothing is fitted:
tests/test_deep.py compares with `predict`, event for event.
"""

import math
from collections.abc import Callable
from itertools import groupby, pairwise
from operator import itemgetter

from memdfa_lab.memory.events import Event
from memdfa_lab.memory.trace import Trace

EACH = 4  # blocks in each segment of the shallow chain, of which the second is repeated


def deep_trace(predict: Callable[[int], Trace], blocks: int, segmented: bool = False) -> Trace:
    """Return a rule's step in a chain of this many blocks, all alike but the first and the last.

    predict(blocks) predicts the step of a chain of so many blocks. `segmented`: the rule runs forward again in
    round(sqrt(blocks)) segments. A repeated block's events are those of the shallow chain: the trace's blocks and
    storages have its numbers.
    """
    segments, shallow = (round(math.sqrt(blocks)), 3 * EACH) if segmented else (1, EACH)
    sizes = [stop - start for start, stop in pairwise(blocks * k // segments for k in range(segments + 1))]
    if min(sizes) < EACH - 1:
        return predict(blocks)
    trace, one_more = predict(shallow), predict(shallow + 1)
    resting = {
        name: value + (blocks - shallow) * (one_more.resting_by_category[name] - value)
        for name, value in trace.resting_by_category.items()
    }
    return Trace(_repeated(trace.events, sizes), resting)


def _repeated(events: list[Event], sizes: list[int]) -> list[Event]:
    """Return the events of a deep step, with so many blocks in each segment, from those of a shallow one.

    The second block of each segment is repeated or left out, and so is the middle segment.
    """
    blocks: list[int | None] = []  # of each event; what is freed between two blocks goes with the first of them
    for event in events:
        between = bool(blocks) and event.block is None and event.phase == ""
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
