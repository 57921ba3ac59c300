"""One function a figure; each takes plain tables and returns a matplotlib Figure. Units are on the axes."""

from memdfa_lab.figures.machines import pipelines, sent, utilisation
from memdfa_lab.figures.peaks import (
    RESTING,
    frontier,
    keep_frontier,
    peak_against,
    peak_at_depth,
    peak_fillings,
    peaks_by_network,
    rest_against,
    theory_and_measurement,
)
from memdfa_lab.figures.profiles import lifetimes, memory_profiles, step_profiles
from memdfa_lab.figures.signals import (
    LOOKS,
    against_scale,
    alignment,
    balance,
    block_angles,
    feedback,
    signal_images,
    spectrum,
)
from memdfa_lab.figures.style import FILLS, FILLS_AT_REST, MIB, SETTINGS, STYLES, picture, save
from memdfa_lab.figures.sweeps import sweep_summary
from memdfa_lab.figures.training import confusion, images, learning_curves, live_curves, training_curves

__all__ = [
    "FILLS",
    "FILLS_AT_REST",
    "LOOKS",
    "MIB",
    "RESTING",
    "SETTINGS",
    "STYLES",
    "against_scale",
    "alignment",
    "balance",
    "block_angles",
    "confusion",
    "feedback",
    "frontier",
    "images",
    "keep_frontier",
    "learning_curves",
    "lifetimes",
    "live_curves",
    "memory_profiles",
    "peak_against",
    "peak_at_depth",
    "peak_fillings",
    "peaks_by_network",
    "picture",
    "pipelines",
    "rest_against",
    "save",
    "sent",
    "signal_images",
    "spectrum",
    "step_profiles",
    "sweep_summary",
    "theory_and_measurement",
    "training_curves",
    "utilisation",
]
