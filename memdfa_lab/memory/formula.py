"""The memory of a step in closed form, in bytes, as sympy expressions that can be shown and solved.

For an MLP of L hidden layers with ReLU, tanh or sigmoid (autograd keeps their output alone), cross-entropy, an
optimizer without weight decay, and a batch of N:

    h_i = f(h_{i-1} W_i^T + b_i) of width n_i, h_0 = x of width n_0, logits of width C; P_i = n_i (n_{i-1} + 1).

`terms` has what grows with depth, `teaching` what one block needs while it is taught. `moments` adds them up for each
instant at which the peak can be; `peak` is the largest of these sums. Unless widths are given one by one, as numbers or
symbols, they are n_0, n, ..., n, C with L >= 2. Each expression is linear in N and, with equal widths, in L, except
where signals are so small that they are formed in one piece: it is solved by one division.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import sympy as sp

from memdfa_lab.core.checks import lookup
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.local_losses import LOCAL_RULES
from memdfa_lab.core.rules import RULES
from memdfa_lab.core.signal import SMALL_BYTES as SMALL_BYTES

# s: bytes a number; k: the size in bytes below which a signal is formed in one piece.
N, n, L, C, n_0, s, k = sp.symbols("N n L C n_0 s k", integer=True, positive=True)
Terms = dict[str, sp.Expr]
# Numbers of state a parameter, float32 scalars a tensor (Adam's step), numbers of workspace a weight in an update.
OPTIMIZERS = {"sgd": (0, 0, 0), "momentum": (1, 0, 0), "adam": (2, 1, 2)}


class Block(NamedTuple):
    """One block of the network, and the sizes of what lies before and after it."""

    name: str
    weight: Any
    h_in: Any  # width of its input; 0 for the first: the batch rests in memory
    h_out: Any
    before: Any  # sum of the widths of the hidden layers below it
    after: Any  # the same above it
    parameters_after: Any
    last: bool = False

    @property
    def parameters(self) -> Any:
        return self.weight + self.h_out


def blocks(widths: Sequence[Any] | None = None) -> list[Block]:
    """Return the blocks of widths n_0, n_1, ..., C; without widths, blocks 1, 2, L and L + 1 of equal widths.

    Between block 2 and block L everything is linear in the block's number, so that the largest is one of the two.
    """
    if widths is None:
        P, P_last = n * (n + 1), C * (n + 1)
        return [
            Block("1", n_0 * n, 0, n, 0, (L - 1) * n, (L - 1) * P + P_last),
            Block("2", n * n, n, n, n, (L - 2) * n, (L - 2) * P + P_last),
            Block("L", n * n, n, n, (L - 1) * n, 0, P_last),
            Block("L + 1", n * C, n, C, L * n, 0, 0, last=True),
        ]
    w, last = list(widths), len(widths) - 1
    if last < 2:
        raise ValueError(f"widths are those of the input, one or more hidden layers, and the output; got {w}")
    P = [above * (below + 1) for below, above in pairwise(w)]
    parts = [(sum(w[1:i]), sum(w[i + 1 : -1]), sum(P[i:]), i == last) for i in range(1, last + 1)]
    return [Block(str(i), w[i] * w[i - 1], w[i - 1] if i > 1 else 0, w[i], *part) for i, part in enumerate(parts, 1)]


def terms(rule: str, widths: Sequence[Any] | None = None, feedback: str = "stored", optimizer: str = "sgd") -> Terms:
    """Return what grows with depth, in bytes, by the ledger's categories.

    "parameters", "optimizer state" and "feedback" rest in memory; they include readouts, and Adam's state of a B that
    learns. "activations" are those at the end of the forward pass, logits included; "gradients" are those at the end of
    the backward pass (rules that teach blocks have freed theirs by then).
    """
    lookup("rule", rule, RULES | LOCAL_RULES)
    learned = ["learned"] if rule in ("bp", "dfa", "memdfa") else []  # the others have no B, or one that does not learn
    lookup("feedback", feedback, dict.fromkeys([*KINDS, *learned]))
    per_parameter, per_tensor, _ = lookup("optimizer", optimizer, OPTIMIZERS)
    every = blocks(widths)
    first, last, blocks_in_all = every[0], every[-1], L + 1 if widths is None else len(every)
    P = first.parameters + first.parameters_after
    # DFA and MEM-DFA: one matrix for each block but the last. FA: one for each weight but the first.
    rows = [b.weight for b in every[1:]] if rule == "fa" else [b.h_out for b in every[:-1]]
    columns: Any = {"bp": 0, "local_readout": 0, "fa": 1}.get(rule, last.h_out)
    kept = sum(rows) if widths is not None else rows[0] * (L - 1) + rows[-1]
    matrices = {"shared": sp.Max(*rows), "regenerated": 0, "learned": 3 * kept}.get(feedback, kept)
    steps = 4 * (blocks_in_all - 1) if feedback == "learned" and columns else 0
    readouts = blocks_in_all - 1 if rule == "local_readout" else 0
    P += last.h_out * (kept + readouts) if readouts else 0
    below = {"memdfa": 0, "local_readout": last.h_in, "drtp": last.h_in}.get(rule, last.before)
    return {
        "parameters": sp.expand(s * P),
        "optimizer state": sp.expand(per_parameter * s * P + 4 * per_tensor * 2 * (blocks_in_all + readouts)),
        "feedback": sp.expand(s * columns * matrices + steps),
        "activations": sp.expand(s * N * (last.h_out + below)),
        "gradients": sp.expand(s * P) if rule in ("bp", "fa") else sp.Integer(0),
    }


def teaching(block: Block, classes: Any, feedback: str = "stored", optimizer: str = "sgd") -> Terms:
    """Return what DFA and MEM-DFA need to teach one block, in bytes above its activations and e.

    It follows `memdfa_lab.core.local`: a quarter of the signal at a time, with the columns of B for it; the gradients
    (under plain SGD that of the bias only); and finally the optimizer's workspace.
    """
    gradients = block.h_out if optimizer == "sgd" else block.parameters
    found = {"update": s * (gradients + OPTIMIZERS[optimizer][2] * block.weight)}
    if not block.last:
        # The larger of a quarter and k bytes; sympy compares a number correctly with k, but not with k / (N s).
        least = sp.Max(N * s * block.h_out / 4, k) / (N * s)
        quarter = sp.Min(block.h_out, 16 * sp.ceiling(least / 16))
        second = sp.Min(quarter, block.h_out - quarter)
        drawn = {"regenerated": quarter, "shared": block.h_out}.get(feedback, 0)
        found["signal"] = s * (gradients + N * quarter + classes * drawn)
        if feedback == "regenerated":
            found["next columns"] = s * (gradients + classes * (quarter + second))
        if feedback == "learned":
            found["learn B"] = s * classes * block.h_out * (1 + OPTIMIZERS["adam"][2])
    return found


def by_readout(block: Block, classes: Any, optimizer: str = "sgd") -> Terms:
    """Return the same for a block with a readout: the readout's loss, gradients and update, then the block's update."""
    workspace, readout = OPTIMIZERS[optimizer][2], classes * (block.h_out + 1)
    return {
        "loss of the readout": s * (4 * N * classes + 2),
        "gradient of the readout": s * (N * (classes + block.h_out) + readout),
        "update of the readout": s * (N * block.h_out + readout + workspace * classes * block.h_out),
        "update": s * N * block.h_out + teaching(block, classes, optimizer=optimizer)["update"],
    }


def moments(
    rule: str,
    widths: Sequence[Any] | None = None,
    feedback: str = "stored",
    optimizer: str = "sgd",
    offloaded: bool = False,
) -> Terms:
    """Return the bytes above rest at each instant at which the peak can be, by the name of the operation.

    `offloaded`, for MEM-DFA: weights, optimizer state and stored B rest in a store (`ml.offload`), and are in memory
    only while their block is in use. Raises ValueError for any other rule.
    """
    if offloaded and rule != "memdfa":
        raise ValueError(f"{rule} cannot offload: MEM-DFA's step alone takes weights from a store; ask for memdfa")
    total, every = terms(rule, widths, feedback, optimizer)["activations"], blocks(widths)
    classes = every[-1].h_out
    per_parameter, per_tensor, _ = OPTIMIZERS[optimizer]
    alone = rule in ("memdfa", *LOCAL_RULES)  # one block in memory at a time
    e, found = s * (N * classes + 1), {"error": total + s * (3 * N * classes + 2)}  # e with the loss
    for b in every:
        below = b.h_in if alone else b.before
        twice = rule in ("bp", "fa") and not b.last  # at the input and at the output of the activation
        weights = s * b.parameters if offloaded else 0
        found[f"forward {b.name}"] = s * N * (below + b.h_out * (1 + twice)) + weights
        if rule in ("bp", "fa"):
            held, signal = e + s * (N * classes + b.parameters_after), 0 if b.last else N * b.h_out
            if signal:
                found[f"through the activation {b.name}"] = held + s * (N * b.before + 3 * signal)
            found[f"gradient {b.name}"] = held + s * (N * (b.before + b.h_in) + signal + b.parameters)
            found[f"update {b.name}"] = held + s * (b.parameters + OPTIMIZERS[optimizer][2] * b.weight)
        else:
            above = 0 if alone or b.last else b.after + classes
            inside = weights * (1 + per_parameter) + (8 * per_tensor if offloaded else 0)
            B = {"stored": 1, "learned": 3}.get(feedback, 0) * s * classes * b.h_out
            inside += B + 4 * (feedback == "learned") if offloaded and not b.last else 0
            held, needs = e + s * N * (b.h_in + b.h_out + above), teaching(b, classes, feedback, optimizer)
            if rule == "local_readout" and not b.last:
                held, needs = held - e, by_readout(b, classes, optimizer)
            if rule == "drtp" and not b.last:  # the block runs after its target is made
                held, needs = held - s, needs | {"target": s * (N * (classes - b.h_out) + 3)}
            for name, needed in needs.items():
                found[f"{name} {b.name}"] = held + needed + inside
    return {name: sp.expand(value) for name, value in found.items()}


def peak(rule: str, widths: Sequence[Any] | None = None, **how: Any) -> sp.Expr:
    """Return the peak of a step above rest, in bytes: the largest of `moments`, which takes the same arguments."""
    return sp.Max(*moments(rule, widths, **how).values())


def resting(rule: str, widths: Sequence[Any] | None = None, *, offloaded: bool = False, **how: str) -> sp.Expr:
    """Return what rests, in bytes: parameters, optimizer state, feedback, the batch and its labels (8 bytes each).

    `offloaded`: only the batch, its labels and a shared B rest in memory.
    """
    kept, inputs = terms(rule, widths, **how), n_0 if widths is None else widths[0]
    names = ["parameters", "optimizer state", "feedback"] if not offloaded else []
    names += ["feedback"] if offloaded and how.get("feedback") == "shared" else []
    return sp.expand(sum(kept[name] for name in names) + N * (s * inputs + 8))
