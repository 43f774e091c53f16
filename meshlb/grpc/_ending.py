"""The end of a call that goes on by itself: threads wait for it, callbacks are told of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("meshlb.grpc")


class Ending:
    """``final`` is None until the call has ended, and then what the caller's object stands for: gRPC's own call object
    or an error of ours. ``changed`` guards it, and whatever else of the call a thread may wait for."""

    __slots__ = ("_callbacks", "_name", "changed", "final")

    def __init__(self, name: str) -> None:
        self._name = name
        self._callbacks: list[Callable[[], object]] = []
        self.changed = threading.Condition()
        self.final: Any = None

    def wait(self, timeout: float | None = None) -> Any:
        """What the call has ended with; None if it has not within ``timeout`` seconds."""
        if self.final is None:
            with self.changed:
                self.changed.wait_for(lambda: self.final is not None, timeout)
        return self.final

    def add_callback(self, callback: Callable[[], object]) -> bool:
        """Have ``callback`` called at the end of the call; False if it has ended."""
        with self.changed:
            if self.final is not None:
                return False
            self._callbacks.append(callback)
            return True

    def _end(self, final: Any, *, deliver: bool) -> None:
        """Note the end, with ``changed`` held. ``deliver``: the callbacks have to be run; otherwise somebody will."""
        self.final = final
        self.changed.notify_all()
        if deliver and self._callbacks:
            # On a thread of their own: a callback may block, which the control loop must not, and may take a lock
            # that the thread which brought about the end is holding.
            threading.Thread(target=self._run_callbacks, name="meshlb-grpc-callbacks", daemon=True).start()

    def _run_callbacks(self) -> None:
        with self.changed:
            if self.final is None:
                return
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("%s: a callback of the call failed", self._name)
