"""The best epoch of a run on its test data, and early stopping."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memdfa_lab.lab.examples import Examples


@dataclass
class Best:
    """The best epoch so far, by a column of the history, with a copy of the network's weights and buffers then.

    `sign`: 1 if larger values are better, -1 if smaller. `patience`: training ends after this many epochs without
    a better one.
    """

    column: str
    sign: int
    patience: int
    epoch: int = 0
    value: float = -math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, column: str, metrics: Mapping[str, Any], patience: int, test: Examples | None) -> "Best":
        """Return a Best that has seen no epoch. Raises ValueError for a column of no metric, or without a direction."""
        if test is None or test.total == 0:
            raise ValueError("stop_after needs test data, and there is none: give test=, or use data.holdout()")
        columns = {f"test_{name}": metric for name, metric in metrics.items()}
        if column not in columns:
            raise ValueError(f"monitor must be one of the columns {', '.join(columns)}, got {column!r}: see metrics=")
        higher = getattr(columns[column], "higher_is_better", None)
        if higher is None:
            raise ValueError(f"the metric of {column} does not say whether higher is better: set its higher_is_better")
        return cls(column, 1 if higher else -1, patience)

    def is_over(self, epoch: int) -> bool:
        """Tell whether, after this many epochs, the last `patience` ones brought no improvement."""
        return epoch - self.epoch >= self.patience

    def see(self, row: Mapping[str, float], network: nn.Module) -> None:
        """Record the epoch of this row if it is better than all before it."""
        value = self.sign * row[self.column]
        if value > self.value:
            self.epoch, self.value = int(row["epoch"]), value
            self.weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
