"""A thread of an explorer's own: it takes steps until it is told to stop, and leaves nothing behind.

While a cell runs or something is drawn, it waits: torch's global generator, matplotlib's settings and what a ledger
counts belong to whoever runs in the foreground.
"""

import asyncio
import atexit
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BUSY = threading.RLock()  # held by the foreground while it works, and by a thread for one step at a time
STOPPED_WITHIN_S = 30.0
_running: dict[str, "Background"] = {}


class Background:
    """One thread: from `start` on it calls `step()` again and again, until `stop`, or until that returns None.

    What `step` returns are the seconds to rest before the next.

    There is one of a `name` at a time: a cell that is run again stops what it has started before. `ended(problem)` is
    called in the thread at its end, with what `step` raised, or None.
    """

    def __init__(self, name: str, step: Callable[[], float | None], ended: Callable[[Exception | None], object]):
        self.name, self.step, self.ended = name, step, ended
        self.asked_to_stop = threading.Event()
        self.running = False
        self._thread: threading.Thread | None = None
        stop(name)

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self.running and not self.asked_to_stop.is_set():
            return
        stop(self.name)
        _stop_when_interrupted()
        self.asked_to_stop.clear()
        self.running = True
        self._thread = threading.Thread(target=self._run, name=f"memdfa {self.name}", daemon=True)
        _running[self.name] = self
        self._thread.start()

    def stop(self) -> None:
        """Let it finish its step, and wait for that."""
        self.asked_to_stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STOPPED_WITHIN_S)
        if _running.get(self.name) is self:
            del _running[self.name]

    def _run(self) -> None:
        problem = None
        try:
            while not self.asked_to_stop.is_set():
                if not BUSY.acquire(timeout=0.05):  # not for ever: whoever holds it may be waiting for our end
                    continue
                try:
                    rest = self.step()
                finally:
                    BUSY.release()
                if rest is None:
                    break
                self.asked_to_stop.wait(max(rest, 0.002))  # 0 would take the lock again before another has noticed
        except Exception as raised:
            problem = raised
        self.running = False
        self.ended(problem)


def stop(name: str | None = None) -> None:
    """Stop the thread of that name, or all."""
    for background in list(_running.values()):
        if name in (None, background.name):
            background.stop()


def _stop_when_interrupted() -> None:
    """Stop all threads on Ctrl-C and when a kernel is interrupted; hold them up while a cell runs."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        return
    shell = _shell()
    if shell is not None and not getattr(shell, "_memdfa_waits", False):
        shell._memdfa_waits = True
        shell.events.register("pre_run_cell", lambda info: BUSY.acquire())
        shell.events.register("post_run_cell", _cell_ended)
    try:  # a kernel ignores SIGINT between cells, and puts back what it found once it has handled a click: so not now
        asyncio.get_running_loop().call_later(0.05, _listen)
    except RuntimeError:
        _listen()


def _listen() -> None:
    before = signal.getsignal(signal.SIGINT)
    if getattr(before, "memdfa", False):
        return

    def interrupted(number: int, frame: Any) -> None:
        for background in list(_running.values()):
            background.asked_to_stop.set()
        if callable(before):
            before(number, frame)

    interrupted.memdfa = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, interrupted)


def _cell_ended(result: Any) -> None:
    if isinstance(result.error_in_exec, KeyboardInterrupt):
        for background in list(_running.values()):
            background.asked_to_stop.set()
    with suppress(RuntimeError):  # the cell that registered this had not acquired it
        BUSY.release()


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


atexit.register(stop)
