"""Train MEM-DFA with pass 1 in more and fewer bits: `python reports/pass1/accuracy.py` goes on where it was cut.

Each finished run is a row of accuracy.csv beside this. Learning rates, optimizers and the distribution of B are the
authors' for fc_relu, and for the two others those that the comparison chose on held-out training images with an exact
pass 1 (reports/paper/choices.csv); nothing is chosen here. MNIST and CIFAR-10 are looked for in $MEMDFA_DATA.
`angle_deg` is `ml.alignment.error_angle` on 500 training images after training. DFA makes the same updates.
"""

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd

import memdfa_lab as ml

TABLE = Path(__file__).with_name("accuracy.csv")
KEY = ["network", "seed", "pass1"]
PASSES = ("float32", "bfloat16", "int8", "6bit", "5bit", "4bit", "3bit", "2bit")
ADAM = {"optimizer": "adam", "lr": 0.001}
# data, training images, epochs, batch size, settings; fc_relu has all images, and 5 of the 20 epochs of the comparison
RUNS = {
    "fc_relu": ("mnist", 60_000, 5, 10, {}),
    "mnist_conv": ("mnist", 10_000, 3, 128, {**ADAM, "distribution": "he_normal"}),
    "liao_cifar_bn": ("cifar10", 10_000, 3, 100, {**ADAM, "distribution": "uniform"}),
}
# in order of value
PLAN = [("fc_relu", seed, pass1) for seed in (0, 1, 2) for pass1 in PASSES]
PLAN += [(network, 0, pass1) for network in ("mnist_conv", "liao_cifar_bn") for pass1 in PASSES]
PLAN += [("mnist_conv", seed, pass1) for seed in (1, 2) for pass1 in PASSES]


@cache
def data(network: str) -> ml.datasets.Data:
    """Return the images to train and test on."""
    dataset, images, *_ = RUNS[network]
    whole = ml.experiments.load_for(network, dataset)
    return replace(whole, x_train=whole.x_train[:images], y_train=whole.y_train[:images])


def train(network: str, seed: int, pass1: str) -> dict[str, object]:
    """Return the row of one run."""
    _, images, epochs, batch, settings = RUNS[network]
    kind = None if pass1 == "float32" else pass1
    rule = ml.experiments.make_rule("memdfa", network, data(network), seed=seed, pass1=kind, **settings)
    history = ml.fit(rule, data(network), epochs, batch, seed=seed, progress=False)
    angle = ml.alignment.error_angle(rule, data(network).x_train[:500], data(network).y_train[:500])
    accuracy = history.table["test_accuracy"].iloc[-1]
    about = {"network": network, "seed": seed, "pass1": pass1, "epochs": epochs, "examples": images}
    return {**about, "test_accuracy": accuracy, "angle_deg": angle}


def main() -> None:
    """Make the runs of PLAN that the table does not have."""
    warnings.filterwarnings("ignore", message="with pass1")  # that e is far from the exact one is what is studied
    for run in PLAN:
        table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=KEY)
        if run not in set(table[KEY].itertuples(index=False, name=None)):
            row = train(*run)
            print(row, flush=True)
            pd.DataFrame([row]).to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False)


if __name__ == "__main__":
    main()
