"""A signal that ends the process does so only when callers have had time to go elsewhere."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

Handler = Callable[[int, FrameType | None], Any] | int | None

_IMPORT: Final = "<frozen importlib"
"""How the file names of the import machinery begin. The body of a module that is imported has a name of its own."""

_PAUSE: Final = 0.01
"""Seconds until the import machinery is looked at again: it does little at a time."""

_MOST_PAUSES: Final = 100
"""After a second it is not at work but waits, for the import of another thread, which may wait as long as it likes."""


class SignalDrain:
    """Stands before the handlers of ``numbers``: the first signal is held back until the drain is over, a second one
    passes at once.

    ``begin(then)`` starts the drain and calls ``then`` at its end, from any thread; False if there is nothing to drain.
    What a signal does by default, ending the process on the spot, becomes SystemExit(128 + number) in the main thread,
    so that ``with`` and ``finally`` do their work. It comes a moment later if it would come in the midst of the import
    machinery, which drops what is raised while it forgets a lock: the process would go on as if nothing had been.
    """

    def __init__(self, numbers: tuple[int, ...], begin: Callable[[Callable[[], object]], bool]) -> None:
        self._numbers = numbers
        self._begin = begin
        self._before: dict[int, Handler] = {}
        self._draining: set[int] = set()
        self._pauses = 0

    def install(self) -> None:
        """In the main thread; elsewhere Python lets nobody handle signals, and nothing is installed."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._numbers:
            before = signal.getsignal(number)
            if before is not None:  # a handler that is not Python's own cannot be called from here
                self._before[number] = before
                signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put the former handlers back, where they have not been replaced since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in self._draining:
            self._draining.add(number)
            if self._begin(lambda: os.kill(os.getpid(), number)):
                return
        before = self._before.get(number, signal.SIG_DFL)
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL and not self._postponed(number, frame):
            raise SystemExit(128 + number)

    def _postponed(self, number: int, frame: FrameType | None) -> bool:
        if frame is None or self._pauses >= _MOST_PAUSES or not frame.f_code.co_filename.startswith(_IMPORT):
            return False
        self._pauses += 1
        try:
            # Not a threading.Thread, whose start takes locks that the interrupted code may hold.
            _thread.start_new_thread(_send_again, (number,))
        except RuntimeError:  # no thread left
            return False
        return True


def _send_again(number: int) -> None:
    time.sleep(_PAUSE)
    os.kill(os.getpid(), number)
