"""Packed activations: h_{i-1} and the outputs that give the slopes, as int8 and one power of two an example.

The forward pass stays exact: an output is packed after the next block has run on it. A block that runs in pass 2 is
taught from the same packed numbers, so that DFA and MEM-DFA stay equal bit for bit. BatchNorm's input stays exact.
"""

import warnings
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memdfa_lab.core.block_float import BY_BITS, BlockFloat
from memdfa_lab.core.blocks import describe
from memdfa_lab.core.by_hand import ByHand, Optimizer, Ran
from memdfa_lab.core.checks import check_type, lookup
from memdfa_lab.core.layers import Backward
from memdfa_lab.core.local import BlockGradient, ByAutograd, block_gradient
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.signal import Signal

PACKS = {"int8": BlockFloat(8), **BY_BITS}


class Held:
    """A tensor (N, ...), or some rows of another Held, that is read as whole numbers times powers of two."""

    def __init__(self, t: Tensor, numbers: BlockFloat):
        self.t: Tensor | None = t
        self.numbers = numbers
        self.packed: tuple[Tensor, Tensor] | None = None  # int8, and the power of each row
        self.of: tuple[Held, slice] | None = None

    def follow(self, of: "Held", rows: slice) -> "Held":
        """Stand for these rows of another Held from now on."""
        self.t, self.of = None, (of, rows)
        return self

    def pack(self, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Pack the tensor unless that is done; with `alone`, free the tensor. Return whole numbers and powers."""
        if self.of is not None:
            held, rows = self.of
            whole, power = held.pack()
            return whole[rows], power[rows]
        if self.packed is None and self.t is not None:
            whole, power = self.numbers.parts(self.t, torch.int8, pieces=4)
            self.packed = label("activations", whole), label("activations", power)
        if alone:
            self.t = None
        assert self.packed is not None
        return self.packed

    def read(self, outputs: slice = slice(None)) -> Tensor:
        """Return the packed values of these outputs, as a new tensor."""
        whole, power = self.pack()
        return label("activations", whole[:, outputs].float()).mul_(power)

    def like(self) -> Tensor:
        """Return the tensor or, once it is freed, its whole numbers, of the same shape and layout."""
        return self.pack()[0] if self.t is None else self.t


class Packing:
    """How a rule packs: the format `numbers`, and the output of the last block that ran by hand.

    Raises TypeError for what is no format, ValueError for one of more than 8 bits or not rounded to nearest.
    """

    def __init__(self, pack: str | BlockFloat):
        numbers = lookup("pack", pack, PACKS) if isinstance(pack, str) else pack
        check_type("pack", numbers, BlockFloat, "'int8' or a BlockFloat, such as ml.precision.BlockFloat(6)")
        if numbers.bits > 8 or numbers.rounding != "nearest":
            raise ValueError(f"pack takes up to 8 bits, rounded to nearest, which DFA and MEM-DFA do alike; got {pack}")
        self.numbers = numbers
        self.last: Held | None = None
        self._has_warned = False

    def source(self, h: Tensor) -> Held | None:
        """Return h as Held if it is the output of a block by hand; the batch and autograd's tensors are not packed."""
        last, self.last = self.last, None
        return last if last is not None and last.t is h else None

    def block(self, block: nn.Module, h: Tensor, during: Any = None, is_last: bool = False) -> BlockGradient:
        """Return the gradient of a block on h (N, ...), packed if by hand; by autograd otherwise, with a warning."""
        made = block_gradient(block, h, during, partial(PackedByHand, self, self.source(h), is_last))
        if isinstance(made, ByAutograd) and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"autograd runs {describe(block)}: what it keeps is exact, and not packed", stacklevel=6)
        return made


class PackedByHand(ByHand):
    """A block by hand that is taught from packed numbers: its input, and what its backward functions read."""

    def __init__(self, packing: Packing, source: Held | None, is_last: bool, *block: Any):
        self.packing, self.source, self.is_last = packing, source, is_last
        self.inside: list[Held] = []  # what the backward functions of the last part read
        super().__init__(*block)
        self.shape = self.h.shape[1:]  # of an example

    @property
    def out(self) -> Tensor:
        return self.held.like()

    @out.setter
    def out(self, out: Tensor) -> None:
        self.held = Held(out, self.packing.numbers)
        if not self.is_last:
            self.packing.last = self.held

    def hold(self, t: Tensor, below: int = 0) -> Any:
        if below:
            small = t.to(torch.int16 if below <= 2**15 else torch.int32)
            return lambda outputs: label("activations", small[:, outputs].long())
        self.inside.append(Held(t, self.packing.numbers))
        return self.inside[-1].read

    def forward(self) -> Tensor:
        """Run the block, keep what its gradient needs, and pack its input."""
        for part in self.parts:
            h, out, ways_back = self._run(part)
            for held in self.inside:
                if held.t is out:
                    held.follow(self.held, part)
            given: Any = h if self.source is None else Held(h, self.packing.numbers).follow(self.source, part)
            held_out: Any = Held(out, self.packing.numbers).follow(self.held, part)
            self.kept.append((given, held_out, ways_back))
            del h, out
        if self.source is not None:
            self.source.pack(alone=True)
            del self.h
        return self.out

    def output(self) -> Tensor:
        """Return the output; it is rounded if the next block has packed it."""
        return self.held.read() if hasattr(self, "held") and self.held.t is None else super().output()

    def _run(self, part: slice) -> Ran:
        self.inside.clear()
        h, out, ways_back = super()._run(part)
        for held in self.inside:
            if held.t is not out:
                held.pack(alone=True)
            elif len(self.parts) == 1:
                held.follow(self.held, part)
        self.ran = part
        return h, out, ways_back

    def _learn(self, h: Any, out: Any, ways_back: list[Backward], signal: Signal, sgd: Optimizer) -> None:
        if isinstance(h, Held):
            h = self.laid_out(h.read().reshape(-1, *self.shape))
        elif self.source is not None:  # the block has run on it, and nothing else reads it again
            whole, power = self.source.pack()
            h.copy_(whole[self.ran].reshape(h.shape)).mul_(power[self.ran].view(-1, *[1] * (h.dim() - 1)))
            if self.ran.stop >= len(whole):
                self.source = None
        super()._learn(h, out.like() if isinstance(out, Held) else out, ways_back, signal, sgd)


class Packs:
    """The part of a rule that packs activations, if the rule is given `pack`."""

    chain: list[nn.Module]
    blocks: nn.Sequential
    teaches_blocks: ClassVar[bool]
    pack: str | BlockFloat | None
    packing: Packing | None = None

    def check_pack(self) -> None:
        """Raise ValueError if the rule is asked to pack and cannot; make `packing` if it is asked to."""
        if self.pack is None:
            return
        if not self.teaches_blocks:
            raise ValueError("pack is for DFA and MEM-DFA, whose blocks are taught one by one: leave it out")
        rule: Any = self
        others = {"precision": rule.precision, "clip_global_norm": rule.clip_global_norm}
        others |= {"feedback that learns": rule.feedback.learns}
        if given := [name for name, value in others.items() if value]:
            raise ValueError(f"pack rounds what blocks by hand are taught from, in float32: leave {given[0]} out")
        dtypes = {parameter.dtype for parameter in self.blocks.parameters()} - {torch.float32}
        if dtypes:
            raise ValueError(f"pack is for weights of float32, and the network has {dtypes.pop()}: leave it out")
        self.packing = Packing(self.pack)

    def keep(self, i: int, h: Tensor) -> BlockGradient:
        """Run block i on h (N, ...), and return it with what its gradient needs."""
        with phase("forward", i):
            block = self._block(i, h)
            block.forward()
            return block

    def recompute(self, i: int, h: Tensor) -> BlockGradient:
        """Return block i on h (N, ...) for pass 2; the block runs only when it is taught."""
        return self._block(i, h, phase("recompute", i))

    def _block(self, i: int, h: Tensor, during: Any = None) -> BlockGradient:
        if self.packing is None:
            return block_gradient(self.chain[i], h, during)
        return self.packing.block(self.chain[i], h, during, i == len(self.chain) - 1)
