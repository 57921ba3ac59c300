"""Files that are either complete or absent, also of tensors, and locks that keep two runs out of one folder."""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from memdfa_lab.core.compat import tree_map_only
from memdfa_lab.memory.files import folder_made_for
from memdfa_lab.memory.files import write_text as write_text
from memdfa_lab.memory.files import write_whole as write_whole

FORMAT = 3  # of what is saved


def read_csv(file: Any, **how: Any) -> pd.DataFrame:
    """Return a table with its numbers as they were written, in any release of pandas; `how`: as for pandas' own."""
    # It is the default from pandas 3 on, where passing the argument gives a warning.
    exact: dict[str, Any] = {"float_precision": "round_trip"} if pd.__version__.startswith("2.") else {}
    table: pd.DataFrame = pd.read_csv(file, **exact, **how)
    return table


def write_saved(path: str | Path, state: dict[str, Any]) -> None:
    """Write a dictionary that `read_saved` can read, whole."""
    # numpy's numbers, such as a learning rate from a logspace, would be refused when they are read.
    state = tree_map_only(np.generic, np.generic.item, state, lambda part: isinstance(part, OrderedDict))

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch hides the reason of a failure, such as a full disk
            torch.save({"format": FORMAT, **state}, file)

    write_whole(path, save)


def read_saved(path: Path, instead: str) -> dict[str, Any]:
    """Return what `write_saved` has written, with tensors on the CPU; no code in the file is run.

    Raises ValueError if it is damaged or of another version, and says what to do `instead`.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not check them
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state.pop("format")
    except Exception as problem:  # damage shows as any kind of exception
        raise ValueError(f"{path} is damaged or not of memdfa_lab: {instead}") from problem
    if version != FORMAT:
        raise ValueError(
            f"{path} was written by another version of memdfa_lab (format {version}, this one has {FORMAT}): finish "
            f"the run with that version, or {instead}"
        )
    return state


def file_name(text: str) -> str:
    """Return a text as the name of a file, without what Windows has no names with."""
    return re.sub(r'[<>:"/\\|?*]', "_", text)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing this file within; it need not exist. Raises ValueError if it is locked.

    The lock is on a hidden file beside it. The system releases it when its process ends, however that happens.
    """
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with folder_made_for(path):
        Path(lock.lock_file).touch()  # where that fails, FileLock would wait for ever
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing {path} now: wait for its end, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()
