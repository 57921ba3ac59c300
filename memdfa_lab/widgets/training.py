"""Live training: four rules learn side by side, from the same weights and in the same order, while one looks on."""

import os
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memdfa_lab import figures
from memdfa_lab.core.checks import check_int, check_number, lookup
from memdfa_lab.core.feedback import DISTRIBUTIONS, KINDS
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import alignment, datasets, models
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.lab.datasets import check_data
from memdfa_lab.lab.datasets import order as _order
from memdfa_lab.lab.evaluation import accuracy, predict
from memdfa_lab.widgets import base
from memdfa_lab.widgets.background import Background
from memdfa_lab.widgets.setting import LIMITS

MOST_STEPS = 3000  # after which it ends by itself
PROBE, TESTED = 250, 1000  # images that tell loss and angle, and accuracy
SPEEDS = {"1 step a second": 1.0, "5": 5.0, "20": 20.0, "100": 100.0, "as fast as it goes": float("inf")}
DRAWN_EVERY_S = 0.5
LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Race:
    """Rules that take each step together; `table` has what came of it, every `every` steps from 0 on.

    Its columns: rule, step, loss (mean over PROBE training images), accuracy (of TESTED test images) and angle_deg (to
    BP's gradient, mean over the hidden blocks). Raises TypeError or ValueError for what cannot be.
    """

    def __init__(
        self,
        data: datasets.Data,
        layers: int = 3,
        width: int = 100,
        lr: float = 0.01,
        batch: int = 50,
        activation: str = "relu",
        distribution: str = "he_normal",
        scale: float = 1.0,
        storage: str = "stored",
        seed: int = 0,
        rules: tuple[str, ...] = tuple(RULES),
        every: int = 20,
    ):
        check_data("Race", data)
        check_int("every", every)
        check_int("layers", layers, 1, LIMITS["depth"])
        for what, value in (("width", width), ("batch", batch)):
            check_int(what, value, 1, LIMITS[what])
        check_number("lr", lr)
        inputs = data.x_train[0].numel()
        feedback = partial(lookup("feedback", storage, KINDS), seed, distribution, scale)
        self.rules: dict[str, Rule] = {
            rule: make(
                models.mlp(inputs, [width] * layers, data.classes, activation, seed=seed),
                partial(torch.optim.SGD, lr=lr),
                feedback=feedback(),
            )
            for rule, make in base.chosen(rules, RULES).items()
        }
        self.data, self.every, self.step, self.rows = data, every, 0, list[dict[str, Any]]()
        self._batches = _batches(data, batch, seed)
        self._measure()

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def advance(self) -> None:
        """Take one step with each rule. Raises FloatingPointError for a rule that has run away."""
        x, y = next(self._batches)
        for name, rule in self.rules.items():
            try:
                rule.step(x, y)
            except FloatingPointError as problem:
                label = figures.STYLES[name][0]
                raise FloatingPointError(
                    f"{label} has run away at step {self.step}: lower the learning rate"
                ) from problem
        self.step += 1
        if self.step % self.every == 0:
            self._measure()

    def _measure(self) -> None:
        x, y = self.data.x_train[:PROBE], self.data.y_train[:PROBE]
        for name, rule in self.rules.items():
            angles = alignment.angles(rule, x, y)[:-1]
            self.rows.append(
                {
                    "rule": name,
                    "step": self.step,
                    "loss": cross_entropy(predict(rule, x), y).item(),
                    "accuracy": accuracy(rule, self.data.x_test[:TESTED], self.data.y_test[:TESTED]),
                    "angle_deg": sum(angles) / len(angles),
                }
            )


def _batches(data: datasets.Data, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    orders = (_order(len(data.x_train), seed, epoch).split(batch) for epoch in count())
    return ((data.x_train[chosen], data.y_train[chosen]) for chosen in chain.from_iterable(orders))


@lru_cache(maxsize=1)
def digits() -> datasets.Data:
    """Return MNIST if $MEMDFA_DATA has it, else mnist5k, which is always there."""
    root = Path(os.environ.get("MEMDFA_DATA", "/nowhere")).expanduser()
    there = (root / "mnist.npz").exists() or (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()
    return datasets.load("mnist" if there else "mnist5k")


def live_training(**start: Any) -> "LiveTraining":
    """Return the training to look on, to be the last line of a cell; `start`: a control's value, such as lr=0.1.

    Raises TypeError or ValueError, one line, for what cannot be.
    """
    return LiveTraining(**start)


class LiveTraining(base.Explorer):
    """Live training: four rules side by side, with their loss, accuracy and angle to BP."""

    def __init__(
        self,
        layers: int = 3,
        width: int = 100,
        lr: float = 0.01,
        batch: int = 50,
        activation: str = "relu",
        distribution: str = "he_normal",
        seed: int = 0,
    ):
        activations = [name for name in ACTIVATIONS if name != "none"]
        lookup("activation", activation, dict.fromkeys(activations))
        slider = base.whole(layers, 1, 8, "hidden layers")
        race = Race(digits(), layers, width, lr, batch, activation, distribution, seed=seed)
        super().__init__(
            {
                "layers": slider,
                "width": base.steps((20, 50, 100, 200, 400), width, "units a layer"),
                "activation": base.menu(activations, activation, "activation"),
                "batch": base.steps((10, 20, 50, 100, 200), batch, "batch size"),
                "lr": base.steps(LRS, lr, "learning rate"),
                "distribution": base.menu(list(DISTRIBUTIONS), distribution, "matrices B"),
                "seed": base.seed(seed),
            }
        )
        self.speed = base.menu(SPEEDS, float("inf"), "speed")
        self.start_button = base.button("Start", "train until Pause, or for 3,000 steps", self.start)
        self.pause_button = base.button("Pause", "hold on; Resume goes on from there", self.pause)
        self.reset_button = base.button("Reset", "start anew from untrained networks", self.reset)
        self.status, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        self.background = Background(
            "live training", self._step, lambda problem: self.soon(partial(self._ended, problem))
        )
        self.race: Race | None = race
        self._drawn_at, self._drawn_rows = 0.0, 0
        self.show()
        for control in self.controls.values():
            control.observe(lambda change: self.reset(), "value")
        buttons = ipywidgets.HBox([self.start_button, self.pause_button, self.reset_button])
        buttons.layout.flex_flow = "row wrap"
        left = [
            base.group("Network and training (a change starts anew)", list(self.controls.values()), "1 1 270px"),
            base.group("Run", [buttons, self.speed, self.status], "1 1 270px"),
        ]
        self.children = [base.beside(left, [self.message, self.picture])]

    def start(self) -> None:
        """Go on, or start; nothing if it runs."""
        if self.race is None:
            self.show()
        if self.race is not None and self.race.step < MOST_STEPS:
            self.background.start()
            self.say("")
            self._tell()

    def pause(self) -> None:
        """Hold on after the running step, and wait for that; nothing if it rests."""
        self.background.stop()
        self.show()

    def reset(self) -> None:
        """Put untrained networks in place, as the controls say; training stops."""
        self.background.stop()
        self.race = None
        self.show()

    def draw(self) -> None:
        if self.race is None:
            setting = {name: control.value for name, control in self.controls.items()}
            self.race = Race(digits(), **setting)
        self._tell()
        table, self._drawn_rows = self.race.table, len(self.race.rows)
        last = self.race.rows[-len(self.race.rules) :]
        said = "; ".join(
            f"{figures.STYLES[row['rule']][0]} loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}, "
            f"angle {row['angle_deg']:.0f}°"
            for row in last
        )
        alt = f"Loss, accuracy and angle against steps. At step {last[0]['step']}: {said}."
        self.picture.value = base.image(figures.live_curves(table), alt, (0.65, 0.95, 0.15, 0.35), (0.36, 0.3))

    def _step(self) -> float | None:
        race = self.race
        assert race is not None
        started = time.monotonic()
        race.advance()
        if started - self._drawn_at > DRAWN_EVERY_S:
            self._drawn_at = started
            self.soon(self._show_if_running)
        return 1 / self.speed.value - (time.monotonic() - started) if race.step < MOST_STEPS else None

    def _show_if_running(self) -> None:
        if self.background.running and self.race is not None:
            if len(self.race.rows) == self._drawn_rows:  # nothing new but the number of steps
                self._tell()
            else:
                self.show()
            self._drawn_at = time.monotonic()

    def _ended(self, problem: Exception | None) -> None:
        if not self.background.running:
            self.show()
            if problem is not None:
                self.say(str(problem))

    def _tell(self) -> None:
        """Say where it is, on the buttons too."""
        assert self.race is not None
        running, step = self.background.running, self.race.step
        self.start_button.description = "Resume" if step and not running else "Start"
        self.start_button.disabled, self.pause_button.disabled = running or step >= MOST_STEPS, not running
        state = "training" if running else "done" if step >= MOST_STEPS else "paused" if step else "not started"
        self.status.value = (
            f"<span role='status'>{state}, step {step:,} of {MOST_STEPS:,}, {self.race.data.name}</span>"
        )
