"""Files that are whole or not there, and locks that keep two runs out of one folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from memdfa_lab.memory.files import folder_made_for
from memdfa_lab.memory.files import write_text as write_text
from memdfa_lab.memory.files import write_whole as write_whole


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing this file within; it need not exist. Raises ValueError if one does so now.

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
