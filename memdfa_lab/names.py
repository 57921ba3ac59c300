"""Look a name up, and say what there is when it is wrong."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def known(what: str, name: object, table: Mapping[str, T]) -> T:
    """Return table[name]. Raises ValueError, one line with the nearest name and all there are, if it is not there."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name).lower(), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (there are: {', '.join(table)})")
