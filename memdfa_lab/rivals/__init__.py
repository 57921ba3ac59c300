"""What a user could pick instead of MEM-DFA to save memory. The baselines are rules, and are found by name as these."""

from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.rivals.last_layer import LastLayer
from memdfa_lab.rivals.lean_bp import CheckpointBP, CheckpointStepInBackward, StepInBackward

BASELINES: dict[str, type[Rule]] = {
    "checkpoint": CheckpointBP,
    "step_in_backward": StepInBackward,
    "checkpoint_step_in_backward": CheckpointStepInBackward,
    "last_layer": LastLayer,
}
ALL_RULES.update(BASELINES)
