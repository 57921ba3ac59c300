"""The results of each epoch, as a table."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from memdfa_lab.lab.files import write_text


@dataclass
class History:
    """The results of each epoch, one dict per row: epoch, loss (mean over the epoch), metrics, seconds of training.

    Each metric has two columns, such as train_accuracy, on the first 10,000 training examples, and test_accuracy, which
    is NaN without test data. Accuracy is included if the task has labels: it is the fraction of labels that the
    network predicts. There may be one label per example, position or pixel, or several per example.
    """

    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def table(self) -> pd.DataFrame:
        """The rows as a pandas table."""
        columns = dict.fromkeys(["epoch", "loss"]) | dict.fromkeys(name for row in self.rows for name in row)
        return pd.DataFrame(self.rows, columns=list(columns)).astype({"epoch": int})

    def to_csv(self, path: str | Path) -> None:
        """Write the table, completely or not at all."""
        write_text(path, self.table.to_csv(index=False))
