"""Train DFA on packed and on exact activations: `python reports/pass1/packed.py` goes on where it was cut.

Each finished run is a row of packed.csv beside this: 10,000 digits of MNIST in $MEMDFA_DATA, three seeds, the settings
of `accuracy.py`; nothing is chosen here. MEM-DFA with the same `pack` makes the same updates
at any keep_bytes. A last table has means and standard deviations.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

import memdfa_lab as ml

TABLE = Path(__file__).with_name("packed.csv")
KEY = ["network", "seed", "pack"]
PACKS = ("exact", "int8", "4bit")
# batch size, settings
RUNS = {
    "fc_relu": (10, {}),
    "mnist_conv": (128, {"optimizer": "adam", "lr": 0.001, "distribution": "he_normal"}),
}
EPOCHS = 3


def train(network: str, seed: int, pack: str) -> dict[str, object]:
    """Return the row of one run."""
    batch, settings = RUNS[network]
    whole = ml.experiments.load_for(network, "mnist")
    data = replace(whole, x_train=whole.x_train[:10_000], y_train=whole.y_train[:10_000])
    kind = None if pack == "exact" else pack
    rule = ml.experiments.make_rule("dfa", network, data, seed=seed, pack=kind, **settings)
    history = ml.fit(rule, data, EPOCHS, batch, seed=seed, progress=False)
    accuracy = history.table["test_accuracy"].iloc[-1]
    return {"network": network, "seed": seed, "pack": pack, "epochs": EPOCHS, "test_accuracy": accuracy}


def main() -> None:
    """Make the runs that the table does not have."""
    for seed in (0, 1, 2):
        for network in RUNS:
            for pack in PACKS:
                table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=KEY)
                if (network, seed, pack) not in set(table[KEY].itertuples(index=False, name=None)):
                    row = train(network, seed, pack)
                    print(row, flush=True)
                    pd.DataFrame([row]).to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False)
    print(pd.read_csv(TABLE).groupby(["network", "pack"], sort=False)["test_accuracy"].agg(["mean", "std"]))


if __name__ == "__main__":
    main()
