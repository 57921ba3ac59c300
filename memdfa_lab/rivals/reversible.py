"""BP on reversible networks, whose blocks compute their input from their output: no activation has to be kept.

A coupling of F and G on the two halves of its input (Gomez et al. 2017, RevNet), and its inverse:

    y1 = x1 + F(x2),  y2 = x2 + G(y1);        x2 = y2 - G(y1),  x1 = y1 - F(x2).

In the backward pass F and G run once more, with the graphs that their gradients need anyway. This takes as much time as
a checkpoint at each block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.compat import autocast_is_on
from memdfa_lab.core.phases import label, phase
from memdfa_lab.rivals.by_block import ByBlock, with_graph

Back = Callable[[], None]  # restores the generators
Signal = Tensor | None


class Coupling(nn.Module):
    """y1 = x1 + F(x2) and y2 = x2 + G(y1), where x1 and x2 are halves of x (N, channels, ...), y1 and y2 those of y.

    F and G map a half to a tensor of its shape. With `reversible=False` G takes x1 in place of y1: a residual unit
    x + (F(x2), G(x1)) with the same weights and arithmetic that cannot be inverted. Under autocast x is converted to
    float32, since the inverse would amplify rounding errors of fewer bits.
    """

    changes_nothing = True  # its forward pass changes none of its attributes

    def __init__(self, F: nn.Module, G: nn.Module, reversible: bool = True):
        super().__init__()
        self.F, self.G, self.reversible = F, G, reversible

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.F(x2)
        return torch.cat([y1, x2 + self.G(y1 if self.reversible else x1)], 1)


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves of h (N, channels, ...). Raises ValueError if the number of channels is odd."""
    if h.dim() < 2 or h.shape[1] % 2:
        raise ValueError(f"a coupling takes (N, channels, ...) with an even number of channels, got {tuple(h.shape)}")
    one, other = (h.float() if autocast_is_on() and h.itemsize < 4 else h).chunk(2, 1)
    return one, other


class Reversible(ByBlock):
    """BP, up to rounding, with one block's activations and gradients in memory, however deep a chain of couplings is.

    The input of a `Coupling` block (`ml.models.reversible` makes them) is computed from its output; it is the output of
    the block below. The inputs of other blocks are kept, except that of the last, which is taught at once: a network
    without couplings holds as much as with a checkpoint at each block. If blocks draw random numbers, the generator's
    state is kept for each F and G: 5 KB each, which the profilers do not count. `feedback` is not used. Raises
    ValueError for clip_global_norm.
    """

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last = self.to_first(self.begin(x, y)), len(self.chain) - 1
        inputs, backs, h = self.first_pass(partial(self._forward, h, last))
        loss, signals, after = self.learn_last(h, y)
        for i in range(last - 1, self.learns_from - 1, -1):
            back = backs.pop()
            if self._gives_back(i):
                h = self._learn_coupling(i, h, signals, *back)
            else:
                h = inputs.pop()
                back[0]()
                self.learn(i, h, signals)
        after()
        return loss

    def _gives_back(self, i: int) -> bool:
        block = self.chain[i]
        return isinstance(block, Coupling) and block.reversible

    def _forward(self, h: Tensor, last: int) -> tuple[list[Tensor], list[list[Back]], Tensor]:
        """Run all blocks but the last on h (N, ...).

        Return the inputs of blocks that are not couplings, functions that restore the generators, and the last input.
        """
        inputs, backs = list[Tensor](), list[list[Back]]()
        for i in range(self.learns_from, last):
            backs.append([self.hold()])
            if not self._gives_back(i):
                inputs.append(h)
                h = self.run(i, h)
                continue
            block: Any = self.chain[i]
            with phase("forward", i), self.restored(i):
                x1, x2 = halves(h)
                y1 = x1 + run_block(block.F, x2).detach()
                backs[-1].append(self.hold())
                h = torch.cat([y1, x2 + run_block(block.G, y1).detach()], 1)
            del x1, x2, y1
        return inputs, backs, h

    def _learn_coupling(self, i: int, h: Tensor, signals: list[Tensor], to_F: Back, to_G: Back) -> Tensor:
        """Find the input of block i from its output h (N, ...), teach F and G on the way, and return the input.

        The signal at the output is replaced by that at the input.
        """
        block: Any = self.chain[i]
        y1, y2 = halves(h)
        s1, s2 = halves(signals.pop()) if signals else (None, None)
        to_G()
        x2, s1 = self._take_back(i, block.G, y1, y2, s2, s1, [])
        to_F()
        x1, s2 = self._take_back(i, block.F, x2, y1, s1, s2, [] if i > self.learns_from else None)
        if s1 is not None and s2 is not None and i > self.learns_from:
            signals.append(label("error", torch.cat([s1, s2], 1)))
        del s1, s2
        self.update(i)
        return label("activations", torch.cat([x1, x2], 1))

    def _take_back(
        self, i: int, part: nn.Module, h: Tensor, y: Tensor, s: Signal, below: Signal, caught: list[Tensor] | None
    ) -> tuple[Tensor, Signal]:
        """Teach a part of block i, which ran on h, by the signal s at its output.

        Return y - part(h), and the signal at h: `below`, with what comes out of the part added.
        """
        with phase("recompute", i):
            out = with_graph(part, h, caught)
            x = y - out.detach()
        ends, signals = [out], [] if s is None else [s.to(out.dtype)]
        del out
        self.go_back(ends, signals)
        if caught and below is not None:
            below = label("error", below + caught.pop())
        return x, below
