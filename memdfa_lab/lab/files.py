"""Files, also of tensors, that are either complete or absent, and locks that keep two runs out of one folder."""

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

FORMAT = 3  # the version of saved files


def read_csv(file: Any, **how: Any) -> pd.DataFrame:
    """Return a table with its numbers as they were written, in any release of pandas; `how`: as for pandas' own."""
    # round_trip is the default from pandas 3 on, where passing it gives a warning.
    exact: dict[str, Any] = {"float_precision": "round_trip"} if pd.__version__.startswith("2.") else {}
    table: pd.DataFrame = pd.read_csv(file, **exact, **how)
    return table


def write_saved(path: str | Path, state: dict[str, Any]) -> None:
    """Write a dictionary, completely or not at all, for `read_saved`."""
    # When read, numpy's numbers, such as a learning rate from a logspace, would be refused.
    state = tree_map_only(np.generic, np.generic.item, state, lambda part: isinstance(part, OrderedDict))

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch hides why it failed, as on a full disk
            torch.save({"format": FORMAT, **state}, file)

    write_whole(path, save)


def read_saved(path: Path, instead: str) -> dict[str, Any]:
    """Return what `write_saved` has written, with tensors on the CPU; no code in the file is run.

    Raises ValueError if it is damaged or of another version; `instead` says in the message what to do.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not check them
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state.pop("format")
    except Exception as problem:  # damage shows as any kind of exception
        raise ValueError(f"{path} is damaged or not a file of memdfa_lab: {instead}") from problem
    if version != FORMAT:
        raise ValueError(
            f"{path} was written by another version of memdfa_lab (format {version}, this one has {FORMAT}): finish "
            f"the run with that version, or {instead}"
        )
    return state


def file_name(text: str) -> str:
    """Return a text as a file name, with _ for each character that Windows does not allow."""
    return re.sub(r'[<>:"/\\|?*]', "_", text)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing this file in the with-block. Raises ValueError if it is locked already.

    The file need not exist: the lock is on a hidden file beside it. The system releases the lock when the process ends,
    however that happens.
    """
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with folder_made_for(path):
        Path(lock.lock_file).touch()  # where that fails, FileLock would wait for ever
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing {path} now: wait until it ends, or choose another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()
