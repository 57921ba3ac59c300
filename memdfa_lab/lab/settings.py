"""The table of a training run's settings, which the command line, sweep files, experiments and reports all read."""

import operator
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Self, cast, get_args

import numpy as np
import torch
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import core_schema

from memdfa_lab.core.checks import lookup
from memdfa_lab.core.devices import device_name
from memdfa_lab.core.distributions import BEGINNINGS, DISTRIBUTIONS
from memdfa_lab.core.feedback import KINDS
from memdfa_lab.core.packing import PACKS
from memdfa_lab.core.precision import PASS1, PRECISIONS
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.lab import models
from memdfa_lab.lab.losses import LOSSES
from memdfa_lab.lab.of_run import check_together

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


class Checked(BaseModel):
    """Values by name, checked when they are given. Raises ValueError, in one line, for the first that does not fit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise ValueError(_in_one_line(type(self), problem)) from None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}

    def changed(self, **changes: Any) -> Self:
        """Return a copy with some values replaced; they are checked, too."""
        return type(self)(**{**dict(self), **changes})


def _in_one_line(kind: type[Checked], problem: ValidationError) -> str:
    first = problem.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        try:
            lookup(str(kind.__doc__).partition(":")[0].lower(), name, kind.model_fields)
        except ValueError as unknown:
            return str(unknown)
    if first["type"] == "missing":
        return f"{name} is missing: it has no default"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    text = first["msg"].replace("Input should", f"{name} must", 1)
    return f"{text if name in text else f'{name}: {text}'}, got {first['input']!r}"


class NameOf:
    """The type of a name in a table, as in Annotated[str, NameOf("rule", RULES)]; an error names the nearest one."""

    def __init__(self, what: str, table: Mapping[str, Any]):
        self.what, self.table = what, table

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        lookup(self.what, name, self.table)
        return name


def _network(name: str) -> str:
    models.get(name)
    return name


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Network = Annotated[str, AfterValidator(_network)]
InitialisationName = Annotated[str, NameOf("initialisation", models.INITIALISATIONS)]
DistributionName = Annotated[str, NameOf("distribution", DISTRIBUTIONS)]
BeginningName = Annotated[str, NameOf("distribution", BEGINNINGS)]
FeedbackName = Annotated[str, NameOf("feedback", KINDS)]
LossName = Annotated[str, NameOf("loss", LOSSES)]
OptimizerName = Annotated[str, NameOf("optimizer", OPTIMIZERS)]
PrecisionName = Annotated[str, NameOf("precision", PRECISIONS)]
Pass1Name = Annotated[str, NameOf("pass1", PASS1)]
PackName = Annotated[str, NameOf("pack", PACKS)]
DeviceName = Annotated[str, AfterValidator(device_name)]
RuleName = Annotated[str, NameOf("rule", ALL_RULES)]


OWN = "default: the network's setting"
# A setting that came after the first runs: a run without it keeps the name of its folder.
later = partial(Field, exclude_if=operator.not_)


class RunSettings(Checked):
    """Setting: the settings of a training run. None stands for the network's own setting (`ml.models.table()`)."""

    rule: RuleName = Field("memdfa", description="the learning rule or baseline")
    network: Network = Field(
        "fc_relu",
        description=f"one of {', '.join(models.names())}; a ReLU MLP such as 784-[800]x32-10 (784 inputs, 32 hidden "
        "layers of 800 units, 10 outputs); layers such as 'conv5x5(20) maxpool2 relu [500 relu dropout0.5]x2 classes'; "
        "or MODULE:FUNCTION, a function without arguments that returns a model (MODULE may be a file in this folder)",
    )
    dataset: str = Field(
        "mnist5k",
        description="mnist5k (needs no download), mnist, cifar10, or the path of an .npz or of a folder of images",
    )
    root: str | None = Field(
        None, description="folder of the data sets; default: $MEMDFA_DATA, else memdfa_lab in the user's cache folder"
    )
    epochs: Count | None = Field(None, description=f"passes over the training data; {OWN}")
    batch_size: Count | None = Field(None, description=f"examples per step; {OWN}")
    drop_last: bool = later(False, description="leave out the last batch of an epoch if it is shorter than the others")
    augment: bool = later(False, description="flip and crop training images at random")
    lr: NotNegative | None = Field(
        None, description=f"learning rate, 0 or more; {OWN}, for the network's own optimizer"
    )
    optimizer: OptimizerName | None = Field(
        None, description=f"optimizer of the weights; momentum is sgd with momentum 0.9; {OWN}"
    )
    weight_decay: NotNegative | None = Field(
        None, description=f"weight decay of the optimizer, 0 or more; {OWN}, else the optimizer's"
    )
    loss: LossName | None = Field(None, description=f"loss; mse and bce compare outputs with one-hot labels; {OWN}")
    feedback: FeedbackName = Field(
        "stored",
        description="random matrices B between steps: stored, drawn again at each use, or one shared by all blocks",
        validation_alias=AliasChoices("feedback", "feedback_kind"),
    )
    distribution: BeginningName | None = Field(
        None, description=f"distribution of the random matrices B; zero only for a B that learns; {OWN}"
    )
    initialisation: InitialisationName | None = Field(None, description=f"initial values of the weights; {OWN}")
    scale: Positive = Field(1.0, description="factor on the random matrices B, above 0")
    feedback_lr: Positive | None = later(
        None, description="DFA and MEM-DFA: train B, by Adam with this learning rate, above 0; default: B is fixed"
    )
    standardise: bool = later(
        False, description="after each step, subtract each filter's mean and set its norm, for ReLUs without BatchNorm"
    )
    readout_positions: Count | None = later(
        None, description="local_readout: positions per image dimension that a readout gets, 1 or more; default: 4"
    )
    readout_similarity: Fraction | None = later(
        None, description="local_readout: weight of the similarity loss, from 0 to 1; default: 0"
    )
    clip_norm: Positive | None = Field(
        None, description="largest norm of each block's gradient, above 0; default: no clipping"
    )
    clip_global_norm: Positive | None = later(
        None, description="largest norm of the whole network's gradient, above 0; default: no clipping"
    )
    precision: PrecisionName | None = later(
        None,
        description="number format of the step, under autocast; float16 on a GPU only; default: that of the weights",
    )
    pass1: Pass1Name | None = later(
        None, description="DFA and MEM-DFA: number format of the first forward pass; default: that of the second"
    )
    pack: PackName | None = later(
        None, description="DFA and MEM-DFA: number format in which blocks keep activations; default: unpacked"
    )
    seed: int = Field(
        0,
        ge=0,
        le=LARGEST_SEED,
        description="seed of weights, random matrices B and the order of the examples, 0 or more",
    )
    device: DeviceName = Field("cpu", description="cpu, or an accelerator as torch names it: cuda, cuda:1, xpu, mps")

    @model_validator(mode="after")
    def _of_this_rule(self) -> Self:
        if self.distribution == "zero" and self.feedback_lr is None:
            raise ValueError(
                "distribution zero is for a B that learns: set feedback_lr, too, or choose another distribution"
            )
        for name in ("readout_positions", "readout_similarity"):
            if getattr(self, name) is not None and self.rule != "local_readout":
                raise ValueError(f"{name} is for local_readout, not for {self.rule}: leave it out")
        for name, why in (("feedback_lr", "whose B can learn"), ("pack", "which keep activations")):
            if getattr(self, name) is not None and not ALL_RULES[self.rule].teaches_feedback:
                raise ValueError(f"{name} is for DFA and MEM-DFA, {why}, not for {self.rule}: leave it out")
        if self.feedback_lr is not None and self.feedback != "stored":
            raise ValueError(f"a B that learns is stored, not {self.feedback}: leave feedback out, or feedback_lr")
        check_together(self)
        return self

    def completed(self) -> Self:
        """Return a copy with the network's own settings in place of None; baselines get those of BP.

        Some settings may still be None: weight_decay is then the optimizer's default, and nothing is clipped.
        """
        network = models.get(self.network)
        rule = self.rule if self.rule in network.lr else "bp"
        own = {name: getattr(network, name) for name in ("optimizer", "weight_decay", "loss", "distribution")}
        own |= {"epochs": network.epochs, "batch_size": network.batch_size, "lr": network.lr[rule]}
        own["initialisation"] = network.initialisation[rule]
        return self.changed(**{name: value for name, value in own.items() if getattr(self, name) is None})


def setting(kind: type[Checked], name: str) -> tuple[type, Mapping[str, Any] | None, Any, str | None]:
    """Return a setting's type, its table of names (or None), its default, and its description."""
    field = kind.model_fields[name]
    annotation, marks = field.annotation, list(field.metadata)
    for part in get_args(annotation):  # of Annotated[...] | None
        if part is not type(None):
            annotation, *more = get_args(part) or (part,)
            marks += more
    table = next((mark.table for mark in marks if isinstance(mark, NameOf)), None)
    return cast(type, annotation), table, field.default, field.description
