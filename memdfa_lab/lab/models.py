"""The networks of the experiments, by name, with the setting their source trained them in.

The settings are data, `networks.csv` beside this file: read them with `ml.models.table()` or, one, `ml.models.get`;
override them where they are used (`ml.experiments.train`, `memdfa train`). "Chu et al." is the authors' public code for
MEM-DFA (repository chutney42/zpp-mem); a setting named in the column `ours` is not from the source.
"""

import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from memdfa_lab.core.blocks import as_blocks, parts_of
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.lab.architectures import ACTIVATIONS, LAYERS, Layers, Shape, convolutions, dense
from memdfa_lab.lab.architectures import mlp as mlp_layers

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = Path(__file__).with_name("networks.csv")


def _per_rule(cell: str) -> dict[str, str]:
    """Read "BP's / that of FA, DFA and MEM-DFA", or one value for all."""
    bp, *others = cell.split(" / ")
    return {"bp": bp, **dict.fromkeys(("fa", "dfa", "memdfa"), *(others or [bp]))}


@dataclass(frozen=True)
class Network:
    """A network and its setting; `lr` and `initialisation` hold a value a rule.

    `layers(input_shape, classes)` gives the modules in order. `ours` names the settings that are not the source's.
    """

    layers: Layers
    input_shape: Shape
    dataset: str = "mnist"
    optimizer: str = "sgd"
    lr: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("bp", "fa", "dfa", "memdfa"), 0.01))
    weight_decay: float | None = None  # None: what the optimizer does by itself
    batch_size: int = 128
    epochs: int = 1
    loss: str = "cross_entropy"
    distribution: str = "he_normal"
    initialisation: dict[str, str] = field(default_factory=lambda: _per_rule("he_normal"))
    source: str = "its name"
    ours: tuple[str, ...] = ()
    notes: str = ""


def _read(row: dict[str, str]) -> Network:
    channels, height, width = map(int, row["input"].split("x"))
    return Network(
        layers=LAYERS[row["network"]],
        input_shape=(channels, height, width),
        lr={rule: float(lr) for rule, lr in _per_rule(row["lr"]).items()},
        weight_decay=float(row["weight_decay"]) if row["weight_decay"] else None,
        batch_size=int(row["batch_size"]),
        epochs=int(row["epochs"]),
        initialisation=_per_rule(row["initialisation"]),
        ours=tuple(row["ours"].split()),
        **{name: row[name] for name in ("dataset", "optimizer", "loss", "distribution", "source", "notes")},
    )


with SETTINGS.open(encoding="utf-8", newline="") as _file:
    NETWORKS = {row["network"]: _read(row) for row in csv.DictReader(_file)}


def names() -> list[str]:
    """Return the names that `build` takes; a ReLU MLP has a name too, such as 784-[800]x32-10."""
    return list(NETWORKS)


def table() -> "pd.DataFrame":
    """Return the settings as they stand in networks.csv, a row a network."""
    import pandas as pd

    return pd.read_csv(SETTINGS, dtype=str, keep_default_na=False)


def get(name: str) -> Network:
    """Return the network of that name. Raises ValueError, with the nearest name, if there is none."""
    spelt = re.fullmatch(r"(\d+)-\[(\d+)\]x(\d+)-10", str(name))
    if spelt is None:
        return lookup("network", name, {**NETWORKS, "784-[800]x32-10": NETWORKS["fc_relu"]})
    inputs, width, depth = (check_int(f"each size in {name}", int(size)) for size in spelt.groups())
    return Network(mlp_layers([width] * depth, "relu"), (1, 1, inputs))


def build(
    name: str,
    input_shape: Shape | None = None,
    classes: int = 10,
    seed: int = 0,
    initialisation: str | None = None,
) -> nn.Sequential:
    """Return a new network of that name as blocks, for input (N, *input_shape), its own shape if not given.

    `initialisation` is one of INITIALISATIONS, the network's own for BP if not given; `seed` gives the weights,
    whatever the global generator's state.
    """
    network = get(name)
    shape = network.input_shape if input_shape is None else _shape(input_shape)
    check_int("classes", classes)
    how = initialisation or network.initialisation["bp"]
    return _initialised(lambda: network.layers(shape, classes), seed, how)


def mlp(
    in_features: int,
    hidden: Sequence[int],
    classes: int,
    activation: str = "relu",
    batch_norm: bool = False,
    output: str = "none",
    seed: int = 0,
) -> nn.Sequential:
    """Return a multilayer perceptron as blocks: Linear (+ BatchNorm) + activation for each of `hidden`, then Linear.

    Takes (N, in_features), or anything that flattens to it. `output` is the last block's activation. Raises
    ValueError for an activation that is not in ACTIVATIONS and for widths below 1.
    """
    lookup("activation", activation, ACTIVATIONS)
    lookup("activation", output, ACTIVATIONS)
    if not isinstance(hidden, Sequence):
        raise TypeError(f"hidden must be a list of widths, such as [800, 800], got {hidden!r}")
    for width in (in_features, *hidden, classes):
        check_int("a width", width)
    return _initialised(lambda: dense(in_features, hidden, classes, activation, batch_norm, output), seed)


def convnet(
    input_shape: Shape,
    filters: Sequence[int],
    classes: int,
    activation: str = "relu",
    batch_norm: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """Return a convnet as blocks: 3x3 convolution (+ BatchNorm) + activation for each of `filters`, then Linear.

    Takes (N, *input_shape); height and width stay. Raises ValueError for an activation that is not in ACTIVATIONS,
    an input shape that is not (C, H, W), and numbers below 1.
    """
    lookup("activation", activation, ACTIVATIONS)
    shape = _shape(input_shape)
    if not isinstance(filters, Sequence):
        raise TypeError(f"filters must be a list of numbers of filters, such as [32, 64], got {filters!r}")
    for number in (*filters, classes):
        check_int("a number of filters or classes", number)
    return _initialised(lambda: convolutions(shape, filters, classes, activation, batch_norm), seed)


def sizes(name: str, input_shape: Shape | None = None, classes: int = 10) -> "pd.DataFrame":
    """Return a row a block: its layers, its output (C, H, W) or (n,), and how many numbers its parts have.

    `outputs` is n_i, what the block puts out for one example; `feedback` is C n_i, what DFA's B_i holds, 0 for the
    last block.
    """
    import pandas as pd

    shape = get(name).input_shape if input_shape is None else input_shape
    rows: list[dict[str, object]] = []
    with torch.device("meta"):
        blocks, h = build(name, shape, classes), torch.empty(2, *shape)
        for block in blocks:
            h = block(h)
            rows.append(
                {
                    "layers": ", ".join(type(part).__name__ for part in parts_of(block)),
                    "output": tuple(h.shape[1:]),
                    "parameters": sum(p.numel() for p in block.parameters()),
                    "outputs": h[0].numel(),
                    "feedback": classes * h[0].numel() * (len(rows) < len(blocks) - 1),
                }
            )
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="block")).reset_index()


def _shape(given: object) -> Shape:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 3:
        raise ValueError(f"the input shape must be (C, H, W), such as (1, 28, 28), got {given!r}")
    channels, height, width = (check_int("a size in the input shape", size) for size in given)
    return channels, height, width


def _uniform(layer: nn.Linear | nn.Conv2d) -> None:
    bound = 1 / math.sqrt(layer.weight[0].numel())
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)


# name -> what is done to each Linear and convolution, whose biases are zero before
INITIALISATIONS: dict[str, Callable[[nn.Linear | nn.Conv2d], object]] = {
    "he_normal": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"),  # the authors'
    "uniform": _uniform,  # in +-1/sqrt(fan_in), the biases too: Nøkland's for BP
    "zero": lambda layer: nn.init.zeros_(layer.weight),  # Nøkland's for DFA
    "xavier_uniform": lambda layer: nn.init.xavier_uniform_(layer.weight),  # BioTorch's
}


def _initialised(make: Callable[[], list[nn.Module]], seed: int, how: str = "he_normal") -> nn.Sequential:
    initialise = lookup("initialisation", how, INITIALISATIONS)
    check_int("seed", seed, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = as_blocks(make())
        for module in blocks.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                initialise(module)
    return blocks
