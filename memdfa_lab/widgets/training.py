"""Live training: four rules train side by side, from the same weights and on the same batches, with live pictures."""

import math
import os
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import torch
from pydantic import Field
from torch.nn.functional import cross_entropy

from memdfa_lab import figures
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import RULES, find_rule
from memdfa_lab.lab import alignment, datasets, models
from memdfa_lab.lab.evaluation import accuracy, predict
from memdfa_lab.lab.example import FEEDBACK, kind_for
from memdfa_lab.lab.settings import Checked, Count, DistributionName, NotNegative, Positive
from memdfa_lab.widgets import base
from memdfa_lab.widgets.pictures import image
from memdfa_lab.widgets.setting import ALL_RULES, Activation, Batch, KindName, Layers, RuleNames, Seed, Width

MOST_STEPS = 3000  # after which training stops by itself
TESTED = 1000  # test images for the accuracy
SPEEDS = {"1 step a second": 1.0, "5": 5.0, "20": 20.0, "100": 100.0, "as fast as possible": math.inf}
DRAWN_EVERY_S = 0.5


class RaceSetting(Checked):
    """Setting of a race: MLPs of equal hidden layers, trained by SGD with each of the rules.

    `Race.table` has a row for every `every` steps. Loss and angle are those on the first `probe` training images.
    """

    layers: Layers = Field(3, description="hidden layers")
    width: Width = Field(100, description="units per layer")
    lr: NotNegative = Field(0.01, description="learning rate")
    batch: Batch = Field(50, description="batch size")
    activation: Activation = "relu"
    distribution: DistributionName = Field("he_normal", description="matrices B")
    scale: Positive = 1.0
    storage: KindName = "stored"
    seed: Seed = 0
    rules: RuleNames = tuple(RULES)
    every: Count = 20
    probe: Count = 250


class Race:
    """Rules that train together, step by step, from the same weights and on the same batches.

    `data`: as `ml.datasets.load` returns it. `changes`: other values of the setting, such as width=200.
    `before_step(rule, step)` may change something, such as B, before each step and each measurement. Raises TypeError
    or ValueError, one line, for values that are not possible.
    """

    def __init__(
        self,
        data: datasets.Data,
        setting: RaceSetting | None = None,
        before_step: Callable[[Rule, int], object] = lambda rule, step: None,
        **changes: Any,
    ):
        datasets.check_data("Race", data)
        s = base.start_from(RaceSetting, setting, changes)
        inputs = data.x_train[0].numel()
        self.rules: dict[str, Rule] = {
            rule: find_rule(rule)(
                models.mlp(inputs, [s.width] * s.layers, data.classes, s.activation, seed=s.seed),
                partial(torch.optim.SGD, lr=s.lr),
                feedback=FEEDBACK[kind_for(rule, s.storage)](s.seed, s.distribution, s.scale),
            )
            for rule in s.rules
        }
        self.data, self.every, self.probe, self.before_step = data, s.every, s.probe, before_step
        self.step, self.rows = 0, list[dict[str, Any]]()
        self._batches = data.batches(s.batch, s.seed)
        self._arrive()

    @property
    def table(self) -> pd.DataFrame:
        """One row per rule and measured step: rule, step, loss, accuracy (0 to 1) and angle_deg.

        The accuracy is that on the first 1,000 test images. The angle is that to BP's gradient, in degrees, the mean
        over the hidden blocks.
        """
        return pd.DataFrame(self.rows)

    def advance(self) -> None:
        """Take one step with each rule. Raises FloatingPointError for a rule that diverges."""
        x, y = next(self._batches)
        for name, rule in self.rules.items():
            try:
                rule.step(x, y)
            except FloatingPointError as problem:
                text = f"{ALL_RULES[name]} diverged at step {self.step}: lower the learning rate"
                raise FloatingPointError(text) from problem
        self.step += 1
        self._arrive()

    def _arrive(self) -> None:
        for name, rule in self.rules.items():
            self.before_step(rule, self.step)
            if self.step % self.every == 0:
                x, y = self.data.x_train[: self.probe], self.data.y_train[: self.probe]
                loss = cross_entropy(predict(rule, x), y).item()
                right = accuracy(rule, self.data.x_test[:TESTED], self.data.y_test[:TESTED])
                angles = alignment.angles(rule, x, y)[:-1]
                row = {"rule": name, "step": self.step, "loss": loss, "accuracy": right}
                self.rows.append(row | {"angle_deg": sum(angles) / len(angles)})


@lru_cache(maxsize=1)
def digits() -> datasets.Data:
    """Return MNIST if $MEMDFA_DATA has it, else mnist5k, which needs no network."""
    root = Path(os.environ.get("MEMDFA_DATA", "/nowhere")).expanduser()
    has_mnist = (root / "mnist.npz").exists() or (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()
    return datasets.load("mnist" if has_mnist else "mnist5k")


class LiveTraining(base.Explorer):
    """Live training: four rules side by side, with their loss, accuracy and angle to BP."""

    trains = True

    def __init__(self, setting: RaceSetting | None = None, **changes: Any):
        super().__init__(base.start_from(RaceSetting, setting, changes))
        self.training = False
        self.start_button = self._button("Start", "train until Pause, or for 3,000 steps", self.start)
        self.pause_button = self._button("Pause", "stop for now; Resume continues", self.pause)
        self.reset_button = self._button("Reset", "begin again with untrained networks", self.reset)
        self.speed = ipywidgets.Dropdown(options=SPEEDS, value=math.inf, description="speed", **base.WIDE)
        self.status = ipywidgets.HTML()
        buttons = base.row([self.start_button, self.pause_button, self.reset_button, self.speed, self.status])
        groups: dict[str, Any] = {
            "Network and training (a change begins again)": {
                "layers": range(1, 9),
                "width": (20, 50, 100, 200, 400),
                "activation": None,
                "batch": (10, 20, 50, 100, 200),
                "lr": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
                "distribution": None,
                "seed": range(21),
            }
        }
        self.lay_out(groups, [buttons, self.picture], [])

    def _button(self, name: str, tooltip: str, call: Callable[[], None]) -> Any:
        button = ipywidgets.Button(description=name, tooltip=tooltip, layout={"width": "7em"})
        button.on_click(lambda button: self.in_loop(call))
        return button

    def start(self) -> None:
        """Start or resume training; do nothing if it is running."""
        self.catch_up()
        if not self.training:
            self.begin(self._train())

    def pause(self) -> None:
        """Stop after the current step; do nothing if training is not running."""
        if self.training:
            self.stop()
            self._draw()

    def reset(self) -> None:
        """Stop, and make new networks with the values of the controls."""
        self.begin(self.parts())

    def parts(self) -> base.Parts:
        self.race = Race(digits(), self.setting)
        self._draw()
        yield 0.0

    def _train(self) -> base.Parts:
        self.training, drawn_at = True, time.monotonic()
        self._tell()
        try:
            while self.race.step < MOST_STEPS:
                started = time.monotonic()
                self.race.advance()
                if started - drawn_at > DRAWN_EVERY_S:
                    self._draw()
                    drawn_at = time.monotonic()
                yield 1 / self.speed.value - (time.monotonic() - started)
            self._draw()
        finally:
            self.training = False
            self._tell()

    def _draw(self) -> None:
        race = self.race
        self._tell()
        last = race.rows[-len(race.rules) :]
        now = "; ".join(
            f"{ALL_RULES[row['rule']]} loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}, "
            f"angle {row['angle_deg']:.0f}°"
            for row in last
        )
        alt = f"Loss, accuracy and angle against steps. At step {last[0]['step']}: {now}."
        self.picture.value = image(figures.live_curves(race.table), alt, (0.65, 0.95, 0.15, 0.35), (0.36, 0.3))

    def _tell(self) -> None:
        """Show the state of the training, on the buttons too."""
        race = self.race
        done, begun = race.step >= MOST_STEPS, race.step > 0
        self.start_button.description = "Resume" if begun and not self.training else "Start"
        self.start_button.disabled, self.pause_button.disabled = self.training or done, not self.training
        state = "training" if self.training else "done" if done else "paused" if begun else "not started"
        self.status.value = (
            f"<span role='status'>{state}, step {race.step:,} of {MOST_STEPS:,}, {race.data.name}</span>"
        )


live_training = LiveTraining  # as the last line of a cell
