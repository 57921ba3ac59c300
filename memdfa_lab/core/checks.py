"""Checks of arguments: a name, a number, an object, a batch, a loss. Each error is one line that says what to do."""

import contextlib
import difflib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from memdfa_lab.core.watcher import has_data

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1]


def lookup(what: str, name: object, table: Mapping[str, T]) -> T:
    """Return table[name]. Raises ValueError, with the nearest name and all names, if there is no such name."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name).lower(), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (there are: {', '.join(table)})")


@contextlib.contextmanager
def of_an_extra() -> Iterator[None]:
    """Say what to install, in one line, where the package imports a library that is missing.

    Raises ModuleNotFoundError. A failed import in the user's own code is raised unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        if PACKAGE not in Path(traceback.extract_tb(problem.__traceback__)[-1].filename).parents:
            raise
        line = f'{problem.name} is not installed: pip install "memdfa_lab[all]"'
        raise ModuleNotFoundError(line, name=problem.name) from None


def check_int(what: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return the value as an int. Raises ValueError if it is not a whole number from `least` to `most`."""
    limit = math.inf if most is None else most
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= limit:
        upper = "on" if most is None else f"to {most:,}"
        raise ValueError(f"{what} must be a whole number from {least} {upper}, got {value!r}")
    return int(value)


def check_number(what: str, value: object, least: float = 0, or_more: bool = True, most: float = math.inf) -> None:
    """Raise ValueError if the value is not a finite number from `least` to `most`; without `or_more`, above it."""
    given = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(given) or given < least or given > most or (given == least and not or_more):
        upper = "on" if most == math.inf else f"to {most}"
        kind = f"from {least} {upper}" if or_more else f"above {least}"
        raise ValueError(f"{what} must be a finite number {kind}, got {value!r}")


def check_type(what: str, value: object, kind: Any, expected: str) -> None:
    """Raise TypeError, which names what is expected, if the value is not an instance of the kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {expected}, not a {type(value).__name__}")


def first_difference(one: object, other: object) -> tuple[str, str]:
    """Return the first lines in which two texts differ; "nothing" where one text has ended."""
    for line, other_line in zip_longest(str(one).splitlines(), str(other).splitlines(), fillvalue="nothing"):
        if line != other_line:
            return line.strip(), other_line.strip()
    return str(one), str(other)


def check_batch(x: Any) -> None:
    """Raise TypeError, ValueError or FloatingPointError if x is not a batch (N, ...) of finite real numbers."""
    if not isinstance(x, Tensor):
        several = isinstance(x, (tuple, list, dict)) and any(isinstance(item, Tensor) for item in x)
        do = "join them to one, and split them in the first block" if several else "use torch.as_tensor"
        raise TypeError(f"x must be one tensor (N, ...), got a {type(x).__name__}: {do}")
    if x.layout is not torch.strided or x.is_nested or x.is_complex():
        given = "a nested tensor" if x.is_nested else f"{x.dtype}, {x.layout}"
        raise TypeError(f"x must be a dense tensor (N, ...) of real numbers, got {given}: pad it, or use x.to_dense()")
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise TypeError(
            f"x is {x.dtype}, with which torch does not compute: use x.float(), or x.long() for word indices"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be a batch (N, ...) of one example or more, got shape {tuple(x.shape)}")
    check_finite("x holds NaN or inf", x)


def check_labels(what: str, y: Tensor, do: str) -> None:
    """Raise TypeError, which says what to do, if y is not labels (N,)."""
    if y.dim() != 1 or y.is_floating_point():
        raise TypeError(f"{what} labels (N,), and y is {tuple(y.shape)} {y.dtype}: {do}")


def check_finite(problem: str, *tensors: Tensor, so_far: str = "no weight was changed") -> None:
    """Raise FloatingPointError if a tensor holds NaN or infinity. `so_far`: what was done to the weights until then."""
    for tensor in tensors:
        least, largest = torch.aminmax(tensor.detach())  # isfinite would allocate four tensors of this size
        if not (torch.isfinite(least) and torch.isfinite(largest)):
            raise FloatingPointError(
                f"{problem}; {so_far}: look for NaN and inf in the data, lower the learning rate, or clip "
                "(clip_norm=...)"
            )


def scalar_loss(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Any) -> Tensor:
    """Return loss_fn(logits, y), 0-d. Raises ValueError if the loss refuses them or is not a scalar of the logits."""
    try:
        loss = loss_fn(logits, y)
    except (IndexError, RuntimeError, TypeError, ValueError, UserWarning) as problem:
        raise ValueError(_why_refused(loss_fn, logits, y, problem)) from problem
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss must be a scalar made from the logits, a mean over the batch; got {shape}")
    return loss


def _why_refused(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Any, problem: Exception) -> str:
    with contextlib.suppress(Exception):
        loss_fn(logits.clone(), y)  # which may be changed in place, as a leaf of a graph may not
        return "the loss changes the logits in place: write logits / 2, for example, in place of logits /= 2"
    given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
    if isinstance(y, Tensor) and y.numel() and not (y.is_floating_point() or y.is_complex()) and has_data(y):
        given += f" from {y.min()} to {y.max()}"
    N, *more = logits.shape
    classes, *positions = more or [1]
    usual = f"labels are int64 {(N, *positions)} from 0 to {classes - 1}"
    return (
        f"the loss does not take logits {tuple(logits.shape)} and y {given} ({usual}); no weight was changed: "
        f"{' '.join(str(problem).split())}"
    )
