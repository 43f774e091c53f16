"""The log of endpoints that go and come back, kept short when many do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

_BURST: Final = 20
_PERIOD: Final = 10.0
"""Lines of a service in so many seconds: enough to see an endpoint flap, while an outage of thousands of endpoints does
not fill a disk. What is left out is counted, and stands in the snapshot anyway."""


class ChangeLog:
    """Writes to a logger, at most 20 lines in 10 seconds."""

    __slots__ = ("_clock", "_lines", "_lock", "_logger", "_omitted", "_since")

    def __init__(self, logger: logging.Logger, clock: Callable[[], float]) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._lines = 0
        self._omitted = 0

    def write(self, level: int, subject: object, message: str, *args: object) -> None:
        """Log "subject: message", or only count it."""
        now = self._clock()
        omitted = 0
        with self._lock:
            if now - self._since >= _PERIOD:
                omitted = self._omitted
                self._since, self._lines, self._omitted = now, 0, 0
            if self._lines >= _BURST:
                self._omitted += 1
                return
            self._lines += 1
        if omitted:
            self._logger.warning("%s: %d changes before this one were not logged", subject, omitted)
        self._logger.log(level, f"%s: {message}", subject, *args)
