"""Explorers for a notebook: the memory of a step, four rules as they learn, the matrix B, and one step as a film.

Each consists of ipywidgets around functions that need no browser. Write it as the last line of a cell:

- `memory_explorer()`: memory of a step at any depth, width and batch; `explore()` returns its numbers;
- `live_training()`: loss, accuracy and angle of four rules while they train; `Race` trains them without pictures;
- `feedback_explorer()`: the spectrum of B, and the angle over a short training; `Matrix` has its numbers;
- `step_player()`: which tensors exist at each moment of a step; `film()` returns the moments.
"""

from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.widgets.feedback import FeedbackExplorer, Matrix, feedback_explorer
from memdfa_lab.widgets.memory import Explored, MemoryExplorer, explore, memory_explorer
from memdfa_lab.widgets.setting import ALL_RULES, FAMILIES, PRECISIONS, Setting
from memdfa_lab.widgets.step import StepPlayer, film, step_player
from memdfa_lab.widgets.training import LiveTraining, Race, RaceSetting, live_training

__all__ = [
    "ACTIVATIONS",
    "ALL_RULES",
    "FAMILIES",
    "PRECISIONS",
    "Explored",
    "FeedbackExplorer",
    "LiveTraining",
    "Matrix",
    "MemoryExplorer",
    "Race",
    "RaceSetting",
    "Setting",
    "StepPlayer",
    "explore",
    "feedback_explorer",
    "film",
    "live_training",
    "memory_explorer",
    "step_player",
]
