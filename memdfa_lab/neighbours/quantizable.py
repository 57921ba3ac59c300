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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.checks import check_int, check_number
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Rule
from memdfa_lab.neighbours.hbfp import StraightThrough

FULL = 32  # bits: nothing is rounded
MODES = (2, 4, 8, FULL)


def rounded(u: Tensor, bits: int) -> Tensor:
    """Return Q_k(u) of numbers from 0 to 1, which passes the gradient unchanged; at 32 bits, return u."""
    most = 2**bits - 1
    return u if bits == FULL else StraightThrough.apply(u, lambda u: (u * most).round_().div_(most))


def weights(w: Tensor, bits: int) -> Tensor:
    """Return the rounded weights w_k, in the shape of w."""
    t = w.tanh()
    return w.abs().mean() * (2 * rounded(t / (2 * t.abs().max()) + 0.5, bits) - 1)


class QuantizableLayer(nn.Linear):
    """A block: a linear layer without biases, the BatchNorm of the mode, and activations clipped to 0..1.

    `bits` is the mode in which it runs, one of `modes`; `use` sets it.
    """

    def __init__(self, inputs: int, outputs: int, modes: Sequence[int] = MODES):
        super().__init__(inputs, outputs, bias=False)
        self.bits = FULL
        self.norms = nn.ModuleDict({str(bits): nn.BatchNorm1d(outputs) for bits in modes})

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations for h (N, inputs)."""
        a = self.norms[str(self.bits)](F.linear(h, weights(self.weight, self.bits)))
        return rounded(a.clamp(0, 1), self.bits)


def network(sizes: Sequence[int], modes: Sequence[int] = MODES, seed: int = 0) -> nn.Sequential:
    """Return a dense network of these sizes, (784, 100, 10) for example; its last layer is not rounded in any mode.

    Raises ValueError for fewer than two sizes or one below 1, for modes without 32 or with others than 2 to 16, and for
    a seed that is not a whole number.
    """
    sizes = [check_int("a size", size) for size in sizes]
    if len(sizes) < 2:
        raise ValueError(
            f"sizes are those of the input, hidden layers and classes, such as (784, 100, 10), not {sizes}"
        )
    if FULL not in modes or not all(bits == FULL or 2 <= bits <= 16 for bits in modes):
        raise ValueError(f"modes are numbers of bits from 2 to 16, and {FULL}, which teaches the others, not {modes!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_int("seed", seed, 0))
        hidden = [QuantizableLayer(inputs, outputs, modes) for inputs, outputs in pairwise(sizes[:-1])]
        return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))


def use(model: nn.Module, bits: int) -> None:
    """Run the network in this mode from now on. Raises ValueError for a mode that it does not have."""
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

    One more forward pass, before the first of these steps, gives p_32. Raises what `use` and `rule.step` raise.
    """
    modes, losses = list(modes), []
    use(rule.blocks, FULL)
    full = forward_without_trace(rule.chain, x).softmax(1) if modes != [FULL] else None
    for bits in modes:
        use(rule.blocks, bits)
        y: Any = labels, None if bits == FULL else full
        losses.append(rule.step(x, y))
    return losses
