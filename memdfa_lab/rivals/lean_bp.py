"""BP's own updates in less memory: by checkpointing, by updating in the backward pass, or by both.

| baseline                 | in memory at once                               | price                           |
|--------------------------|-------------------------------------------------|---------------------------------|
| CheckpointBP             | one h_i a segment, all of one's; all gradients  | almost one more forward pass    |
| StepInBackward           | every h_i; one block's gradients                | no norm over all gradients      |
| CheckpointStepInBackward | one h_i a segment, all of one's; one block's    | both                            |

All three train as BP does, bit for bit. Sources: Chen et al. 2016 (arXiv 1604.06174); torch's tutorial "How to save
memory by fusing the optimizer step into the backward pass".
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.phases import phase
from memdfa_lab.core.recompute import buffers_restored
from memdfa_lab.core.rule import Rule


class LeanBP(Rule):
    """What these rules share. Of each segment of blocks only the input is kept; the backward pass runs it again.

    `segments`: their number, at most one a block; default: round(sqrt(L)), or 1 without checkpointing. The last segment
    is kept whole, since it would be run again at once. `feedback` is not used. Raises ValueError if `segments` is not a
    whole number from 1 on or is given without checkpointing, and for clip_global_norm with a step in backward.

    A block whose output depends on a buffer that it changes itself (spectral_norm, but not BatchNorm) is run again with
    the changed buffer, as in torch.utils.checkpoint: its gradient is then close to BP's, but not equal.
    """

    checkpoints: ClassVar[bool]
    updates_in_backward: ClassVar[bool]

    def __init__(self, *given: Any, segments: int | None = None, **options: Any):
        super().__init__(*given, **options)
        if self.clip_global_norm is not None and self.updates_in_backward:
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
        """Run some blocks; in the second run, for the backward pass, their buffers are restored."""
        name = next(phases)
        for i in blocks:
            # Block by block: copies of all buffers would grow with the segment. h keeps its graph, which is saved.
            with phase(name, i), buffers_restored(self.chain[i]) if name == "recompute" else nullcontext():
                h = run_block(self.chain[i], h)
        return h

    @contextmanager
    def _updating_in_backward(self) -> Iterator[None]:
        """Update each block in the backward pass within, as soon as all its gradients are complete; leave no hooks.

        A weight's gradient is complete after every operation on the weight has formed the gradient of its input, so
        that the old weight is not needed again. Raises RuntimeError if a gradient comes in parts, as from a reentrant
        checkpoint.
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
    """BP with torch.utils.checkpoint: about 2 sqrt(L) activations in memory instead of L, and all gradients."""

    checkpoints, updates_in_backward = True, False


class StepInBackward(LeanBP):
    """BP that updates each block in the backward pass: every h_i in memory, but one block's gradients at a time."""

    checkpoints, updates_in_backward = False, True


class CheckpointStepInBackward(LeanBP):
    """BP with both: about 2 sqrt(L) activations in memory, and one block's gradients at a time."""

    checkpoints, updates_in_backward = True, True
