"""Check what is given, a name, a number or an object, and say in one line what was expected."""

import difflib
import math
from collections.abc import Mapping
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")


def known(what: str, name: object, table: Mapping[str, T]) -> T:
    """Return table[name]. Raises ValueError, one line with the nearest name and all there are, if it is not there."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name).lower(), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (there are: {', '.join(table)})")


def whole(what: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return the value as an int. Raises ValueError, one line, if it is no whole number from `least` on, to `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least or (most and int(value) > most):
        upper = f"to {most:,}" if most else "on"
        raise ValueError(f"{what} must be a whole number from {least} {upper}, got {value!r}")
    return int(value)


def number(what: str, value: object, least: float = 0, or_more: bool = True) -> None:
    """Raise ValueError, one line, if the value is not a finite number from `least` on, or above it."""
    given = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(given) or given < least or (given == least and not or_more):
        kind = f"from {least} on" if or_more else f"above {least}"
        raise ValueError(f"{what} must be a finite number {kind}, got {value!r}")


def of_kind(what: str, value: object, kind: Any, wanted: str) -> None:
    """Raise TypeError, one line that says what is wanted, if the value is not an instance of the kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {wanted}, not a {type(value).__name__}")


def difference(one: object, other: object) -> tuple[str, str]:
    """Return the first lines in which two texts differ."""
    lines = zip_longest(str(one).splitlines(), str(other).splitlines(), fillvalue="nothing")
    return next((pair for pair in lines if pair[0] != pair[1]), (str(one), str(other)))
