"""The numbers behind the page `peaks`: what one step holds above rest, for MLPs 784-[width]xDEPTH-10 with ReLU.

`python notebooks/book/peaks.py` writes _static/peaks_data.js in some minutes. It is a script and not JSON, since a page
that is opened from disk may not read other files. Closed forms give all rules but checkpointing, which is predicted.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import sympy as sp

import memdfa_lab as ml
from memdfa_lab.figures import STYLES
from memdfa_lab.memory import formula as f

DATA = Path(__file__).parent / "_static" / "peaks_data.js"
DEPTHS = [2**i for i in range(1, 9)]
BATCHES = [2**i for i in range(3, 13)]
WIDTHS, OPTIMIZERS = [64, 256, 1024], ["sgd", "adam"]
CLOSED = ["bp", "dfa", "memdfa", "local_readout"]
PREDICTED = ["checkpoint", "checkpoint_step_in_backward"]


def numbers(width: int) -> dict:
    """Return the numbers that the closed forms' symbols stand for, but for depth and batch."""
    return {f.n: width, f.C: 10, f.n_0: 784, f.s: 4, f.k: f.SMALL_BYTES}


def closed(rule: str, optimizer: str, width: int) -> list[list[int]]:
    """Return the peaks above rest in bytes, a row a depth, by the closed form; B is drawn again at each use.

    The moments become functions of numbers. To substitute some symbols alone is not safe: sympy takes Max(256, 16384/N)
    to be 16384/N.
    """
    moments = f.moments(rule, feedback="regenerated", optimizer=optimizer)
    held = sp.lambdify([f.L, f.N, *numbers(width)], list(moments.values()), "math")
    return [[int(max(held(depth, batch, *numbers(width).values()))) for batch in BATCHES] for depth in DEPTHS]


def predicted(rule: str, optimizer: str, width: int, depth: int, batch: int) -> int:
    """Return the peak above rest in bytes by `ml.memory.predict`."""
    return ml.experiments.profile(rule, f"784-[{width}]x{depth}-10", batch, optimizer).peak_bytes


def between(peak: Callable[[int], int], low: int, high: int) -> dict[int, int]:
    """Return the peaks at the BATCHES from low to high.

    A peak is the largest of terms that are linear in the batch, so between three points on a line all lie on it.
    """
    inside = [batch for batch in BATCHES if low < batch < high]
    if not inside:
        return {low: peak(low), high: peak(high)}
    middle = inside[len(inside) // 2]
    slope = (peak(high) - peak(low)) / (high - low)
    line = {batch: peak(low) + slope * (batch - low) for batch in BATCHES if low <= batch <= high}
    if line[middle] == peak(middle):
        return {batch: round(found) for batch, found in line.items()}
    return between(peak, low, middle) | between(peak, middle, high)


def resting(rule: str, optimizer: str, width: int) -> list[int]:
    """Return what rests in bytes, a number a depth: weights, readouts and the optimizer's state."""
    found = f.terms(rule, feedback="regenerated", optimizer=optimizer)
    rest = (found["parameters"] + found["optimizer state"]).subs(numbers(width))
    return [int(rest.subs(f.L, depth)) for depth in DEPTHS]


def table() -> dict:
    """Return all that the page shows."""
    cases = [(optimizer, width) for optimizer in OPTIMIZERS for width in WIDTHS]
    peaks = {rule: {f"{o} {w}": closed(rule, o, w) for o, w in cases} for rule in CLOSED}
    for rule in PREDICTED:
        peaks[rule] = {}
        for o, w in cases:
            at = [cache(partial(predicted, rule, o, w, depth)) for depth in DEPTHS]
            peaks[rule][f"{o} {w}"] = [list(between(peak, BATCHES[0], BATCHES[-1]).values()) for peak in at]
    return {
        "depths": DEPTHS,
        "batches": BATCHES,
        "rules": {rule: {"label": STYLES[rule][0], "color": STYLES[rule][1]["color"]} for rule in peaks},
        "peaks": peaks,
        "rest": {
            rule: {f"{o} {w}": resting(rule if rule in CLOSED else "bp", o, w) for o, w in cases} for rule in peaks
        },
    }


if __name__ == "__main__":
    DATA.write_text(f"const PEAKS = {json.dumps(table(), separators=(',', ':'))};\n", encoding="utf-8")
