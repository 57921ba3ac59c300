"""What the textbook says a step holds, in bytes, as sympy expressions that can be shown and solved.

For an MLP of L hidden layers with ReLU, tanh or sigmoid (autograd keeps their output alone), cross-entropy, an
optimizer without weight decay, and a batch of N:

    h_i = f(h_{i-1} W_i^T + b_i) of width n_i, h_0 = x of width n_0, logits of width C; P_i = n_i (n_{i-1} + 1).

What grows with depth (`terms`) is kept apart from what one block needs while it is taught (`teaching`); `moments` puts
them together, the instants at which the peak can be, and the peak is the largest. Widths are equal, n_0, n, ..., n, C
with L from 2 on, unless given one by one, as numbers or symbols. Each expression is linear in N and, with equal widths,
in L, but for signals so small that they are formed in one piece: to solve it is one division.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import sympy as sp

from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.rules import RULES
from memdfa_lab.core.signal import SMALL_BYTES
from memdfa_lab.memory.sizing import fitting, largest

# s: the bytes of a number; k: those of a signal so small that it is formed in one piece.
N, n, L, C, n_0, s, k = sp.symbols("N n L C n_0 s k", integer=True, positive=True)
Terms = dict[str, sp.Expr]
DEEPEST = 10**9  # layers that are tried
# Numbers that rest a parameter, float32 scalars that rest a tensor (Adam's step), workspace a weight in an update.
OPTIMIZERS = {"sgd": (0, 0, 0), "momentum": (1, 0, 0), "adam": (2, 1, 2)}


class Block(NamedTuple):
    """One block of the network, and how much lies before and behind it."""

    name: str
    weight: Any
    h_in: Any  # width of its input; 0 for the first, since the batch is not the step's
    h_out: Any
    before: Any  # sum of the widths of the hidden layers below it
    after: Any  # the same above it
    parameters_after: Any
    last: bool = False

    @property
    def parameters(self) -> Any:
        return self.weight + self.h_out


def blocks(widths: Sequence[Any] | None = None) -> list[Block]:
    """Return the blocks of widths n_0, n_1, ..., C; without any, those of equal widths that can differ: 1, 2, L, L + 1.

    Between block 2 and block L everything is linear in the block's number, so the largest is at one of the two.
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
    """Return what grows with depth, as the ledger calls it, in bytes.

    "parameters", "optimizer state" and "feedback" rest; "activations" are those at the end of the forward pass, the
    logits with them; "gradients" those at the end of the backward pass (DFA and MEM-DFA have freed theirs by then).
    """
    lookup("rule", rule, RULES)
    lookup("feedback", feedback, KINDS)
    per_parameter, per_tensor, _ = lookup("optimizer", optimizer, OPTIMIZERS)
    every = blocks(widths)
    first, last, blocks_in_all = every[0], every[-1], L + 1 if widths is None else len(every)
    P = first.parameters + first.parameters_after
    # One matrix a block, but for the last (DFA and MEM-DFA); one a weight, but for the first (FA).
    rows = [b.weight for b in every[1:]] if rule == "fa" else [b.h_out for b in every[:-1]]
    columns: Any = {"bp": 0, "fa": 1}.get(rule, last.h_out)
    kept = sum(rows) if widths is not None else rows[0] * (L - 1) + rows[-1]
    matrices = {"stored": kept, "shared": sp.Max(*rows), "regenerated": 0}[feedback]
    return {
        "parameters": sp.expand(s * P),
        "optimizer state": sp.expand(per_parameter * s * P + 4 * per_tensor * 2 * blocks_in_all),
        "feedback": sp.expand(s * columns * matrices),
        "activations": sp.expand(s * N * (last.h_out + (0 if rule == "memdfa" else last.before))),
        "gradients": sp.expand(s * P) if rule in ("bp", "fa") else sp.Integer(0),
    }


def teaching(block: Block, classes: Any, feedback: str = "stored", optimizer: str = "sgd") -> Terms:
    """Return what DFA and MEM-DFA need for one block above its activations and e, while it is taught, in bytes.

    As `memdfa_lab.core.local` does it: a quarter of the signal at a time, with the columns of B that it takes; the
    gradients, but for the weight's under plain SGD; at last the optimizer's workspace.
    """
    gradients = block.h_out if optimizer == "sgd" else block.parameters
    found = {"update": s * (gradients + OPTIMIZERS[optimizer][2] * block.weight)}
    if not block.last:
        least = sp.Max(sp.sympify(block.h_out) / 4, k / (N * s))
        quarter = sp.Min(block.h_out, 16 * sp.ceiling(least / 16))
        second = sp.Min(quarter, block.h_out - quarter)
        drawn = {"stored": 0, "regenerated": quarter, "shared": block.h_out}[feedback]
        found["signal"] = s * (gradients + N * quarter + classes * drawn)
        if feedback == "regenerated":
            found["next columns"] = s * (gradients + classes * (quarter + second))
    return found


def moments(
    rule: str,
    widths: Sequence[Any] | None = None,
    feedback: str = "stored",
    optimizer: str = "sgd",
    offloaded: bool = False,
) -> Terms:
    """Return the bytes held above rest at each instant at which the peak can be, by what is done then.

    `offloaded`, for MEM-DFA: weights, optimizer state and stored B rest in a store (`ml.offload`), and are in memory
    while their block is in use. Raises ValueError for another rule.
    """
    if offloaded and rule != "memdfa":
        raise ValueError(f"{rule} cannot offload: it comes back through blocks that it has left; ask for memdfa")
    total, every = terms(rule, widths, feedback, optimizer)["activations"], blocks(widths)
    classes = every[-1].h_out
    per_parameter, per_tensor, _ = OPTIMIZERS[optimizer]
    e, found = s * (N * classes + 1), {"error": total + s * (3 * N * classes + 2)}  # e with the loss
    for b in every:
        below = b.h_in if rule == "memdfa" else b.before
        twice = rule in ("bp", "fa") and not b.last  # before and behind the activation
        weights = s * b.parameters if offloaded else 0
        found[f"forward {b.name}"] = s * N * (below + b.h_out * (1 + twice)) + weights
        if rule in ("bp", "fa"):
            held, signal = e + s * (N * classes + b.parameters_after), 0 if b.last else N * b.h_out
            if signal:
                found[f"through the activation {b.name}"] = held + s * (N * b.before + 3 * signal)
            found[f"gradient {b.name}"] = held + s * (N * (b.before + b.h_in) + signal + b.parameters)
            found[f"update {b.name}"] = held + s * (b.parameters + OPTIMIZERS[optimizer][2] * b.weight)
        else:
            above = 0 if rule == "memdfa" or b.last else b.after + classes
            inside = weights * (1 + per_parameter) + (8 * per_tensor if offloaded else 0)
            inside += s * classes * b.h_out if offloaded and feedback == "stored" and not b.last else 0
            for name, needed in teaching(b, classes, feedback, optimizer).items():
                found[f"{name} {b.name}"] = e + s * N * (b.h_in + b.h_out + above) + needed + inside
    return {name: sp.expand(value) for name, value in found.items()}


def peak(rule: str, widths: Sequence[Any] | None = None, **how: Any) -> sp.Expr:
    """Return the most that a step holds above rest: the largest of `moments`, which has the arguments."""
    return sp.Max(*moments(rule, widths, **how).values())


def resting(rule: str, widths: Sequence[Any] | None = None, *, offloaded: bool = False, **how: str) -> sp.Expr:
    """Return what rests in memory: parameters, optimizer state, feedback, and the batch with its labels (8 bytes each).

    `offloaded`: of these, the batch and a shared B alone.
    """
    kept, inputs = terms(rule, widths, **how), n_0 if widths is None else widths[0]
    names = ["parameters", "optimizer state", "feedback"] if not offloaded else []
    names += ["feedback"] if offloaded and how.get("feedback") == "shared" else []
    return sp.expand(sum(kept[name] for name in names) + N * (s * inputs + 8))


def largest_batch(budget_bytes: int, rule: str, widths: Sequence[int], **how: Any) -> int:
    """Return the largest N for which peak and rest fit into the budget, in float32.

    `how`: feedback and optimizer, as in `terms`, and offloaded, as in `moments`. Raises ValueError if not even
    one example fits.
    """
    widths = [check_int("a width", width) for width in widths]
    alike = len(widths) > 3 and len(set(widths[1:-1])) == 1  # then a handful of moments is enough
    equal = {n_0: widths[0], n: widths[1], L: len(widths) - 2, C: widths[-1]} if alike else {}
    held = _held(N, rule, None if alike else widths, {s: 4, k: SMALL_BYTES, **equal}, how)
    return fitting(held, budget_bytes, "one example")


def deepest(budget_bytes: int, rule: str, *, batch: int, width: int, inputs: int, classes: int, **how: Any) -> int:
    """Return the largest L for which peak and rest fit into the budget, in float32.

    `how`: feedback and optimizer, as in `terms`, and offloaded, as in `moments`. Raises ValueError if not even
    one hidden layer fits.
    """
    return fitting(_held_at_depth(rule, batch, width, inputs, classes, how), budget_bytes, "one hidden layer")


def depth_from_which(*, batch: int, width: int, inputs: int, classes: int, against: str = "bp", **how: Any) -> int:
    """Return the L from which on MEM-DFA holds less than another rule, peak and rest together, in float32.

    `how`: feedback and optimizer, as in `terms`, and offloaded, as in `moments`. Raises ValueError if that is never so.
    """
    ours = _held_at_depth("memdfa", batch, width, inputs, classes, how)
    theirs = _held_at_depth(against, batch, width, inputs, classes, {k: v for k, v in how.items() if k != "offloaded"})
    last = largest(lambda depth: theirs(depth) - ours(depth), 0, least=2, most=DEEPEST)  # where it does not hold less
    if last == DEEPEST:
        raise ValueError(f"MEM-DFA never holds less than {against} here: kept feedback grows as fast; regenerate it")
    return last + 1 if last else 1 if theirs(1) > ours(1) else 2


def _held_at_depth(
    rule: str, batch: int, width: int, inputs: int, classes: int, how: dict[str, Any]
) -> Callable[[int], int]:
    """Return peak and rest together as a function of L; one hidden layer has widths of its own."""
    sizes = {N: ("batch", batch), n: ("width", width), n_0: ("inputs", inputs), C: ("classes", classes)}
    values = {symbol: check_int(*size) for symbol, size in sizes.items()} | {s: 4, k: SMALL_BYTES}
    one, more = (_held(L, rule, widths, values, how) for widths in ((n_0, n, C), None))
    return lambda depth: one(1) if depth == 1 else more(depth)


def _held(symbol: sp.Symbol, rule: str, widths: Any, values: Any, how: dict[str, Any]) -> Callable[[int], int]:
    """Return peak and rest together as a function of one symbol, the others having these values."""
    rest, symbols = resting(rule, widths, **how), (N, n, L, C, n_0, s, k)
    totals = [rest + held for held in moments(rule, widths, **how).values()]
    at = sp.lambdify(symbols, totals, "math")  # subs would simplify Max(150, 16384 / N) to 16384 / N
    return lambda number: int(max(at(*({**values, symbol: number}.get(each, 0) for each in symbols))))
