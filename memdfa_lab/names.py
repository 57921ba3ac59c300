"""Check what is given, a name or a number, and say in one line what was expected."""

import difflib
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeVar

T = TypeVar("T")


def known(what: str, name: object, table: Mapping[str, T]) -> T:
    """Return table[name]. Raises ValueError, one line with the nearest name and all there are, if it is not there."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name).lower(), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (there are: {', '.join(table)})")


def whole(what: str, value: object, least: int = 1) -> int:
    """Return the value as an int. Raises ValueError, one line, if it is not a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{what} must be a whole number from {least} on, got {value!r}")
    return int(value)


def number(what: str, value: object, least: float = 0, or_more: bool = True) -> None:
    """Raise ValueError, one line, if the value is not a finite number from `least` on, or above it."""
    given = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(given) or given < least or (given == least and not or_more):
        kind = f"from {least} on" if or_more else f"above {least}"
        raise ValueError(f"{what} must be a finite number {kind}, got {value!r}")
