"""A signal that ends the process does so only when callers have had time to go elsewhere."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class SignalDrain:
    """Stands before the handlers of ``numbers``: the first signal is held back until the drain is over, a second one
    passes at once.

    ``begin(then)`` starts the drain and calls ``then`` at its end, from any thread; False if there is nothing to drain.
    What a signal does by default, ending the process on the spot, becomes SystemExit(128 + number) in the main thread,
    so that ``with`` and ``finally`` do their work.
    """

    def __init__(self, numbers: tuple[int, ...], begin: Callable[[Callable[[], object]], bool]) -> None:
        self._numbers = numbers
        self._begin = begin
        self._before: dict[int, Handler] = {}
        self._draining: set[int] = set()

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
        elif before == signal.SIG_DFL:
            raise SystemExit(128 + number)
