"""Baselines: other ways to train in little memory. They are rules, and are found by name as the four rules are."""

from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.rivals.activation_offload import ActivationOffload
from memdfa_lab.rivals.binomial import Binomial
from memdfa_lab.rivals.last_layer import LastLayer
from memdfa_lab.rivals.lean_bp import CheckpointBP, CheckpointStepInBackward, StepInBackward
from memdfa_lab.rivals.mezo import MeZO
from memdfa_lab.rivals.reversible import Reversible

BASELINES: dict[str, type[Rule]] = {
    "checkpoint": CheckpointBP,
    "step_in_backward": StepInBackward,
    "checkpoint_step_in_backward": CheckpointStepInBackward,
    "binomial": Binomial,
    "reversible": Reversible,
    "activation_offload": ActivationOffload,
    "mezo": MeZO,
    "last_layer": LastLayer,
}
ALL_RULES.update(BASELINES)
