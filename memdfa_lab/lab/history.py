"""What came out of each epoch, as a table."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from memdfa_lab.lab.files import write_text


@dataclass
class History:
    """The results of each epoch, a dict a row: epoch, loss (mean over the epoch), metrics, seconds of training.

    Each metric has two columns, such as train_accuracy, of the first 10,000 training examples, and test_accuracy, NaN
    without test data. Accuracy is there if the task has labels: the part of them, whether of examples, positions,
    pixels or several an example, that the network finds.
    """

    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def table(self) -> pd.DataFrame:
        """The rows as a pandas table."""
        columns = dict.fromkeys(["epoch", "loss"]) | dict.fromkeys(name for row in self.rows for name in row)
        return pd.DataFrame(self.rows, columns=list(columns)).astype({"epoch": int})

    def to_csv(self, path: str | Path) -> None:
        """Write the table, whole or not at all."""
        write_text(path, self.table.to_csv(index=False))
