"""One function for each figure; it takes plain tables and returns a matplotlib Figure. Units are on the axes.

`algorithm` needs no table and returns an animated SVG.
"""

from memdfa_lab.figures.algorithm import algorithm
from memdfa_lab.figures.curves import alignment, learning_curves, peak_against
from memdfa_lab.figures.explorers import feedback, live_curves, marchenko_pastur, peak_at_depth, step_profiles
from memdfa_lab.figures.images import images
from memdfa_lab.figures.lines import draw_lines, lines
from memdfa_lab.figures.peaks import direct_labels, frontier, peak_fillings
from memdfa_lab.figures.profiles import lifetimes, memory_profiles
from memdfa_lab.figures.style import FILLS, LOOKS, MIB, SETTINGS, STYLES, label, legend, panels, picture, save
from memdfa_lab.figures.sweeps import sweep_summary

__all__ = [
    "FILLS",
    "LOOKS",
    "MIB",
    "SETTINGS",
    "STYLES",
    "algorithm",
    "alignment",
    "direct_labels",
    "draw_lines",
    "feedback",
    "frontier",
    "images",
    "label",
    "learning_curves",
    "legend",
    "lifetimes",
    "lines",
    "live_curves",
    "marchenko_pastur",
    "memory_profiles",
    "panels",
    "peak_against",
    "peak_at_depth",
    "peak_fillings",
    "picture",
    "save",
    "step_profiles",
    "sweep_summary",
]
