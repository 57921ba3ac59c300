"""A training loop's use of a terminal: Ctrl-C, and a progress bar."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

from memdfa_lab.core.phases import listeners


@contextmanager
def ctrl_c_noted() -> Iterator[list[int]]:
    """Record the first Ctrl-C in the list, so that the running step ends and is saved; a second one acts at once."""
    asked: list[int] = []  # no threading.Event: a second signal while it is set would block for ever
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class LoadingInterrupted(KeyboardInterrupt):
    """Ctrl-C also ended the processes that load batches, before a batch was complete."""


@contextmanager
def loading(asked: Sized) -> Iterator[None]:
    """Raise LoadingInterrupted for any error within if Ctrl-C has been noted in `asked`."""
    try:
        yield
    except Exception as problem:
        if asked:
            raise LoadingInterrupted from problem
        raise


class BlockShown:
    """A context in which a bar shows the present block, at most twice a second: a step may take minutes."""

    def __init__(self, bar: Any, blocks: int):
        self.bar, self.blocks, self.shown_at = bar, blocks, time.monotonic()

    def __enter__(self) -> None:
        if not self.bar.disable:
            listeners.append(self)

    def __exit__(self, *problem: object) -> None:
        if self in listeners:
            listeners.remove(self)

    def enter(self, name: str, block: int | None) -> None:
        if block is not None and time.monotonic() - self.shown_at > 0.5:
            self.shown_at = time.monotonic()
            self.bar.set_postfix_str(f"{name}, block {block + 1} of {self.blocks}")

    def leave(self) -> None:
        """A phase ended."""

    def label(self, category: str, tensor: object) -> None:
        """A tensor was made."""


def progress_bar(total: int | None, wanted: bool) -> Any:
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    seen = sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)  # in a log file, a bar is noise
    shown = wanted and seen and not os.environ.get("TQDM_DISABLE")  # tqdm.notebook ignores it
    return tqdm(total=total, disable=not shown, unit="batch", leave=False)
