"""Files that are either complete or absent: each is written under a temporary name and then renamed."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary file), and give the file its name if that succeeds.

    Raises ValueError if nothing can be written in the folder, and what `write` raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # only the owner can read tempfile's
    try:
        with folder_made_for(path):
            temporary.touch(exist_ok=False)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if isinstance(problem.__context__, KeyboardInterrupt):  # for example, closing failed while it left torch.save
            raise problem.__context__ from problem
        if isinstance(problem, OSError) and problem.filename is None:
            problem.filename = str(path)  # a full disk does not say which file it was for
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


@contextmanager
def folder_made_for(path: Path) -> Iterator[None]:
    """Make the folder of a file that is opened within. Raises ValueError if it cannot be made or written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        reason = problem.strerror or problem
        raise ValueError(f"cannot write into {path.parent} ({reason}): choose another folder") from problem
