"""What a user would pick instead, to save memory: BP's own update with less held at once, or one block that learns.

| baseline                 | held at once                                   | price                           |
|--------------------------|------------------------------------------------|---------------------------------|
| CheckpointBP             | one h_i a segment, all of one's; all gradients | almost one more forward pass    |
| StepInBackward           | every h_i; one block's gradients               | no norm over all gradients      |
| CheckpointStepInBackward | one h_i a segment, all of one's; one block's   | both                            |
| LastLayer                | the last block's                               | no other block learns           |

The first three train as BP does, bit for bit. Sources: Chen et al. 2016 (arXiv 1604.06174); torch's
tutorial "How to save memory by fusing the optimizer step into the backward pass".
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.checks import whole
from memdfa_lab.core.phases import phase
from memdfa_lab.core.recompute import buffers_put_back
from memdfa_lab.core.rules import Rule


class _InSegments(Rule):
    """A rule that keeps the input of each segment of blocks, and runs the segment again in the backward pass.

    `segments`: how many, at most one a block; round(sqrt(L)) if not given. Raises ValueError if not a whole number from
    1 on. A block whose output depends on a buffer that it changes itself (spectral_norm, not BatchNorm) is run again
    with the changed one, as torch.utils.checkpoint has it: its gradient is then near BP's, not equal.
    """

    def __init__(self, *args: Any, segments: int | None = None, **options: Any):
        super().__init__(*args, **options)
        wanted = round(math.sqrt(len(self.chain))) if segments is None else whole("segments", segments)
        self.segments = min(wanted, len(self.chain))

    def forward_in_segments(self, h: Tensor) -> Tensor:
        """Return the logits, with a graph that holds one tensor a segment, and all of the last."""
        starts = [len(self.chain) * k // self.segments for k in range(self.segments)]
        for start, stop in pairwise(starts):
            run = partial(self._run, iter(("forward", "recompute")), range(start, stop))
            h = checkpoint(run, h, use_reentrant=False)
        for i in range(starts[-1], len(self.chain)):  # it would be run again at once, and save nothing
            h = self.forward(i, h)
        return h

    def _run(self, names: Iterator[str], blocks: range, h: Tensor) -> Tensor:
        name = next(names)
        for i in blocks:
            # By block: copies of all buffers would grow with the segment. Never detached: what is saved depends on it.
            with phase(name, i), buffers_put_back(self.chain[i]) if name == "recompute" else nullcontext():
                h = run_block(self.chain[i], h)
        return h


@contextmanager
def _updating_in_backward(rule: Rule) -> Iterator[None]:
    """Update each block in the backward pass within, as soon as all its gradients are there; leave no hooks.

    A gradient is there once every operation on the weight has passed on its input's: nobody needs the old weight now.
    Raises RuntimeError if one comes in parts, as from a block with a reentrant checkpoint of its own.
    """
    missing: list[set[Tensor]] = [{p for p in block if p.requires_grad} for block in rule.parameters]

    def arrived(i: int, parameter: Tensor) -> None:
        if parameter not in missing[i]:
            raise RuntimeError(f"block {i} was updated by half a gradient: set use_reentrant=False in its checkpoint")
        missing[i].remove(parameter)
        if not missing[i]:
            rule.update(i)

    with ExitStack() as hooks:
        for i, parameter in [(i, parameter) for i, block in enumerate(missing) for parameter in block]:
            hooks.callback(parameter.register_post_accumulate_grad_hook(partial(arrived, i)).remove)
        yield
    for i in [i for i, left in enumerate(missing) if left]:  # left: not used in the forward pass, so without gradient
        rule.update(i)


class CheckpointBP(_InSegments):
    """BP with torch.utils.checkpoint: about 2 sqrt(L) activations in place of L, and all gradients."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.forward_in_segments(self.begin(x))
        loss, e = self.error(h, y)
        self.backward(h, e)
        for i in range(len(self.blocks)):
            self.update(i)
        return loss


class StepInBackward(Rule):
    """BP that updates a block inside the backward pass: every h_i, but one block's gradients at a time."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x)
        for i in range(len(self.blocks)):
            h = self.forward(i, h)
        loss, e = self.error(h, y)
        with _updating_in_backward(self):
            self.backward(h, e)
        return loss


class CheckpointStepInBackward(_InSegments):
    """BP with both: about 2 sqrt(L) activations, and one block's gradients at a time."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.forward_in_segments(self.begin(x))
        loss, e = self.error(h, y)
        with _updating_in_backward(self):
            self.backward(h, e)
        return loss


class LastLayer(Rule):
    """Only the last block learns; BatchNorm's statistics go on in all. Raises ValueError if the last is frozen."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if not self.parameters[-1]:
            raise ValueError("the last block is frozen, and no other would learn: unfreeze it, or take BP")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last = self.begin(x), len(self.blocks) - 1
        for i in range(last + 1):
            with torch.set_grad_enabled(i == last):
                h = self.forward(i, h)
        loss, e = self.error(h, y)
        self.backward(h, e)
        self.update(last)
        return loss


BASELINES: dict[str, type[Rule]] = {
    "checkpoint": CheckpointBP,
    "step_in_backward": StepInBackward,
    "checkpoint_step_in_backward": CheckpointStepInBackward,
    "last_layer": LastLayer,
}
