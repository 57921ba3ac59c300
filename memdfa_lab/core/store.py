"""Where the blocks of a network rest between their uses: in memory, or in a store elsewhere (`lab.offload`).

MEM-DFA visits the blocks one after the other, twice a step, and a block's weights are final when the second pass leaves
it. A block's weights and buffers, the state of its optimizer and its stored B are therefore needed in memory only while
the block is in use. The parameters stay the same objects with the same shapes, so that optimizers, hooks and `Watched`
still find them; outside of `Store.block` a store may leave them without data.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

FORWARD, NORM, TEACH = "forward", "norm", "teach"  # uses of a block; each needs all that the one before it needs


class Store:
    """A store that leaves all blocks in memory; its methods do nothing."""

    offloads = False  # whether a block's tensors have data within `block` alone
    due = False  # whether the steps so far should be committed now
    commits_by_itself = True  # if False, the caller of the steps calls `commit`, as `fit` does
    progress: Any = None  # what the last commit kept besides the network

    def take(self, rule: Any) -> None:
        """Take over the blocks of a rule, with their optimizers' state and B."""

    def block(self, i: int, use: str = FORWARD) -> AbstractContextManager[Any]:
        """Return the context within which block i has its data.

        FORWARD: weights and buffers; changes are dropped. NORM: B, too. TEACH: all tensors; changes are kept.
        """
        return nullcontext()

    def end_step(self) -> None:
        """Note that every block has been taught."""

    def commit(self, progress: object = None) -> None:
        """Save the network as it is now, and `progress`, which is what else a run needs to go on after a crash."""


IN_MEMORY = Store()
