"""Files that are whole or not there: each is written under a temporary name and then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to be written in binary; it gets its name when the block ends, and never if that fails.

    Raises ValueError if nothing can be written in its folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # tempfile's are readable by their owner alone
    with _folder_of(path):
        opened = temporary.open("xb")
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.filename is None:
            problem.filename = str(path)  # a full disk does not say which file it was for
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    with written_whole(path) as file:
        file.write(text.encode())


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing this file within; it need not be there. Raises ValueError if one does so now.

    The lock is on a hidden file beside it, and the system lets go of it when its process ends, however that comes.
    """
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with _folder_of(path):
        Path(lock.lock_file).touch()  # where that fails, the lock would only be waited for
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing {path} now: wait for its end, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Make the folder of a file that is opened within."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        reason = problem.strerror or problem
        raise ValueError(f"cannot write into {path.parent} ({reason}): choose another folder") from problem
