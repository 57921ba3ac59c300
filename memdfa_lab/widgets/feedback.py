"""The feedback explorer: a random matrix B, its spectrum beside theory, and how a network comes to agree with it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from memdfa_lab import figures
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.feedback import DISTRIBUTIONS, KINDS, Feedback, Stored
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import alignment, models
from memdfa_lab.lab.datasets import order as _order
from memdfa_lab.lab.evaluation import accuracy
from memdfa_lab.memory.trace import readable
from memdfa_lab.widgets import base
from memdfa_lab.widgets.background import Background
from memdfa_lab.widgets.setting import LIMITS
from memdfa_lab.widgets.training import digits

VALUES = 500  # singular values that are drawn, from as many matrices as that takes
LAYERS, BATCH, LR, STEPS, EVERY, PROBE = 2, 50, 0.02, 200, 10, 200  # of the short training
TAUGHT = {name: RULES[name] for name in ("fa", "dfa", "memdfa")}  # by random matrices
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RANDOM, START, ALWAYS = "random B", "B = Wᵀ before training", "B = Wᵀ at each step"
DEVIATIONS = {  # of the entries of B, C x n, at scale 1
    "he_normal": lambda C, n: math.sqrt(2 / C),
    "normal": lambda C, n: math.sqrt(1 / C),
    "uniform": lambda C, n: math.sqrt(1 / (3 * n)),
    "orthogonal": lambda C, n: math.sqrt(1 / max(C, n)),
}


@dataclass(frozen=True)
class Matrix:
    """What is chosen: a family of matrices B, `outputs` x `width` (C x n), and the rule that is taught by them.

    Raises ValueError for what cannot be.
    """

    distribution: str = "he_normal"
    scale: float = 1.0
    storage: str = "stored"
    seed: int = 0
    outputs: int = 10
    width: int = 100
    rule: str = "dfa"

    def __post_init__(self) -> None:
        lookup("rule", self.rule, TAUGHT)
        check_int("outputs (C)", self.outputs, 1, LIMITS["classes"])
        check_int("width (n)", self.width, 1, LIMITS["width"])
        self.feedback()

    @property
    def unit(self) -> float:
        """The deviation of an entry times the root of n: what singular values are measured in."""
        return self.scale * DEVIATIONS[self.distribution](self.outputs, self.width) * math.sqrt(self.width)

    @property
    def edges(self) -> tuple[float, float]:
        """The least and the largest singular value in theory, over `unit`: those of a large matrix of this shape."""
        ratio = self.outputs / self.width
        if self.distribution == "orthogonal":
            return (math.sqrt(max(ratio, 1)),) * 2
        return abs(1 - math.sqrt(ratio)), 1 + math.sqrt(ratio)

    def feedback(self, more: int = 0) -> Feedback:
        """Return the family, of the seed and `more`."""
        return lookup("storage", self.storage, KINDS)(self.seed + more, self.distribution, self.scale)

    def singular_values(self, more: int = 0) -> np.ndarray:
        """Return those of the first block's B, the largest first: min(C, n) of them, float64."""
        B = self.feedback(more).dense(0, self.outputs, self.width, like=torch.zeros(())).double()
        small = B @ B.t() if self.width >= self.outputs else B.t() @ B
        return torch.linalg.eigvalsh(small).clamp(min=0).sqrt().flip(0).numpy()

    def figure(self, rows: Sequence[dict[str, Any]] = ()) -> Figure:
        """Draw the spectrum of B beside theory, and `rows` of `angles_while_learning`."""
        own = self.singular_values() / self.unit
        others = [self.singular_values(more) / self.unit for more in range(1, math.ceil(VALUES / len(own)))]
        grid = np.linspace(0, 1.15 * (1 + math.sqrt(self.outputs / self.width)), 400)
        flat = self.distribution == "orthogonal"
        theory = None if flat else marchenko_pastur(grid, self.outputs, self.width)
        title = f"C = {self.outputs}, n = {self.width}"
        return figures.feedback(np.concatenate([own, *others]), own, grid, theory, pd.DataFrame(rows), title, STEPS)

    def learning(self) -> Iterator[dict[str, Any]]:
        """Train three networks, one after the other: with these B, and with W^T for B. See `angles_while_learning`.

        Of a network that runs away, the last row has ran_away.
        """
        for B in (RANDOM, START, ALWAYS):
            last: dict[str, Any] = {}
            try:
                for row in angles_while_learning(self, B):
                    last = row or last
                    yield row
            except FloatingPointError:
                yield {**last, "ran_away": True}


def marchenko_pastur(v: np.ndarray, C: int, n: int) -> np.ndarray:
    """Return the density at v of the singular values, over deviation and root of n, of a large random B, C x n.

    Of entries that are independent, with the same deviation. Source: Marchenko and Pastur 1967.
    """
    ratio = C / n
    low, high = abs(1 - math.sqrt(ratio)), 1 + math.sqrt(ratio)
    inside = np.maximum((high**2 - v**2) * (v**2 - low**2), 0)
    return np.sqrt(inside) / (np.pi * min(ratio, 1) * np.maximum(v, 1e-9))


def angles_while_learning(matrix: Matrix, B: str) -> Iterator[dict[str, Any]]:
    """Train for STEPS steps and yield a row a step, empty but for every EVERY-th: run, step, angle_deg, accuracy.

    `B`: RANDOM (those of `matrix`), START or ALWAYS (the weights' own in their place: for FA the weight itself, for
    DFA the product of the weights above). `angle_deg` is to BP's gradient, the mean over the hidden blocks.
    """
    data = digits()
    inputs = data.x_train[0].numel()
    net = models.mlp(inputs, [matrix.width] * LAYERS, data.classes, seed=matrix.seed)
    optimizer = partial(torch.optim.SGD, lr=LR)
    made = RULES[matrix.rule](net, optimizer, feedback=matrix.feedback() if B == RANDOM else Stored())
    x, y = data.x_train[:PROBE], data.y_train[:PROBE]
    batches = (part for epoch in count() for part in _order(len(data.x_train), matrix.seed, epoch).split(BATCH))
    for step, chosen in zip(range(STEPS + 1), batches, strict=False):
        if B == ALWAYS or (B == START and step == 0):
            made.feedback.matrices = _of_the_weights(made)
        row = {}
        if step % EVERY == 0:
            angles = alignment.angles(made, x, y)[:-1]
            right = accuracy(made, data.x_test[:1000], data.y_test[:1000])
            row = {"run": B, "step": step, "angle_deg": sum(angles) / len(angles), "accuracy": right}
        yield row
        made.step(data.x_train[chosen], data.y_train[chosen])


def _of_the_weights(rule: Rule) -> dict[tuple[str, int], Tensor]:
    """Return W in place of each B: FA's, by the number of the parameter, and DFA's, by that of the block (n_i, C)."""
    parameters = [p.detach() for p in rule.blocks.parameters()]
    found = {("weight", j): p.clone() for j, p in enumerate(parameters) if p.dim() == 2}
    weights = [p for p in parameters if p.dim() == 2]
    above = torch.eye(len(weights[-1]))
    for i in range(len(weights) - 2, -1, -1):
        above = above @ weights[i + 1]
        found["block", i] = above.t().clone()
    return found


def feedback_explorer(matrix: Matrix | None = None, **changes: Any) -> "FeedbackExplorer":
    """Return the feedback explorer, to be the last line of a cell: `feedback_explorer(distribution="orthogonal")`.

    Raises TypeError or ValueError for what cannot be.
    """
    return FeedbackExplorer(matrix, **changes)


class FeedbackExplorer(base.Explorer):
    """Feedback explorer: the matrix B, its spectrum, and the angle to BP over a short training."""

    def __init__(self, matrix: Matrix | None = None, **changes: Any):
        matrix = base.changed("matrix", matrix, Matrix, changes)
        labels = {figures.STYLES[name][0]: name for name in TAUGHT}
        super().__init__(
            {
                "distribution": base.menu(list(DISTRIBUTIONS), matrix.distribution, "distribution"),
                "scale": base.steps(SCALES, matrix.scale, "scale"),
                "storage": base.menu(list(KINDS), matrix.storage, "storage"),
                "seed": base.seed(matrix.seed),
                "outputs": base.steps((10, 30, 100, 300), matrix.outputs, "C, size of e"),
                "width": base.steps((20, 50, 100, 200, 400, 1000), matrix.width, "n, units a layer"),
                "rule": base.menu(labels, matrix.rule, "rule"),
            }
        )
        self.picture, self.numbers = ipywidgets.HTML(), ipywidgets.HTML()
        self.rows: list[dict[str, Any]] = []
        self._trained: Matrix | None = None
        self._learning: Iterator[dict[str, Any]] = iter(())
        self.background = Background(
            "feedback explorer", self._step, lambda problem: self.soon(partial(self._ended, problem))
        )
        self.watch(self.controls.values())
        c = self.controls
        left = [
            base.group("Matrix B", [c[name] for name in ("distribution", "scale", "storage", "seed")], "1 1 270px"),
            base.group("Sizes", [c["outputs"], c["width"]], "1 1 270px"),
            base.group("Short training", [c["rule"]], "1 1 270px"),
        ]
        self.children = [base.beside(left, [self.message, self.picture, self.numbers])]

    @property
    def matrix(self) -> Matrix:
        """What the controls say. Raises ValueError for what cannot be."""
        return Matrix(**{name: control.value for name, control in self.controls.items()})

    def draw(self) -> None:
        matrix = self.matrix
        self._train(matrix)
        last = {row["run"]: row for row in self.rows}
        said = "; ".join(f"{run}: angle {row['angle_deg']:.0f}° at step {row['step']}" for run, row in last.items())
        own = matrix.singular_values()
        alt = f"Singular values of B from {own[-1]:.3g} to {own[0]:.3g}. {said}"
        self.picture.value = base.image(matrix.figure(self.rows), alt, (0.65, 0.95, 0.15, 0.35), (0.25, 0.3))
        self.numbers.value = _table(matrix, own, last)

    def _train(self, matrix: Matrix) -> None:
        """Start the short training anew if it is another one than before; its e has the size of the digits' classes."""
        taught = replace(matrix, outputs=digits().classes)
        if taught != self._trained:
            self.background.stop()
            self._trained, self.rows, self._learning = taught, [], taught.learning()
            self.background.start()

    def _step(self) -> float | None:
        row = next(self._learning, None)
        if row:
            self.rows.append(row)
            if row["step"] == STEPS or "ran_away" in row:
                self.soon(self.show)
        return None if row is None else 0.0

    def _ended(self, problem: Exception | None) -> None:
        self.show()
        if problem is not None:
            self.say(f"the short training stopped: {problem}")


def _table(matrix: Matrix, own: np.ndarray, last: dict[str, Any]) -> str:
    """Return the spectrum's ends and where the short training has come to."""
    least, largest = (edge * matrix.unit for edge in matrix.edges)
    rows = [
        ["of this B", f"{own[-1]:.4g}", f"{own[0]:.4g}"],
        ["in theory", f"{least:.4g}", f"{largest:.4g}"],
    ]
    trained = [
        [
            run,
            f"{row['step']}, then it ran away" if "ran_away" in row else str(row["step"]),
            f"{row['angle_deg']:.1f}°",
            f"{100 * row['accuracy']:.1f} %",
        ]
        for run, row in last.items()
    ]
    C, n = digits().classes, matrix.width
    kept = {"stored": 4 * C * n * LAYERS, "shared": 4 * C * n, "regenerated": 0}[matrix.storage]
    if matrix.rule == "fa":  # a matrix a weight, of its shape; the first weight sends nothing back
        whole = n * n * (LAYERS - 1) + C * n
        kept = {"stored": 4 * whole, "shared": 4 * max(n * n, C * n), "regenerated": 0}[matrix.storage]
    net = f"784-[{n}]x{LAYERS}-{C}, batch {BATCH}, SGD with learning rate {LR}, {digits().name}"
    return (
        base.table(["singular values", "least", "largest"], rows)
        + base.table(["short training", "steps", "angle to BP", "test accuracy"], trained)
        + f"<p>Trained: {net}. Its B take {readable(kept)} between steps.</p>"
    )
