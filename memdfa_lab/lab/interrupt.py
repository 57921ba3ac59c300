"""Ctrl-C between two steps and not within one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


@contextmanager
def interrupt_after_step() -> Iterator[Interrupt]:
    """Note the first Ctrl-C, so that the running step ends and is saved; a second one acts at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield interrupt
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        interrupt.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
