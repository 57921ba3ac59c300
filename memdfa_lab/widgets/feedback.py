"""The feedback explorer: a random matrix B, its spectrum beside theory, and the angle to BP in a training with it."""

import math
from collections.abc import Container, Iterator, Sequence
from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor

from memdfa_lab import figures
from memdfa_lab.core.feedback import DISTRIBUTIONS, KINDS, Feedback
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab.settings import Checked, DistributionName, FeedbackName, NameOf, Positive
from memdfa_lab.memory.trace import readable
from memdfa_lab.widgets import base
from memdfa_lab.widgets.pictures import image, table
from memdfa_lab.widgets.setting import ALL_RULES, Seed, Setting, Width
from memdfa_lab.widgets.training import Race, digits

VALUES = 500  # singular values in the histogram, from as many matrices as needed
SHORT: dict[str, Any] = {"layers": 2, "batch": 50, "lr": 0.02, "every": 10, "probe": 200}  # the short training
STEPS = 200  # of the short training
TAUGHT = {name: ALL_RULES[name] for name, rule in RULES.items() if rule.uses_feedback}  # the rules that use B
RANDOM, START, ALWAYS = "random B", "B = Wᵀ before training", "B = Wᵀ at each step"


class Matrix(Checked):
    """Matrix: a family of random matrices B, `outputs` x `width` (C x n), and the rule that uses them.

    Raises ValueError, one line, for values that are not possible.
    """

    distribution: DistributionName = "he_normal"
    scale: Positive = 1.0
    storage: FeedbackName = "stored"
    seed: Seed = 0
    outputs: Annotated[int, Field(ge=1, le=100_000)] = Field(10, description="C, size of e")
    width: Width = Field(100, description="n, units per layer")
    rule: Annotated[str, NameOf("rule", TAUGHT)] = "dfa"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.feedback()
        return self

    @property
    def unit(self) -> float:
        """The standard deviation of an entry times sqrt(n), the unit of the singular values."""
        C, n = self.outputs, self.width
        deviation = {"uniform": math.sqrt(1 / 3), "orthogonal": math.sqrt(1 / max(C, n))}.get(self.distribution, 1.0)
        return self.scale * DISTRIBUTIONS[self.distribution][1](C, n) * deviation * math.sqrt(n)

    @property
    def edges(self) -> tuple[float, float]:
        """The smallest and the largest singular value, over `unit`, of a large matrix of this shape in theory."""
        root = math.sqrt(self.outputs / self.width)
        return (max(root, 1.0),) * 2 if self.distribution == "orthogonal" else (abs(1 - root), 1 + root)

    def feedback(self, more: int = 0) -> Feedback:
        """Return the matrices B for `seed` plus `more`."""
        return KINDS[self.storage](self.seed + more, self.distribution, self.scale)

    def singular_values(self, more: int = 0) -> np.ndarray:
        """Return the singular values of the first block's B, the largest first, (min(C, n),), float64."""
        B = self.feedback(more).dense(0, self.outputs, self.width, like=torch.zeros(()))
        return torch.linalg.svdvals(B.double()).numpy()

    def figure(self, rows: Sequence[dict[str, Any]] = ()) -> Figure:
        """Draw the spectrum of B beside theory, and the angles in `rows`, which come from `learning`."""
        own = self.singular_values() / self.unit
        others = [self.singular_values(more) / self.unit for more in range(1, math.ceil(VALUES / len(own)))]
        grid = np.linspace(0, 1.15 * (1 + math.sqrt(self.outputs / self.width)), 400)
        flat = self.distribution == "orthogonal"
        theory = None if flat else figures.marchenko_pastur(grid, self.outputs, self.width)
        title = f"C = {self.outputs}, n = {self.width}"
        return figures.feedback(np.concatenate([own, *others]), own, grid, theory, pd.DataFrame(rows), title, STEPS)

    def learning(self) -> Iterator[dict[str, Any]]:
        """Train three networks, one after the other: with these B, and with the weights themselves in place of B.

        Yields a row after every tenth step, from 0 on: `run`, step, angle_deg (to BP's gradient, the mean over the
        hidden blocks), loss and accuracy. If a network diverges, its last row is repeated, with ran_away=True.
        """
        chosen = self.model_dump(include={"distribution", "scale", "storage", "seed", "width"})
        for run, copied_at in {RANDOM: (), START: (0,), ALWAYS: range(STEPS + 1)}.items():
            if run != RANDOM:
                chosen["storage"] = "stored"

            def copy_weights(rule: Rule, step: int, at: Container[int] = copied_at) -> None:
                if step in at:
                    rule.feedback.matrices = _weights(rule)

            race = Race(digits(), before_step=copy_weights, rules=[self.rule], **SHORT, **chosen)
            yield {"run": run, **race.rows[-1]}
            try:
                while race.step < STEPS:
                    race.advance()
                    if race.step % race.every == 0:
                        yield {"run": run, **race.rows[-1]}
            except FloatingPointError:
                yield {"run": run, **race.rows[-1], "ran_away": True}


def _weights(rule: Rule) -> dict[tuple[str, int], Tensor]:
    """Return W in place of each B: for FA the weight itself, for DFA the product of the weights above, (n_i, C)."""
    found: dict[tuple[str, int], Tensor] = {}
    parameters = [(j, p.detach()) for j, p in enumerate(rule.blocks.parameters()) if p.dim() == 2]
    above = torch.eye(len(parameters[-1][1]))
    for i, (j, weight) in reversed(list(enumerate(parameters))):
        found["weight", j] = weight.clone()
        found["block", i] = above.t().clone()
        above = above @ weight
    return found


class FeedbackExplorer(base.Explorer):
    """Feedback explorer: the matrix B, its spectrum, and the angle to BP over a short training."""

    trains = True

    def __init__(self, matrix: Matrix | None = None, **changes: Any):
        super().__init__(base.start_from(Matrix, matrix, changes))
        self.rows: list[dict[str, Any]] = []
        self._trained: Matrix | None = None
        self._learning: Iterator[dict[str, Any]] = iter(())
        groups: dict[str, Any] = {
            "Matrix B": {
                "distribution": None,
                "scale": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
                "storage": None,
                "seed": range(21),
            },
            "Sizes": {"outputs": (10, 30, 100, 300), "width": (20, 50, 100, 200, 400, 1000)},
            "Short training": {"rule": None},
        }
        self.lay_out(groups, [self.picture, self.numbers], [])

    def parts(self) -> base.Parts:
        matrix: Matrix = self.setting
        taught = matrix.changed(outputs=digits().classes)  # its e has a number for each class of the digits
        if taught != self._trained:
            self._trained, self.rows, self._learning = taught, [], taught.learning()
        self._draw(matrix)
        yield 0.0
        for row in self._learning:
            self.rows.append(row)
            if row["step"] == STEPS or "ran_away" in row:
                self._draw(matrix)
            yield 0.0

    def _draw(self, matrix: Matrix) -> None:
        last = {row["run"]: row for row in self.rows}
        angles = "; ".join(f"{run}: angle {row['angle_deg']:.0f}° at step {row['step']}" for run, row in last.items())
        own = matrix.singular_values()
        alt = f"Singular values of B from {own[-1]:.3g} to {own[0]:.3g}. {angles}"
        self.picture.value = image(matrix.figure(self.rows), alt, (0.65, 0.95, 0.15, 0.35), (0.25, 0.3))
        ends = {"of this B": own[[-1, 0]], "in theory": [edge * matrix.unit for edge in matrix.edges]}
        values = pd.DataFrame.from_dict(ends, "index", columns=["smallest", "largest"]).map("{:.4g}".format)
        trained = {
            run: [
                f"{row['step']}, then it diverged" if "ran_away" in row else str(row["step"]),
                f"{row['angle_deg']:.1f}°",
                f"{100 * row['accuracy']:.1f} %",
            ]
            for run, row in last.items()
        }
        learned = pd.DataFrame.from_dict(trained, "index", columns=["steps", "angle to BP", "test accuracy"])
        data, size = digits(), {"width": matrix.width, "depth": SHORT["layers"], "feedback": matrix.storage}
        kept = base.start_from(Setting, None, size).predict(matrix.rule, SHORT["layers"]).resting_by_category
        net = f"784-[{matrix.width}]x{SHORT['layers']}-{data.classes}"
        how = f"batch {SHORT['batch']}, SGD with learning rate {SHORT['lr']}, {data.name}"
        self.numbers.value = (
            table(values.rename_axis("singular values"))
            + table(learned.rename_axis("short training"))
            + f"<p>Trained: {net}, {how}. Its matrices B take {readable(kept.get('feedback', 0))} between steps.</p>"
        )


feedback_explorer = FeedbackExplorer  # as the last line of a cell
