"""Times in which this process, or one of its event loops, stood still: what timed out then is no endpoint's fault.

A process that is stopped (SIGSTOP, a suspended machine, a long garbage collection, no CPU for it), or an event loop
whose program blocks it, comes back to find that every deadline has passed, while the answers lie unread in its sockets.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from meshlb.control import weakly

logger = logging.getLogger("meshlb.stall")

INTERVAL: Final = 0.25
"""Seconds between two beats: microseconds each, so nothing to a process, and short beside any sensible timeout."""

TOLERANCE: Final = 0.5
"""Seconds that a beat may be late. A crowded machine's scheduler and a garbage collection may take a few tenths."""

_SHARE: Final = 0.5
"""An attempt is excused if this share of its time, or more, was not ours to use: then the endpoint had less time to
answer than we were away. An endpoint that hung for longer than that is still to blame."""

_NOTABLE: Final = 1.0
"""Seconds of a stall that an operator should hear of."""

_REMEMBERED: Final = 16
"""Stalls. Only those during attempts that are under way matter."""


class Pulse:
    """Records when something that should have happened did not. Pure; readable from any thread."""

    __slots__ = ("_stalls", "_tolerance", "due")

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        self._tolerance = tolerance
        self._stalls: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self.due: float | None = None
        """When the next beat should come; None if none is expected."""

    def beat(self, now: float, next_due: float | None, busy: float = 0.0) -> float:
        """The beat has come; the next one is due then. ``busy``: seconds since the last one in which whoever beats was
        at work, and so did not stand still. Returns the seconds of the stall that it ends, 0 if none."""
        due, self.due = self.due, next_due
        if due is None or now - due - busy <= self._tolerance:
            return 0.0
        self._stalls.append((due, now))
        return now - due

    def stalled(self, started: float, now: float) -> float:
        """How many seconds between ``started`` and ``now`` fell into stalls, the current one included: the beat that
        will tell of it may come after those who ask."""
        total = 0.0
        for begin, end in tuple(self._stalls):
            total += max(0.0, min(end, now) - max(begin, started))
        due = self.due
        if due is not None and now - due > self._tolerance:
            total += max(0.0, now - max(due, started))
        return total


class Background(Protocol):
    """What a StallMonitor needs of the control loop."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> object: ...


class StallMonitor:
    """The pulses of one mesh: that of its control loop, and of every event loop that its calls are made on.

    ``start`` begins the beat. An event loop is watched from ``watch_running_loop`` until it is closed: the control loop
    sends it a callback at each beat, and sees how long that takes to be run.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._background: Background | None = None
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._own = Pulse()
        self._worked = 0.0
        self._loops: WeakKeyDictionary[Any, Pulse] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def start(self, background: Background) -> None:
        """Begin to beat. ``background`` ends, and the beat with it."""
        self._background = background
        self._own.due = None
        self._worked = 0.0
        background.call_later(0.0, weakly(StallMonitor._begin, self))

    def _begin(self) -> None:
        self._worked = time.thread_time()
        self._beat()

    def stop(self) -> None:
        """Beat no more."""
        self._background = None
        self._own.due = None

    def after_fork_in_child(self) -> None:
        """Forget the parent's loops; ``start`` begins anew."""
        self._background = None
        self._start_afresh()

    def watch_running_loop(self) -> None:
        """Watch the asyncio or trio loop that the caller runs on, if any."""
        loop = _running_loop()
        if loop is not None and loop not in self._loops and self._background is not None:
            with self._lock:
                self._loops[loop] = Pulse()

    def excuses(self, started: float, now: float) -> bool:
        """Whether an attempt from ``started`` to ``now``, whose end the caller has just seen, says less about its
        endpoint than about us."""
        enough = (now - started) * _SHARE
        if self._own.stalled(started, now) >= enough > 0:
            return True
        loop = _running_loop() if self._loops else None
        pulse = None if loop is None else self._loops.get(loop)
        return pulse is not None and pulse.stalled(started, now) >= enough > 0

    def _beat(self) -> None:
        background = self._background
        if background is None:
            return
        now, worked = self._clock(), time.thread_time()  # of the control loop, which may have had much to do
        if stalled := self._own.beat(now, now + INTERVAL, worked - self._worked):
            _report("this process stood still", stalled)
        self._worked = worked
        if self._loops:
            with self._lock:
                loops = tuple(self._loops.items())
            for loop, pulse in loops:
                if not _is_running(loop):
                    pulse.due = None  # between two runs it owes no sign of life
                elif pulse.due is None:
                    self._send(loop, pulse, now)
        background.call_later(INTERVAL, weakly(StallMonitor._beat, self))

    def _send(self, loop: Any, pulse: Pulse, now: float) -> None:
        pulse.due = now
        arrived = _Arrival(pulse, self._clock)
        try:
            if hasattr(loop, "call_soon_threadsafe"):
                loop.call_soon_threadsafe(arrived)
            else:
                loop.run_sync_soon(arrived)
        except RuntimeError:  # the loop is closed (trio's RunFinishedError is one too)
            with self._lock:
                self._loops.pop(loop, None)


class _Arrival:
    """What a watched loop runs."""

    __slots__ = ("_clock", "_pulse")

    def __init__(self, pulse: Pulse, clock: Callable[[], float]) -> None:
        self._pulse = pulse
        self._clock = clock

    def __call__(self) -> None:
        if stalled := self._pulse.beat(self._clock(), None):
            _report("an event loop was blocked", stalled)


def _report(what: str, stalled: float) -> None:
    level = logging.WARNING if stalled >= _NOTABLE else logging.DEBUG
    logger.log(level, "%s for %.1f s; what timed out meanwhile is not held against endpoints", what, stalled)


def _is_running(loop: Any) -> bool:
    """Whether an asyncio loop runs. A trio token is for one run, and refuses callbacks after it."""
    is_running: Callable[[], bool] | None = getattr(loop, "is_running", None)
    return is_running is None or is_running() or loop.is_closed()


def _running_loop() -> Any:
    """The asyncio loop or the trio token of the loop that the caller runs on; None outside of one."""
    if "trio" in sys.modules:
        import trio

        try:
            return trio.lowlevel.current_trio_token()
        except RuntimeError:
            pass  # not under trio
    if "asyncio" in sys.modules:
        import asyncio

        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            pass  # not under asyncio
    return None
