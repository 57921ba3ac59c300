"""The limits of the values that a user can choose, and the setting of a predicted step."""

from functools import lru_cache
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from memdfa_lab import figures, memory
from memdfa_lab.core.local_losses import LOCAL_RULES
from memdfa_lab.core.rules import RULES
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.lab import models
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.lab.example import FEEDBACK, LEARNED_LR, kind_for
from memdfa_lab.lab.settings import OPTIMIZERS, Checked, NameOf, OptimizerName
from memdfa_lab.memory.predict import without_data
from memdfa_lab.memory.trace import Trace, bytes_of
from memdfa_lab.rivals import BASELINES

ALL_RULES = {rule: figures.label(rule) for rule in (*RULES, *BASELINES, *LOCAL_RULES)}  # name -> label
EQUAL = {"mlp": "MLP", "convnet": "3x3 convolutions"}  # families of equal hidden layers
FAMILIES = {**EQUAL, "model": "a model by name"}
IMAGES = {784: (1, 28, 28), 3072: (3, 32, 32), 150_528: (3, 224, 224)}  # number of inputs -> (C, H, W)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MOST_LAYERS = 1000


# Rules whose B can learn; other rules get a stored B, which is what a learned B starts from.
LEARNERS = tuple(name for name, rule in RULES.items() if rule.teaches_feedback)


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
KindName = Annotated[str, NameOf("feedback", FEEDBACK)]
RuleName = Annotated[str, NameOf("rule", ALL_RULES)]
RuleNames = Annotated[tuple[RuleName, ...], Field(strict=False), AfterValidator(_each_once)]


class Setting(Checked):
    """Setting: a network of equal hidden layers or a model by name, a batch, rules to compare, a budget of memory.

    `width` counts the units of an MLP's layer, or the filters of a convnet's. `precision` is that of all tensors. With
    `count_rest`, pictures include what is in memory between steps. In the family "model", `model` names a network of
    torchvision, or is a user's MODULE:FUNCTION; images are 3x224x224, or as in resnet18@3x64x64, and depth, width and
    other values of layers are ignored. Raises ValueError, one line, for values that are not possible.
    """

    family: Annotated[str, NameOf("family", FAMILIES)] = "mlp"
    model: str = Field("resnet18", description="model's name")
    depth: Layers = Field(32, description="hidden layers")
    width: Width = Field(800, description="units, or filters")
    batch: Batch = Field(128, description="batch size")
    inputs: Annotated[int, Field(ge=1, le=1_000_000)] = 784
    classes: Annotated[int, Field(ge=1, le=100_000)] = 10
    activation: Activation = "relu"
    batch_norm: bool = Field(False, description="BatchNorm in each hidden layer")
    optimizer: OptimizerName = "sgd"
    feedback: KindName = Field("regenerated", description="matrices B")
    precision: Annotated[str, NameOf("precision", PRECISIONS)] = "float32"
    rules: RuleNames = tuple(RULES)
    budget: Annotated[str, AfterValidator(_size)] = Field("8 GiB", description="memory")
    count_rest: bool = Field(False, description="draw what rests, too (weights, ...)")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.family == "convnet" and self.inputs not in IMAGES:
            sizes = ", ".join(f"{inputs:,} ({'x'.join(map(str, shape))})" for inputs, shape in IMAGES.items())
            raise ValueError(f"a convnet takes images, of {sizes} inputs, got {self.inputs:,}: choose these or an mlp")
        if self.family == "model":
            self.network()
        elif self.batch_norm and self.batch == 1:
            raise ValueError("BatchNorm needs two examples or more to train: choose a larger batch, or no BatchNorm")
        return self

    @property
    def equal_layers(self) -> bool:
        """Whether the network has equal hidden layers, and so any depth."""
        return self.family in EQUAL

    @property
    def model_name(self) -> str:
        """The model as `ml.models` names it."""
        name = self.model if ":" in self.model else f"torchvision.models:{self.model}"
        return name if "@" in name else f"{name}@3x224x224"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a batch."""
        if self.family == "model":
            return self.batch, *models.input_shape(self.model_name)
        return self.batch, *(IMAGES[self.inputs] if self.family == "convnet" else (self.inputs,))

    def network(self) -> nn.Module:
        """Return a new network. Raises TypeError or ValueError, one line, for a model that cannot be built."""
        if self.family == "model":
            return _model(self.model_name, self.precision)
        make: Any = {"mlp": models.mlp, "convnet": models.convnet}[self.family]
        size = self.inputs if self.family == "mlp" else self.x_shape[1:]
        net = make(size, [self.width] * self.depth, self.classes, self.activation, self.batch_norm)
        return net.to(PRECISIONS[self.precision])

    def predict(self, rule: str, depth: int) -> Trace:
        """Return the predicted step of a rule in this network, with `depth` hidden layers if they are equal."""
        own = {"depth": depth if self.equal_layers else 1, "rules": (rule,), "budget": "", "count_rest": False}
        return _predict(self.model_copy(update=own))  # not checked: it may be larger than a user can choose

    @property
    def title(self) -> str:
        """The setting in a line, without rules and budget."""
        how = f"batch {self.batch:,}, {self.optimizer}, B {self.feedback}, {self.precision}"
        if self.family == "model":
            return f"{self.model_name.removeprefix('torchvision.models:')}, {how}"
        norm = ", BatchNorm" if self.batch_norm else ""
        kind = {"mlp": "", "convnet": "convolutions "}[self.family]
        net = f"{kind}{self.inputs}-[{self.width}]x{self.depth}-{self.classes}, {self.activation}{norm}"
        return f"{net}, {how}"

    @property
    def code(self) -> str:
        """One line of Python that predicts the same peaks from the whole network."""
        size = IMAGES[self.inputs] if self.family == "convnet" else self.inputs
        net = f"ml.models.{self.family}({size}, [{self.width}] * {self.depth}, {self.classes}, {self.activation!r}"
        net += ", batch_norm=True)" if self.batch_norm else ")"
        if self.family == "model":
            net = f"ml.models.build({self.model_name!r})"
        net += {"float32": "", "bfloat16": ".bfloat16()", "float64": ".double()"}[self.precision]
        B = f"ml.feedback.KINDS[{self.feedback!r}]()"
        if self.feedback == "learned":
            B = f"ml.feedback.Learned(lr={LEARNED_LR}) if rule in {LEARNERS} else ml.feedback.Stored()"
        how = f"ml.experiments.OPTIMIZERS[{self.optimizer!r}], {B}"
        call = f"ml.memory.predict(rule, lambda: {net}, {self.x_shape}, {how})"
        return f"{{rule: {call} for rule in {list(self.rules)}}}"


@lru_cache(maxsize=4)
def _model(name: str, precision: str) -> nn.Module:
    return without_data(lambda: models.build(name).to(PRECISIONS[precision]))


@lru_cache(maxsize=1500)  # about 100 MB
def _predict(s: Setting) -> Trace:
    optimizer, B = OPTIMIZERS[s.optimizer], FEEDBACK[kind_for(s.rules[0], s.feedback)]()
    return memory.predict(s.rules[0], s.network, s.x_shape, optimizer, B)
