"""A bilateral filter before a network on CIFAR-10: `python reports/neighbours/bilateral.py` goes on where it was cut.

mnist_conv on 2,000 images of CIFAR-10, 6 epochs of Adam, one seed; the error is on 2,000 other training images, in per
cent. DFA makes MEM-DFA's updates in less time. Noise has a standard deviation of 0.1 of the values' range. Each
finished run is a row of bilateral.csv beside this. CIFAR-10 is looked for in $MEMDFA_DATA.
"""

from pathlib import Path

import pandas as pd
import torch

import memdfa_lab as ml
from memdfa_lab.neighbours.bilateral import Bilateral

TABLE = Path(__file__).with_suffix(".csv")
NETWORK, IMAGES, HELD_OUT, EPOCHS = "mnist_conv", 2_000, 2_000, 6
CLEAN = Bilateral(radius=2, sigma=0.25, spread=1.8)


def main() -> None:
    """Make the runs that the table does not have."""
    data = ml.datasets.load("cifar10").holdout(0.1).subset(IMAGES, HELD_OUT)
    draw = torch.Generator().manual_seed(0)
    parts = [(data.x_train, data.y_train), (data.x_test, data.y_test)]
    noisy = [(x + 0.1 * torch.randn(x.shape, generator=draw), y) for x, y in parts]
    images = {"as they are": parts, "noisy": noisy}
    images |= {f"{name}, filtered": [(CLEAN(x), y) for x, y in pair] for name, pair in images.items()}
    for name, (train, test) in images.items():
        for rule in ("bp", "dfa"):
            table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["images", "rule"])
            if ((table["images"] == name) & (table["rule"] == rule)).any():
                continue
            learner = ml.experiments.make_rule(rule, NETWORK, data, optimizer="adam", lr=1e-3)
            history = ml.fit(learner, train, EPOCHS, 100, test=test, progress=False)
            error = 100 * (1 - history.table["test_accuracy"].iloc[-1])
            row = pd.DataFrame([{"images": name, "rule": rule, "error": error}])
            print(row.to_string(header=False, index=False), flush=True)
            row.to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False)


if __name__ == "__main__":
    main()
