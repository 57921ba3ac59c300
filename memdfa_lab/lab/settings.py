"""The one table of a training run's settings. The command line, sweep files, experiments and reports all read it."""

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

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


class Checked(BaseModel):
    """Values by name that are checked when they are given. ValueError, one line, for the first that does not fit."""

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
        """Return the same with some other values, checked too."""
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
    """Type of a name in a table, as in Annotated[str, NameOf("rule", RULES)]; others are refused with the nearest."""

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


class RunSettings(Checked):
    """Setting: what a training run is made of. None stands for the network's own setting (`ml.models.table()`)."""

    rule: RuleName = Field("memdfa", description="the learning rule or baseline")
    network: Network = Field(
        "fc_relu",
        description=f"one of {', '.join(models.names())}, a ReLU MLP such as 784-[800]x32-10, layers such as "
        "'conv5x5(20) maxpool2 relu [500 relu dropout0.5]x2 classes', or MODULE:FUNCTION, which is imported (also from "
        "the current folder) and called without arguments",
    )
    dataset: str = Field(
        "mnist5k", description="mnist5k (needs no network), mnist, cifar10, the path of an .npz or a folder"
    )
    root: str | None = Field(None, description="where data sets are kept; default: $MEMDFA_DATA, else the user's cache")
    epochs: Count | None = Field(None, description=OWN)
    batch_size: Count | None = Field(None, description=OWN)
    drop_last: bool = Field(
        False,
        description="leave out the last batch of an epoch if it is shorter than the others",
        exclude_if=operator.not_,  # runs without it keep the names that they had before there was such a setting
    )
    augment: bool = Field(False, description="flip and crop training images at random", exclude_if=operator.not_)
    lr: NotNegative | None = Field(None, description=f"learning rate; {OWN}, which is for its own optimizer")
    optimizer: OptimizerName | None = Field(None, description=f"momentum is sgd with momentum 0.9; {OWN}")
    weight_decay: NotNegative | None = Field(None, description=OWN)
    loss: LossName | None = Field(None, description=OWN)
    feedback: FeedbackName = Field(
        "stored",
        description="how the random matrices B are kept between steps",
        validation_alias=AliasChoices("feedback", "feedback_kind"),
    )
    distribution: BeginningName | None = Field(None, description=f"of the random matrices; {OWN}")
    initialisation: InitialisationName | None = Field(None, description=f"of the weights; {OWN}")
    scale: Positive = Field(1.0, description="factor on the random matrices")
    feedback_lr: Positive | None = Field(
        None,
        description="DFA and MEM-DFA: keep the matrices and learn them, with Adam at this rate; default: fixed",
        exclude_if=operator.not_,
    )
    standardise: bool = Field(
        False,
        description="after each step subtract each filter's mean and set its length: for ReLUs without BatchNorm",
        exclude_if=operator.not_,
    )
    readout_positions: Count | None = Field(
        None,
        description="local_readout: positions that a readout sees along each dimension of images; default: 4",
        exclude_if=operator.not_,
    )
    readout_similarity: Fraction | None = Field(
        None,
        description="local_readout: the weight, from 0 to 1, of the similarity loss; default: 0",
        exclude_if=operator.not_,
    )
    clip_norm: Positive | None = Field(None, description="largest norm of one block's gradient; default: no clipping")
    clip_global_norm: Positive | None = Field(
        None, description="largest norm of all gradients together; default: no clipping", exclude_if=operator.not_
    )
    precision: PrecisionName | None = Field(
        None, description="bfloat16, or on a GPU float16; default: the weights'", exclude_if=operator.not_
    )
    pass1: Pass1Name | None = Field(
        None,
        description="format of DFA's and MEM-DFA's first pass: bfloat16, int8, 2bit to 8bit; default: the second's",
        exclude_if=operator.not_,
    )
    pack: PackName | None = Field(
        None,
        description="DFA and MEM-DFA: blocks keep activations in int8, or 2bit to 7bit; default: exact",
        exclude_if=operator.not_,
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of weights, feedback and the order of the data")
    device: DeviceName = Field("cpu", description="cpu, or an accelerator as torch names it: cuda, cuda:1, xpu, mps")

    @model_validator(mode="after")
    def _of_this_rule(self) -> Self:
        if self.distribution == "zero" and self.feedback_lr is None:
            raise ValueError("distribution zero is where a B that learns may begin: set feedback_lr, too")
        for name in ("readout_positions", "readout_similarity"):
            if getattr(self, name) is not None and self.rule != "local_readout":
                raise ValueError(f"{name} is for local_readout, whose blocks have readouts, not for {self.rule}")
        for name, why in (("feedback_lr", "whose B can learn"), ("pack", "which keep activations")):
            if getattr(self, name) is not None and not ALL_RULES[self.rule].teaches_feedback:
                raise ValueError(f"{name} is for DFA and MEM-DFA, {why}, not for {self.rule}: leave it out")
        return self

    def completed(self) -> Self:
        """Return the same with the network's own settings in place of None; baselines have those of BP.

        What is still None then: weight_decay is what the optimizer has by itself, and nothing is clipped.
        """
        network = models.get(self.network)
        rule = self.rule if self.rule in network.lr else "bp"
        own = {name: getattr(network, name) for name in ("optimizer", "weight_decay", "loss", "distribution")}
        own |= {"epochs": network.epochs, "batch_size": network.batch_size, "lr": network.lr[rule]}
        own["initialisation"] = network.initialisation[rule]
        return self.changed(**{name: value for name, value in own.items() if getattr(self, name) is None})


def setting(kind: type[Checked], name: str) -> tuple[type, Mapping[str, Any] | None, Any, str | None]:
    """Return a setting's type, the table of its names if it has one, its default, and its description."""
    field = kind.model_fields[name]
    annotation, marks = field.annotation, list(field.metadata)
    for part in get_args(annotation):  # of Annotated[...] | None
        if part is not type(None):
            annotation, *more = get_args(part) or (part,)
            marks += more
    table = next((mark.table for mark in marks if isinstance(mark, NameOf)), None)
    return cast(type, annotation), table, field.default, field.description
