"""The limits of what a user chooses, and the setting of a step that is predicted."""

from functools import lru_cache
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from memdfa_lab import figures, memory
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.rules import RULES
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.lab import models
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.lab.settings import OPTIMIZERS, Checked, FeedbackName, NameOf, OptimizerName
from memdfa_lab.memory.trace import Trace, bytes_of
from memdfa_lab.rivals import BASELINES

ALL_RULES = {rule: figures.STYLES[rule][0] for rule in (*RULES, *BASELINES)}  # name -> label
FAMILIES = {"mlp": "MLP", "convnet": "3x3 convolutions"}  # of equal hidden layers
IMAGES = {784: (1, 28, 28), 3072: (3, 32, 32), 150_528: (3, 224, 224)}  # number of inputs -> (C, H, W)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MOST_LAYERS = 1000


def _size(text: str) -> str:
    bytes_of(text)
    return text


def _each_once(rules: tuple[str, ...]) -> tuple[str, ...]:
    """Return rules without repetition. Raises ValueError if there are none."""
    if not rules:
        raise ValueError("no rule is chosen: tick one or more")
    return tuple(dict.fromkeys(rules))


Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Width = Annotated[int, Field(ge=1, le=16_384)]
Batch = Annotated[int, Field(ge=1, le=100_000)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Activation = Annotated[str, NameOf("activation", ACTIVATIONS)]
RuleName = Annotated[str, NameOf("rule", ALL_RULES)]
RuleNames = Annotated[tuple[RuleName, ...], Field(strict=False), AfterValidator(_each_once)]


class Setting(Checked):
    """Setting: a network of equal hidden layers, a batch, the rules to compare, and a budget of memory.

    `width` is in units of an MLP's layer, or filters of a convnet's; `precision` is that of weights, batch and all the
    rest. With `count_rest`, pictures show what is in memory between steps, too. Raises ValueError, one line, for values
    that are not possible.
    """

    family: Annotated[str, NameOf("family", FAMILIES)] = "mlp"
    depth: Layers = Field(32, description="hidden layers")
    width: Width = Field(800, description="units, or filters")
    batch: Batch = Field(128, description="batch size")
    inputs: Annotated[int, Field(ge=1, le=1_000_000)] = 784
    classes: Annotated[int, Field(ge=1, le=100_000)] = 10
    activation: Activation = "relu"
    batch_norm: bool = Field(False, description="BatchNorm in each hidden layer")
    optimizer: OptimizerName = "sgd"
    feedback: FeedbackName = Field("regenerated", description="matrices B")
    precision: Annotated[str, NameOf("precision", PRECISIONS)] = "float32"
    rules: RuleNames = tuple(RULES)
    budget: Annotated[str, AfterValidator(_size)] = Field("8 GiB", description="memory")
    count_rest: bool = Field(False, description="draw what rests, too (weights, ...)")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.family == "convnet" and self.inputs not in IMAGES:
            sizes = ", ".join(f"{inputs:,} ({'x'.join(map(str, shape))})" for inputs, shape in IMAGES.items())
            raise ValueError(f"a convnet takes images, of {sizes} inputs, got {self.inputs:,}: choose an mlp")
        if self.batch_norm and self.batch == 1:
            raise ValueError("BatchNorm needs two examples or more to train: choose a larger batch, or leave it out")
        return self

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a batch."""
        return self.batch, *(IMAGES[self.inputs] if self.family == "convnet" else (self.inputs,))

    def predict(self, rule: str, depth: int) -> Trace:
        """Return what a step of a rule holds in a network of this kind with `depth` hidden layers."""
        own = {"depth": depth, "rules": (rule,), "budget": "", "count_rest": False}
        return _predict(self.model_copy(update=own))  # not checked: it may be larger than a user chooses

    @property
    def title(self) -> str:
        """The setting in a line, without rules and budget."""
        norm = ", BatchNorm" if self.batch_norm else ""
        kind = {"mlp": "", "convnet": "convolutions "}[self.family]
        net = f"{kind}{self.inputs}-[{self.width}]x{self.depth}-{self.classes}, {self.activation}{norm}"
        return f"{net}, batch {self.batch:,}, {self.optimizer}, B {self.feedback}, {self.precision}"

    @property
    def code(self) -> str:
        """One line of Python that predicts the same peaks from the whole network."""
        size = IMAGES[self.inputs] if self.family == "convnet" else self.inputs
        net = f"ml.models.{self.family}({size}, [{self.width}] * {self.depth}, {self.classes}, {self.activation!r}"
        net += ", batch_norm=True)" if self.batch_norm else ")"
        net += {"float32": "", "bfloat16": ".bfloat16()", "float64": ".double()"}[self.precision]
        how = f"ml.experiments.OPTIMIZERS[{self.optimizer!r}], ml.feedback.KINDS[{self.feedback!r}]()"
        call = f"ml.memory.predict(rule, lambda: {net}, {self.x_shape}, {how})"
        return f"{{rule: {call} for rule in {list(self.rules)}}}"


@lru_cache(maxsize=1500)  # about 100 MB
def _predict(s: Setting) -> Trace:
    def network() -> nn.Module:
        make: Any = {"mlp": models.mlp, "convnet": models.convnet}[s.family]
        size = s.inputs if s.family == "mlp" else s.x_shape[1:]
        net = make(size, [s.width] * s.depth, s.classes, s.activation, s.batch_norm)
        return net.to(PRECISIONS[s.precision])

    return memory.predict(s.rules[0], network, s.x_shape, OPTIMIZERS[s.optimizer], KINDS[s.feedback]())
