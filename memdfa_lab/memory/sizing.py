"""The largest batch or depth that fits a budget of memory, and the size of all B, before anything runs."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from memdfa_lab.core.feedback import Feedback
from memdfa_lab.memory.predict import Network, predict, without_data
from memdfa_lab.memory.trace import bytes_of, readable

DEEPEST = 10_000  # the largest depth that is tried


def largest_batch(
    rule: Any, network: Network, shape: tuple[int, ...], budget: int | str, *setting: Any, **options: Any
) -> int:
    """Return the largest batch size for which a step's peak, with what rests, fits into the budget.

    `shape`: that of one example, such as (3, 224, 224). `budget`: bytes, or a text such as "8 GiB"; the memory of
    Python and torch themselves is not counted. `setting` and `options` are those of `predict`, optimizer and feedback
    first; a `y_shape` is that of one example, too.

    Raises ValueError if not even one example fits, and what `predict` raises.
    """
    return fitting(held_bytes(rule, network, shape, *setting, **options), bytes_of(budget), "one example")


def deepest(
    rule: Any,
    make_of_depth: Callable[[int], nn.Module],
    x_shape: tuple[int, ...],
    budget: int | str,
    *setting: Any,
    **options: Any,
) -> int:
    """Return the largest depth, up to 10,000, for which a step's peak, with what rests, fits into the budget.

    `make_of_depth(depth)` makes a network; `x_shape` is that of a batch (N, ...). The other arguments are those of
    `largest_batch`. Raises ValueError if not even a network of depth 1 fits, and what `predict` raises.
    """

    @cache
    def held(depth: int) -> int:
        return predict(rule, lambda: make_of_depth(depth), x_shape, *setting, **options).held_bytes

    return fitting(held, bytes_of(budget), "a network of depth 1", DEEPEST)


def held_bytes(
    rule: Any,
    network: Network,
    shape: tuple[int, ...],
    *setting: Any,
    y_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Callable[[int], int]:
    """Return a function of the batch size: the bytes in memory at the step's peak, including what rests.

    For a network that does not take a single example, as with BatchNorm, the value at 1 is that at 2.
    """
    model = without_data(network)

    @cache
    def held(batch: int) -> int:
        y = None if y_shape is None else (batch, *y_shape)
        try:
            return predict(rule, model, (batch, *shape), *setting, y_shape=y, **options).held_bytes
        except ValueError:
            if batch > 1:
                raise
            return held(2)

    return held


def fitting(size: Callable[[int], int], budget: int, one: str, most: int | None = None) -> int:
    """Return what `largest` does. Raises ValueError, which names `one`, if not even one fits."""
    found = largest(size, budget, most=most)
    if not found:
        raise ValueError(f"not even {one} fits into {readable(budget)}: it takes {readable(size(1))}")
    return found


def largest(size: Callable[[int], int], budget: int, least: int = 1, most: int | None = None) -> int:
    """Return an n from `least` to `most` with size(n) <= budget < size(n + 1), or `most` if that fits; 0 if none does.

    size grows nearly linearly with n, so the next n to try is where the line through the last two sizes meets the
    budget. Every fourth time the interval is halved instead or, without an upper end, n is doubled.
    """
    if size(least) > budget:
        return 0
    fits, too_much = least, None if most is None else most + 1
    last, before, tried = least, least + 1, 0
    while too_much is None or too_much - fits > 1:
        tried += 1
        slope = (size(last) - size(before)) / (last - before)
        step = int((budget - size(fits)) / slope) if slope > 0 and tried % 4 else fits
        if too_much is not None:
            step = min(step, too_much - fits - 1) if tried % 4 else (too_much - fits) // 2
        last, before = fits + max(step, 1), last
        if size(last) <= budget:
            fits = last
        else:
            too_much = last
    return fits


def feedback_bytes(rule: Any, network: Network, shape: tuple[int, ...], feedback: Feedback, **options: Any) -> int:
    """Return the bytes of all matrices B of a rule, as if all were kept; 0 for a rule without B.

    The state of the optimizers of a B that learns is not counted.
    """
    fixed: Any = copy.copy(feedback.reusable())
    if feedback.learns:
        fixed.learns, fixed.matrices, fixed.optimizers = False, {}, {}
    kept = predict(rule, network, (2, *shape), feedback=fixed, steps=0, **options)
    return kept.resting_by_category.get("feedback", 0)
