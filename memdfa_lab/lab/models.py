"""The networks of the experiments, by name, with the settings of training in their source.

Networks and settings are data: networks.csv beside this file, `ml.models.table()`, or `ml.models.get` for one of them.
Settings are overridden where they are used (`ml.experiments.train`, `memdfa train`). "Chu et al." is the authors'
public code for MEM-DFA (repository chutney42/zpp-mem); a setting named in the column `ours` is not from the source.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from memdfa_lab.core.blocks import as_blocks, parts_of
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.generators import seeded
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import own_models
from memdfa_lab.lab.architectures import ACTIVATIONS, Shape, check_shape, layers
from memdfa_lab.lab.architectures import INITIALISATIONS as INITIALISATIONS
from memdfa_lab.lab.reversible import reversible as reversible
from memdfa_lab.lab.transformers import gpt as gpt
from memdfa_lab.lab.transformers import vit as vit

LARGE = (3, 1024, 1024)  # images that are large enough for any network
TABLE = Path(__file__).with_name("networks.csv")


def _by_rule(cell: str) -> dict[str, str]:
    """Read a cell "value for BP / value for FA, DFA and MEM-DFA", or one value for all rules."""
    bp, *others = cell.split(" / ")
    return {rule: bp if rule == "bp" else (others or [bp])[0] for rule in RULES}


@dataclass(frozen=True)
class Network:
    """A network and its setting; `lr` and `initialisation` have one value for each rule.

    `layers` is written as in `lab.architectures`. `ours` names the settings that are not from the source. `function`
    makes a network that is not in the table; its input shape may be unknown, (), and its initialisation None.
    """

    layers: str
    input_shape: Any
    dataset: str = "mnist"
    optimizer: str = "sgd"
    lr: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RULES, 0.01))
    weight_decay: float | None = None  # None: the optimizer's default
    batch_size: int = 128
    epochs: int = 1
    loss: str = "cross_entropy"
    distribution: str = "he_normal"
    initialisation: Mapping[str, str | None] = field(default_factory=lambda: _by_rule("he_normal"))
    source: str = "its name"
    ours: tuple[str, ...] = ()
    notes: str = ""
    function: Callable[[], nn.Module] | None = None


def _read(row: dict[str, str]) -> Network:
    names = ("layers", "dataset", "optimizer", "loss", "distribution", "source", "notes")
    texts: dict[str, Any] = {name: row[name] for name in names}
    return Network(
        input_shape=tuple(map(int, row["input"].split("x"))),
        lr={rule: float(lr) for rule, lr in _by_rule(row["lr"]).items()},
        weight_decay=float(row["weight_decay"]) if row["weight_decay"] else None,
        batch_size=int(row["batch_size"]),
        epochs=int(row["epochs"]),
        initialisation=_by_rule(row["initialisation"]),
        ours=tuple(row["ours"].split()),
        **texts,
    )


with TABLE.open(encoding="utf-8", newline="") as _file:
    NETWORKS = {row["network"]: _read(row) for row in csv.DictReader(_file)}


def names() -> list[str]:
    """Return the names that `build` takes.

    It also takes names of ReLU MLPs such as 784-[800]x32-10, the same with reversible- or residual- before it, layers
    such as "[800 tanh]x2 classes", and MODULE:FUNCTION.
    """
    return list(NETWORKS)


def table() -> pd.DataFrame:
    """Return networks.csv as it is, a row per network."""
    return pd.read_csv(TABLE, dtype=str, keep_default_na=False)


def get(name: str) -> Network:
    """Return the network of that name, or of layers as in `lab.architectures`, which may end in @CxHxW.

    Raises ValueError, with the nearest name, if there is none.
    """
    if " " in str(name):
        return _of_layers(str(name))
    if ":" in str(name):
        function, shape = own_models.find(name)
        return Network(name, shape, initialisation=dict.fromkeys(RULES), function=function)
    spelt = re.fullmatch(r"(?:(reversible|residual)-)?(\d+)-\[(\d+)\]x(\d+)-10", str(name))
    if spelt is None:
        return lookup("network", name, {**NETWORKS, "784-[800]x32-10": NETWORKS["fc_relu"]})
    inputs, width, depth = (check_int(f"each size in {name}", int(size)) for size in spelt.groups()[1:])
    if kind := spelt[1]:
        make = partial(reversible, inputs, width, depth, 10, coupled=kind == "reversible", seed=None)
        return Network(str(name), (1, 1, inputs), initialisation=dict.fromkeys(RULES), function=make)
    return Network(f"[{width} relu]x{depth} classes", (1, 1, inputs))


@cache
def _of_layers(name: str) -> Network:
    text, _, size = name.partition("@")
    shape = own_models.shape_of(size)
    with torch.device("meta"):  # raises an error if the layers are wrong
        layers(text, check_shape(shape) if shape else LARGE, 10)
    return Network(text, shape)


def input_shape(name: str) -> tuple[int, ...]:
    """Return the shape of one example that a network takes. Raises ValueError if that is not known."""
    shape: tuple[int, ...] = get(name).input_shape
    if not shape:
        raise ValueError(f"the shape of {name}'s input is not known: write {name}@3x32x32, with its own shape")
    return shape


_own_shape = input_shape  # for `build` and `sizes`, in which an argument hides it


def build(
    name: str,
    input_shape: Shape | None = None,
    classes: int = 10,
    seed: int = 0,
    initialisation: str | None = None,
) -> nn.Sequential:
    """Return a new network of that name as blocks, for images of `input_shape` (C, H, W), its own if not given.

    `initialisation` is one of INITIALISATIONS, the network's own for BP if not given. The weights
    depend on `seed`, not on the global generator. What MODULE:FUNCTION returns has its own shape, classes and weights.
    Raises ValueError for an unknown name, another shape, and numbers below 1.
    """
    network = get(name)
    if network.function is not None:
        return _blocks(network.function, seed, initialisation)
    shape = check_shape(_own_shape(name) if input_shape is None else input_shape)
    return from_layers(network.layers, shape, classes, seed, initialisation or network.initialisation["bp"])


def from_layers(
    text: str, input_shape: Shape, classes: int, seed: int = 0, initialisation: str | None = "he_normal"
) -> nn.Sequential:
    """Return a new network as blocks, from its layers as `lab.architectures` writes them.

    The other arguments are those of `build`. Raises ValueError for a part that is unknown, and numbers below 1.
    """
    check_int("classes", classes)
    return _blocks(lambda: layers(text, input_shape, classes), seed, initialisation)


def _blocks(make: Callable[[], Any], seed: int, initialisation: str | None) -> nn.Sequential:
    """Return what `make` returns, as blocks; without `initialisation`, with the weights that it has."""
    initialise = None if initialisation is None else lookup("initialisation", initialisation, INITIALISATIONS)
    with seeded(seed):
        blocks = as_blocks(make())
        for module in blocks.modules():
            if initialise and isinstance(module, (nn.Linear, nn.Conv2d)):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                initialise(module)
    return blocks


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

    It takes (N, in_features), or anything that flattens to it. `activation`, and `output` after the last layer, are
    names in ACTIVATIONS. Raises TypeError if hidden is not a list, ValueError for unknown names and widths below 1.
    """
    lookup("activation", output, ACTIVATIONS)
    parts = _hidden("{}", "hidden", hidden, activation, batch_norm)
    parts += ["classes", *([] if output == "none" else [output])]
    return from_layers(" ".join(parts), (1, 1, check_int("a width", in_features)), classes, seed)


def convnet(
    input_shape: Shape,
    filters: Sequence[int],
    classes: int,
    activation: str = "relu",
    batch_norm: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """Return a convnet as blocks: 3x3 convolution (+ BatchNorm) + activation for each of `filters`, then Linear.

    It takes (N, *input_shape); height and width stay. Raises TypeError if filters is not a list, ValueError for an
    unknown activation, an input shape that is not (C, H, W), and numbers below 1.
    """
    parts = _hidden("conv3x3({})", "filters", filters, activation, batch_norm)
    return from_layers(" ".join([*parts, "classes"]), check_shape(input_shape), classes, seed)


def sizes(name: str, input_shape: Shape | None = None, classes: int = 10) -> pd.DataFrame:
    """Return a row per block: its layers, its output (C, H, W) or (n,), and how many numbers its parts have.

    `outputs` is n_i, the numbers in its output for one example; `feedback` is C n_i, those of DFA's B_i, 0 for the last
    block. The arguments are those of `build`.
    """
    shape = check_shape(_own_shape(name) if input_shape is None else input_shape)
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


def _hidden(layer: str, name: str, given: object, activation: str, batch_norm: bool) -> list[str]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} must be a list of sizes, such as [800, 800], got {given!r}")
    lookup("activation", activation, ACTIVATIONS)
    behind = f"bn {activation}" if batch_norm else activation
    return [f"{layer.format(check_int(f'each size in {name}', size))} {behind}" for size in given]
