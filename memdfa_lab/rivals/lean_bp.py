"""BP's own updates with less in memory: by checkpointing, by a step inside the backward pass, or by both.

| baseline                 | in memory at once                               | price                           |
|--------------------------|-------------------------------------------------|---------------------------------|
| CheckpointBP             | one h_i a segment, all of one's; all gradients  | almost one more forward pass    |
| StepInBackward           | every h_i; one block's gradients                | no norm over all gradients      |
| CheckpointStepInBackward | one h_i a segment, all of one's; one block's    | both                            |

All three train as BP does, bit for bit. Sources: Chen et al. 2016 (arXiv 1604.06174); torch's tutorial "How to save
memory by fusing the optimizer step into the backward pass".
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memdfa_lab.core.block_float import BlockFloat
from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.phases import phase
from memdfa_lab.core.recompute import buffers_restored
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.state import OptimizerFactory
from memdfa_lab.core.store import Store


class LeanBP(Rule):
    """What the three have in common. Only the input of each segment of blocks is kept; the backward pass runs it again.

    `segments`: how many, at most one a block; round(sqrt(L)) if not given, 1 without checkpointing. The last one is
    kept whole, since it would be run again at once. `feedback` is not used. Raises ValueError if `segments` is not a
    whole number from 1 on, or given without checkpointing.

    A block whose output depends on a buffer that it changes itself (spectral_norm, but not BatchNorm) is run again with
    the changed one, as torch.utils.checkpoint has it: its gradient is then near BP's, not equal.
    """

    checkpoints: ClassVar[bool]
    updates_in_backward: ClassVar[bool]

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
        *,
        clip_global_norm: float | None = None,
        precision: str | None = None,
        pass1: str | BlockFloat | None = None,
        offload: Store | None = None,
        segments: int | None = None,
    ):
        options: Any = {"clip_global_norm": clip_global_norm, "precision": precision, "pass1": pass1}
        super().__init__(blocks, optimizer, loss_fn, feedback, clip_norm, offload=offload, **options)
        if clip_global_norm is not None and self.updates_in_backward:
            raise ValueError("a step in backward has no norm over all gradients: use clip_norm, BP or CheckpointBP")
        if segments is not None and not self.checkpoints:
            raise ValueError(f"{type(self).__name__} has no segments: leave them out, or take CheckpointStepInBackward")
        default = round(math.sqrt(len(self.chain))) if self.checkpoints else 1
        self.segments = min(default if segments is None else check_int("segments", segments), len(self.chain))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self._forward_in_segments(self.begin(x, y))
        loss, e = self.error(h, y)
        if self.updates_in_backward:
            with self._updating_in_backward():
                self.backward(h, e)
            return loss
        self.backward(h, e)
        self.update_all(range(len(self.blocks)))
        return loss

    def _forward_in_segments(self, h: Tensor) -> Tensor:
        """Return the logits (N, C), with a graph that holds one tensor a segment, and all of the last segment."""
        starts = [len(self.chain) * k // self.segments for k in range(self.segments)]
        for start, stop in pairwise(starts):
            run = partial(self._run, iter(("forward", "recompute")), range(start, stop))
            h = checkpoint(run, h, use_reentrant=False)
        for i in range(starts[-1], len(self.chain)):
            h = self.forward(i, h)
        return h

    def _run(self, phases: Iterator[str], blocks: range, h: Tensor) -> Tensor:
        """Run some blocks; at the second call, for the backward pass, their buffers are restored."""
        name = next(phases)
        for i in blocks:
            # By block: copies of all buffers would grow with the segment. h is not detached: its graph is saved.
            with phase(name, i), buffers_restored(self.chain[i]) if name == "recompute" else nullcontext():
                h = run_block(self.chain[i], h)
        return h

    @contextmanager
    def _updating_in_backward(self) -> Iterator[None]:
        """Update each block in the backward pass within, as soon as all its gradients are there; leave no hooks.

        A weight's gradient is there once every operation on the weight has passed on its input's: the old weight is
        not needed again. Raises RuntimeError if it comes in parts, as from a block with a reentrant checkpoint.
        """
        missing: list[set[Tensor]] = [{p for p in block if p.requires_grad} for block in self.parameters]

        def arrived(i: int, parameter: Tensor) -> None:
            if parameter not in missing[i]:
                raise RuntimeError(
                    f"block {i} was updated by half a gradient: set use_reentrant=False in its checkpoint"
                )
            missing[i].remove(parameter)
            if not missing[i]:
                self.update(i)

        with ExitStack() as hooks:
            for i, parameter in [(i, parameter) for i, block in enumerate(missing) for parameter in block]:
                hooks.callback(parameter.register_post_accumulate_grad_hook(partial(arrived, i)).remove)
            yield
        for i in [i for i, left in enumerate(missing) if left]:  # weights that the forward pass does not use
            self.update(i)


class CheckpointBP(LeanBP):
    """BP with torch.utils.checkpoint: about 2 sqrt(L) activations in place of L, and all gradients."""

    checkpoints, updates_in_backward = True, False


class StepInBackward(LeanBP):
    """BP that updates a block inside the backward pass: every h_i, but one block's gradients at a time."""

    checkpoints, updates_in_backward = False, True


class CheckpointStepInBackward(LeanBP):
    """BP with both: about 2 sqrt(L) activations, and one block's gradients at a time."""

    checkpoints, updates_in_backward = True, True
