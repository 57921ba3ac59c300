"""One network that can run at several bit widths (quantizable networks, Du et al. 2020, arXiv 2004.05284).

In the mode of k bits, weights and activations are rounded to 2^k values, with Q_k(u) = round((2^k - 1) u) / (2^k - 1),

    w_k = E|w| (2 Q_k(tanh w / (2 max|tanh w|) + 1/2) - 1),    a_k = Q_k(min(max(a, 0), 1)),

and the gradient passes the rounding unchanged. At 32 bits nothing is rounded. Each mode has a BatchNorm of its own; all
modes share w. The loss is the cross-entropy of each mode. All modes below 32 bits add a distance from the prediction at
32 bits. The source does not say which distance; here it is KL(p_32 || p_k), which sends no gradient to p_32.

The modes learn one after another, one step each, so that under MEM-DFA one block of one mode is in memory.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.checks import check_int, check_number
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Rule
from memdfa_lab.neighbours.hbfp import StraightThrough

FULL = 32  # bits: nothing is rounded
MOST = 16  # bits of a mode that rounds
MODES = (2, 4, 8, FULL)


def rounded(u: Tensor, bits: int) -> Tensor:
    """Return Q_k(u) of numbers from 0 to 1, which passes the gradient unchanged; at 32 bits, return u."""
    most = 2**bits - 1
    return u if bits == FULL else StraightThrough.apply(u, lambda u: (u * most).round_().div_(most))


def weights(w: Tensor, bits: int) -> Tensor:
    """Return the rounded weights w_k, in the shape of w; they are 0 where all of w is 0."""
    t = w.tanh()
    largest = t.abs().max().clamp_min(torch.finfo(t.dtype).tiny)
    return w.abs().mean() * (2 * rounded(t / (2 * largest) + 0.5, bits) - 1)


def check_modes(modes: Any, needs_full: bool = False) -> list[int]:
    """Return the modes as a list. Raises ValueError for others than 2 to 16 and 32, and if 32 is needed and missing."""
    given: list[Any] = list(modes) if isinstance(modes, Iterable) else [None]
    allowed = [*range(2, MOST + 1), FULL]
    if not all(isinstance(bits, Integral) and bits in allowed for bits in given) or (needs_full and FULL not in given):
        also = ", which teaches the others," if needs_full else ""
        raise ValueError(
            f"modes are a list of bits, from 2 to {MOST} and {FULL}{also} such as {list(MODES)}, not {modes!r}"
        )
    return given


class QuantizableLayer(nn.Linear):
    """A block: a linear layer without biases, the BatchNorm of the mode, and activations clipped to 0..1.

    `bits` is the mode in which it runs, one of `modes`; `use` sets it. BP, DFA and MEM-DFA can train it; FA refuses it,
    since it replaces the gradient of plain layers only. Raises ValueError as `network` does.
    """

    def __init__(self, inputs: int, outputs: int, modes: Sequence[int] = MODES):
        super().__init__(check_int("inputs", inputs), check_int("outputs", outputs), bias=False)
        self.bits = FULL
        self.norms = nn.ModuleDict({str(bits): nn.BatchNorm1d(outputs) for bits in check_modes(modes, True)})

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations for h (N, inputs)."""
        a = self.norms[str(self.bits)](F.linear(h, weights(self.weight, self.bits)))
        return rounded(a.clamp(0, 1), self.bits)


def network(sizes: Sequence[int], modes: Sequence[int] = MODES, seed: int = 0) -> nn.Sequential:
    """Return a dense network of these sizes, (784, 100, 10) for example; its last layer is not rounded in any mode.

    Raises ValueError for fewer than three sizes or one below 1, for modes without 32 or with others than 2 to 16, and
    for a seed that is not a whole number.
    """
    if not isinstance(sizes, Sequence) or len(sizes) < 3:
        raise ValueError(
            f"sizes are those of the input, hidden layers and classes, such as (784, 100, 10), not {sizes!r}"
        )
    sizes = [check_int("a size", size) for size in sizes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_int("seed", seed, 0))
        hidden = [QuantizableLayer(inputs, outputs, modes) for inputs, outputs in pairwise(sizes[:-1])]
        return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))


def use(model: nn.Module, bits: int) -> None:
    """Run the network in this mode from now on. Raises ValueError for a mode that it does not have."""
    check_int("bits", bits, 2, FULL)
    layers = [part for part in model.modules() if isinstance(part, QuantizableLayer)]
    if not layers or any(str(bits) not in layer.norms for layer in layers):
        there = ", ".join(layers[0].norms) if layers else "none"
        raise ValueError(f"the network has no mode of {bits!r} bits (there are: {there})")
    for layer in layers:
        layer.bits = bits


class ConsistentLoss:
    """Cross-entropy, plus `weight` times KL(p_32 || p_k) if p_32 is given; `y` is (labels, p_32 or None).

    Raises ValueError for a weight below 0.
    """

    def __init__(self, weight: float = 1.0):
        check_number("weight", weight)
        self.weight = weight

    def __call__(self, logits: Tensor, y: tuple[Tensor, Tensor | None]) -> Tensor:
        """Return the loss, a mean over the batch."""
        labels, full = y
        loss = F.cross_entropy(logits, labels)
        if full is None:
            return loss
        return loss + self.weight * F.kl_div(logits.log_softmax(1), full, reduction="batchmean")


def learn(rule: Rule, x: Tensor, labels: Tensor, modes: Iterable[int] = MODES) -> list[Tensor]:
    """Learn from a batch x (N, ...) in each mode in turn; return the losses. The rule's loss must be `ConsistentLoss`.

    If 32 bits are one of several modes, one more forward pass, before the first of these steps, gives p_32. Otherwise
    no mode learns from p_32: a network that learns in one mode alone has the cross-entropy as its loss. Raises
    ValueError, before any step, for what are no modes of the network, and what `rule.step` raises.
    """
    modes, losses, full = check_modes(modes), [], None
    for bits in (*modes, FULL):
        use(rule.blocks, bits)
    if FULL in modes and modes != [FULL]:
        full = forward_without_trace(rule.chain, x, store=rule.store).softmax(1)
    for bits in modes:
        use(rule.blocks, bits)
        y: Any = labels, None if bits == FULL else full
        losses.append(rule.step(x, y))
    return losses
