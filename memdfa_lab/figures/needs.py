"""What a figure needs of what it draws, said beside it and checked before anything is drawn."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from memdfa_lab.core.checks import check_type, lookup
from memdfa_lab.figures.style import STYLES

P = ParamSpec("P")
T = TypeVar("T")
# columns of names, or of what only groups rows: all others are of numbers
NAMES = {
    "rule", "network", "batch_size", "experiment", "run", "seed", "distribution", "draw", "feedback", "layer", "phase",
    "category", "task",
}  # fmt: skip


def needs(
    *columns: str, each: bool = False, one_of: Iterable[str] = (), rules: Mapping[str, Any] = STYLES
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a figure raise what `check_table` does if its first argument is no table with these columns.

    "{x}" is the column that the argument x names. `each`: the first argument has such a table for each label.
    """

    def checked(draw: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(draw)
        first = next(iter(signature.parameters))

        @wraps(draw)
        def drawn(*args: P.args, **options: P.kwargs) -> T:
            given = signature.bind(*args, **options)
            given.apply_defaults()
            named = [name.format_map(given.arguments) for name in columns]
            tables = {first: given.arguments[first]}
            if each:
                tables = {f"{first}[{label!r}]": table for label, table in labelled(first, tables[first]).items()}
            for what, table in tables.items():
                check_table(what, table, named, one_of, rules)
            return draw(*args, **options)

        return drawn

    return checked


def check_table(
    what: str, table: Any, columns: list[str], one_of: Iterable[str] = (), rules: Mapping[str, Any] = STYLES
) -> None:
    """Raise TypeError or ValueError, one line, if this is no table with a row, these columns and any in `one_of`.

    Nor may there be text in place of numbers, or a rule that is none of `rules`, if there are any.
    """
    wanted = ", ".join(columns) + " and one or more of " * bool(one_of) + ", ".join(one_of)
    check_type(what, table, pd.DataFrame, f"a pandas table with the columns {wanted}")
    lacking, chosen = [name for name in columns if name not in table], [name for name in one_of if name in table]
    if lacking or (one_of and not chosen):
        there = ", ".join(map(str, table)) or "none"
        raise ValueError(f"{what} lacks {', '.join(lacking) or 'columns'}: it needs {wanted} (there are: {there})")
    if not len(table):
        raise ValueError(f"{what} has no row, so there is nothing to draw: it needs one or more")
    for rule in table["rule"].unique() if "rule" in columns and rules else ():
        lookup("rule", rule, rules)
    for name in [*columns, *chosen]:
        if name not in NAMES and not is_numeric_dtype(table[name]):
            for text in (value for value in table[name] if isinstance(value, str)):
                raise ValueError(f"column {name} of {what} must be of numbers, and has {text!r}")


def labelled(what: str, things: Any) -> Mapping[str, Any]:
    """Return the mapping. Raises TypeError if it is none, ValueError if it is empty."""
    check_type(what, things, Mapping, "a dict, label -> what is drawn")
    if not things:
        raise ValueError(f"{what} is empty, so there is nothing to draw: it needs one label or more")
    return things


def check_numbers(what: str, values: Any, *sizes: str) -> np.ndarray:
    """Return the array with these sizes. Raises ValueError if it is none of numbers, or empty."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim != len(sizes) or not array.size:
        given = f"a {type(values).__name__} of shape {array.shape}"
        raise ValueError(f"{what} must be an array ({', '.join(sizes)}) of one number or more, got {given}")
    return array
