"""Where the blocks of a network rest between their uses: in memory, unless a store takes them out (`lab.offload`).

MEM-DFA visits the blocks one after the other, twice a step, and a block's weights are final when the second pass leaves
it. So a block's weights and buffers, the state of its optimizer and its stored B need be in memory only while the block
is in use. The parameters stay the same objects with the same shapes, so that optimizers, hooks and whoever looks for
replaced modules know them; outside of `Store.block` a store may leave them without data.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

FORWARD, NORM, TEACH = "forward", "norm", "teach"  # uses of a block, each of which needs what the one before it needs


class Store:
    """Memory, where blocks are at hand at any time and nothing is to be done."""

    offloads = False  # whether a block's tensors have data within `block` alone
    due = False  # whether the steps so far are to be committed now
    commits_by_itself = True  # else whoever runs the steps calls `commit`, as `fit` does
    progress: Any = None  # what was committed last beside the network

    def take(self, rule: Any) -> None:
        """Take over the blocks of a rule with all that belongs to them."""

    def block(self, i: int, use: str = FORWARD) -> AbstractContextManager[Any]:
        """Return the context within which block i has its data.

        FORWARD: weights and buffers, and changes are dropped. NORM: B as well. TEACH: all of it, and changes are kept.
        """
        return nullcontext()

    def end_step(self) -> None:
        """Note that every block has been taught."""

    def commit(self, progress: object = None) -> None:
        """Keep the network as it is now, and `progress`, what else a run needs to go on, whatever happens later."""


IN_MEMORY = Store()
