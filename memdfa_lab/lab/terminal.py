"""What a training loop has to do with a terminal: Ctrl-C, and a bar that tells how far it is."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ctrl_c_noted() -> Iterator[list[int]]:
    """Note the first Ctrl-C in the list, so that the running step ends and is saved; a second one acts at once."""
    asked: list[int] = []  # no threading.Event: its lock stops for ever if a second signal comes while it is set
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
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


def progress_bar(total: int | None, wanted: bool) -> Any:
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    seen = sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)  # in a log file, a bar is noise
    shown = wanted and seen and not os.environ.get("TQDM_DISABLE")  # tqdm.notebook ignores it
    return tqdm(total=total, disable=not shown, unit="batch", leave=False)
