"""What keeps ReLUs from growing without BatchNorm: `python reports/learning/growth.py` goes on where it was cut.

liao_cifar on 10,000 images of CIFAR-10, 6 epochs of Adam with a cosine rate, one seed. The error is on 5,000 other
training images, so that what is chosen here has seen no test image. DFA makes MEM-DFA's updates in less time. `growth`
is the root mean square of the last hidden block's output after training, over that before. Each finished run is a row
of growth.csv beside this. CIFAR-10 is looked for in $MEMDFA_DATA.
"""

from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import memdfa_lab as ml
from memdfa_lab.core.rules import find_rule
from memdfa_lab.neighbours.oni import ONI

TABLE = Path(__file__).with_name("growth.csv")
KEY = ["rule", "weights", "settings"]
NETWORK, EPOCHS, BATCH, IMAGES, HELD_OUT = "liao_cifar", 6, 100, 10_000, 5_000


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers with weights but the last."""
    return [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))][:-1]


def orthogonal(model: nn.Module) -> None:
    """Begin with orthogonal weights, scaled for ReLUs."""
    for layer in layers(model):
        nn.init.orthogonal_(layer.weight, gain=2**0.5)


def normalised(model: nn.Module) -> None:
    """Write each filter as a length times a direction."""
    for layer in layers(model):
        parametrizations.weight_norm(layer)


def fixed_lengths(model: nn.Module) -> None:
    """Train the directions of filters alone: their lengths stay as they begin."""
    normalised(model)
    for layer in layers(model):
        layer.parametrizations.weight.original0.requires_grad_(False)


class Standardised(nn.Module):
    """Filters without their mean, each of the length that it begins with: what all inputs share is not passed on."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("lengths", weight.detach().flatten(1).norm(dim=1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        flat = weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return (centred * (self.lengths / centred.norm(dim=1)).unsqueeze(1)).view_as(weight)


def standardised(model: nn.Module) -> None:
    """Write each filter as a direction without a mean (weight standardisation)."""
    for layer in layers(model):
        parametrize.register_parametrization(layer, "weight", Standardised(layer.weight))


def nearly_orthogonal(model: nn.Module) -> None:
    """Write each layer's filters as nearly orthogonal ones without a mean (ONI, Huang et al. 2020)."""
    for layer in layers(model):
        parametrize.register_parametrization(layer, "weight", ONI())


WEIGHTS = {
    "he_normal": lambda model: None,
    "orthogonal": orthogonal,
    "normalised": normalised,
    "fixed lengths": fixed_lengths,
    "nearly orthogonal": nearly_orthogonal,
    "standardised, parametrisation": standardised,
    "standardised, projection": lambda model: None,
    "standardised, projection, last layer too": lambda model: None,
}
PROJECTED, IN_LAYERS = "standardised, projection", "standardised, parametrisation"
ADAM = {"optimizer": "adam", "lr": 1e-3}
UNIFORM = {**ADAM, "distribution": "uniform"}
DECAYED = {"optimizer": "adamw", "lr": 1e-3, "distribution": "uniform"}
# in order of value
PLAN = [("bp", "he_normal", ADAM), ("dfa", "he_normal", UNIFORM), ("local_readout", "he_normal", ADAM)]
PLAN += [("dfa", PROJECTED, UNIFORM), ("local_readout", PROJECTED, ADAM), ("bp", PROJECTED, ADAM)]
PLAN += [("dfa", PROJECTED, {**UNIFORM, "feedback_lr": lr}) for lr in (1e-4, 1e-3, 1e-2)]
PLAN += [("dfa", weights, UNIFORM) for weights in (IN_LAYERS, f"{PROJECTED}, last layer too", "nearly orthogonal")]
PLAN += [(rule, IN_LAYERS, ADAM) for rule in ("local_readout", "bp")]
PLAN += [("dfa", weights, UNIFORM) for weights in ("fixed lengths", "normalised", "orthogonal")]
PLAN += [("dfa", "he_normal", {**DECAYED, "weight_decay": decay}) for decay in (0.1, 1.0)]
PLAN += [("dfa", "he_normal", {**UNIFORM, "lr": lr}) for lr in (3e-4, 1e-4)]
PLAN += [("dfa", "he_normal", {**UNIFORM, "feedback_lr": lr}) for lr in (1e-4, 1e-3, 1e-2)]
PLAN += [("dfa", "he_normal", {**UNIFORM, "scale": scale}) for scale in (0.55, 0.01, 1e-4)]
PLAN += [("dfa", weights, {**ADAM, "distribution": "he_normal"}) for weights in ("he_normal", PROJECTED)]


@cache
def data() -> ml.datasets.Data:
    """Return the images to train on, and those that are held out in place of the test images."""
    held_out = ml.experiments.load_for(NETWORK, "cifar10").holdout(0.1)
    return held_out.subset(IMAGES, HELD_OUT)


def size(model: nn.Module) -> float:
    """Return the root mean square of the last hidden block's output."""
    with torch.no_grad():
        return float(model[:-1](data().x_train[:500]).square().mean().sqrt())


def train(rule: str, weights: str, settings: dict[str, object]) -> dict[str, object]:
    """Return the row of one run."""
    run = ml.experiments.RunSettings(rule=rule, network=NETWORK, **settings).completed()
    model = ml.models.build(NETWORK)
    WEIGHTS[weights](model)
    decay = {} if run.weight_decay is None else {"weight_decay": run.weight_decay}
    optimizer = partial(ml.experiments.OPTIMIZERS[run.optimizer], lr=run.lr, **decay)
    if PROJECTED in weights:
        optimizer = ml.standardised(optimizer, None if "last" in weights else data().classes)
    feedback = ml.experiments.feedback_of(run)
    learner = find_rule(rule)(model, optimizer, feedback=feedback)
    before = size(model)
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS)
    error = growth = float("nan")
    try:
        history = ml.fit(learner, data(), EPOCHS, BATCH, scheduler=cosine, progress=False)
        error, growth = 100 * (1 - history.table["test_accuracy"].iloc[-1]), size(model) / before
    except FloatingPointError as problem:
        print(problem, flush=True)
    return {"rule": rule, "weights": weights, "settings": str(settings), "error": error, "growth": growth}


def main() -> None:
    """Make the runs of PLAN that the table does not have."""
    for rule, weights, settings in PLAN:
        table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=KEY)
        if (rule, weights, str(settings)) not in set(table[KEY].itertuples(index=False, name=None)):
            row = train(rule, weights, settings)
            print(row, flush=True)
            pd.DataFrame([row]).to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False)


if __name__ == "__main__":
    main()
