"""BP with few snapshots, by the schedule of Griewank and Walther (2000), which needs the fewest recomputations.

Let L be the number of blocks, s the number of snapshots (the network's input among them), and r the least number with
L <= C(s + r, s), a binomial coefficient. A step then takes one forward pass and another

    t(L, s) = r L - C(s + r, r - 1)

runs of blocks, and runs no block more than r times again. For 10,000 blocks, s = 140, 38 and 20 are enough for r = 2,
3 and 4. `t` follows from a recursion: the input of block m is kept, the blocks after it are taught with one snapshot
less, and then the blocks before it with all snapshots,

    t(L, s) = min over m of m + t(L - m, s - 1) + t(m, s),        t(1, s) = 0.

At the outermost level the m runs belong to the forward pass, which runs L - 1 blocks and then teaches the last one.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from memdfa_lab.core.checks import check_int
from memdfa_lab.rivals.by_block import ByBlock

KEEP, RUN, TEACH, BACK = "keep", "run", "teach", "back"
Way = Iterator[tuple[str, int]]
Snapshot = tuple[Tensor, Callable[[], None]]  # a block's input, and a function that restores the generators
MOST_RUNS = 3  # by default no block is run again more often than this


def runs_again(length: int, snapshots: int) -> int:
    """Return r, the least number with length <= C(snapshots + r, snapshots); no block is run again more often.

    Raises ValueError if a number is not a whole number from 1 on, as do the other functions of schedules.
    """
    length, snapshots = check_int("length", length), check_int("snapshots", snapshots)
    r, reach = 0, 1
    while reach < length:
        r += 1
        reach = reach * (snapshots + r) // r
    return r


def recomputations(length: int, snapshots: int) -> int:
    """Return t(L, s): how many runs of blocks a step takes in addition to one forward pass."""
    r = runs_again(length, snapshots)
    return r * length - (math.comb(snapshots + r, r - 1) if r else 0)


def fewest_snapshots(length: int, most: int = MOST_RUNS) -> int:
    """Return how many snapshots are needed for no block to be run again more than `most` times."""
    check_int("length", length)
    check_int("most", most)
    return next(s for s in range(1, length + 1) if runs_again(length, s) <= most)


def schedule(length: int, snapshots: int) -> Way:
    """Return the actions of a step, each with the number of its block, in order.

    "keep": keep the block's input. "run": run the block for the next one's input. "teach": teach the block. "back":
    return to the input that was kept last, and keep it no longer. The network's input is kept before the first action.
    The blocks are taught from the last to the first.
    """
    return _actions(check_int("length", length), check_int("snapshots", snapshots))


def _actions(length: int, snapshots: int) -> Way:
    kept = [0]
    for end in range(length, 0, -1):
        start = kept.pop()
        yield BACK, start  # the blocks from `start` to before `end` are to be taught
        while end - start > 1:
            free = snapshots - len(kept)
            m = _split(end - start, free)
            yield KEEP, start
            kept.append(start)
            for i in range(start, start + m):
                yield RUN, i
            start += m
        yield TEACH, start


def default_schedule(length: int) -> Way:
    """Return the schedule with the default number of snapshots of `Binomial`."""
    return schedule(length, fewest_snapshots(length))


def _split(length: int, snapshots: int) -> int:
    """Return how many blocks to run from a snapshot to the next one: one of the numbers for which t is least.

    The part before the next snapshot then needs r - 1 recomputations at most, the part after it r with one snapshot
    less.
    """
    r = runs_again(length, snapshots)
    before = math.comb(snapshots + r - 2, snapshots) if r > 1 else 1
    return max(before, length - math.comb(snapshots - 1 + r, r))


class Binomial(ByBlock):
    """BP with binomial checkpointing, updating in the backward pass: inputs of few blocks, one block's graph in memory.

    It trains as BP does, bit for bit. `snapshots`: how many inputs of blocks are kept at once, from 1 on, x included
    (which is in memory anyway). The default is the fewest with which no block is run again more than three times, about
    the cube root of 6 L: memory hardly grows with depth, and a step takes less than twice BP's time. About the square
    root of 2 L snapshots are enough for running no block again more than twice. The schedule is optimal for blocks that
    take equal time and memory (Griewank and Walther 2000). `feedback` is not used. Raises ValueError if `snapshots` is
    not a whole number from 1 on, and for clip_global_norm.
    """

    def __init__(self, *given: Any, snapshots: int | None = None, **options: Any):
        super().__init__(*given, **options)
        default = fewest_snapshots(len(self.chain))
        self.snapshots = default if snapshots is None else check_int("snapshots", snapshots)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last = self.to_first(self.begin(x, y)), len(self.chain) - 1
        way, kept, h = self.first_pass(partial(self._forward, h, last + 1 - self.learns_from))
        loss, signals, after = self.learn_last(h, y)
        del h
        for i in range(last - 1, self.learns_from - 1, -1):
            self.learn(i, self._to_next(way, kept, "recompute"), signals)
        after()
        return loss

    def _forward(self, h: Tensor, length: int) -> tuple[Way, list[Snapshot], Tensor]:
        """Run all blocks but the last on h (N, ...); return the remaining actions, the snapshots, the last input."""
        way, kept = schedule(length, self.snapshots), [(h, self.hold())]
        del h
        return way, kept, self._to_next(way, kept, "forward")

    def _to_next(self, way: Way, kept: list[Snapshot], name: str) -> Tensor:
        """Do the actions before the next block is taught, and return the block's input."""
        next(way)  # "back"
        h, restore = kept.pop()
        restore()
        for action, i in way:
            if action == TEACH:
                break
            if action == KEEP:
                kept.append((h, self.hold()))
            else:
                h = self.run(self.learns_from + i, h, name)
        return h
