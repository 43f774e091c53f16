"""Daemon threads for the attempts of hedged blocking calls, used again while they are fresh.

``concurrent.futures`` joins its threads when the interpreter exits; an attempt that hangs must not hold that up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from meshlb import control

_IDLE: Final = 1.0
"""Seconds for which a thread waits for more work. Starting one takes 50 us: worth sparing a busy program only."""

Work = Callable[[], object]


class Workers:
    """Runs functions on threads of their own, at once, however many there are."""

    def __init__(self) -> None:
        self._start_afresh()
        control.on_fork(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[Work]] = []

    def run(self, work: Work) -> None:
        """Run ``work``, which must not raise."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            threading.Thread(target=self._work, args=(work,), name="meshlb-hedge", daemon=True).start()
        else:
            inbox.put(work)

    def _work(self, work: Work | None) -> None:
        inbox: SimpleQueue[Work] = SimpleQueue()
        while work is not None:
            work()
            work = None  # what it holds must not outlive it here
            with self._lock:
                self._idle.append(inbox)
            with contextlib.suppress(Empty):
                work = inbox.get(timeout=_IDLE)
            if work is None:
                with self._lock:
                    if inbox in self._idle:
                        self._idle.remove(inbox)
                        return
                work = inbox.get()  # it was given just now

    def after_fork_in_child(self) -> None:
        """The parent's threads do not exist here."""
        self._start_afresh()


workers: Final = Workers()
