"""Train DFA with feedback on grids of positions, and take the angles to BP's gradients: writes NETWORK.csv beside this.

`python reports/grid/run.py NETWORK SEED...`, with NETWORK mnist_conv or liao_cifar_bn. MEM-DFA makes the same updates.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

import memdfa_lab as ml

# data, distribution of B, batch size, training images, epochs
RUNS = {"mnist_conv": ("mnist", "he_normal", 128, 20_000, 3), "liao_cifar_bn": ("cifar10", "uniform", 100, 10_000, 6)}


def run(network: str, seed: int, grid: int | None) -> dict[str, object]:
    """Train from one seed; return the test accuracy, the bytes of B, and angles after training, in degrees."""
    dataset, distribution, batch, images, epochs = RUNS[network]
    data = ml.experiments.load_for(network, dataset)
    some = replace(data, x_train=data.x_train[:images], y_train=data.y_train[:images])
    rule = ml.experiments.make_rule("dfa", network, some, optimizer="adam", lr=0.001, seed=seed)
    rule.feedback = ml.feedback.Stored(seed, distribution, grid=grid)
    history = ml.fit(rule, some, epochs, batch, seed=seed, progress=False)
    sizes = [4 * B.numel() for B in rule.feedback.matrices.values()]
    found = ml.alignment.angles(rule, some.x_train[:500], some.y_train[:500])
    angles = {f"angle_{i}_deg": angle for i, angle in enumerate(found[:-1], 1)}
    about = {"network": network, "seed": seed, "grid": grid or "dense", "images": images, "epochs": epochs}
    return {**about, "B_bytes": sum(sizes), "test_accuracy": history.table["test_accuracy"].iloc[-1], **angles}


if __name__ == "__main__":
    network, *seeds = sys.argv[1:]
    table, rows = Path(__file__).with_name(f"{network}.csv"), []
    for seed in map(int, seeds):
        for grid in (None, 4, 2, 1):
            rows.append(run(network, seed, grid))
            pd.DataFrame(rows).to_csv(table, index=False)
