"""Virtual time: a clock that jumps from one event to the next."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, Final

START: Final = 1_000.0
"""Seconds. Not 0, which would hide mistakes with times that were never set."""


class Timeline:
    """A monotonic clock (seconds), called as one, and the events that it runs through. For one thread.

    Events of one time happen in the order in which they were set, so that a run is the same every time. It serves
    clusters as the control loop too (``Background``).
    """

    __slots__ = ("_deadlines", "_events", "_set", "now")

    def __init__(self) -> None:
        self.now = START
        self._set = 0
        self._events: list[tuple[float, int, Callable[[Any], object], Any]] = []
        self._deadlines: deque[tuple[float, Callable[[Any], object], Any]] = deque()

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, action: Callable[[Any], object], argument: Any) -> None:
        """Have ``action(argument)`` happen at a time, now at the earliest."""
        self._set += 1
        heapq.heappush(self._events, (when, self._set, action, argument))

    def deadline(self, when: float, action: Callable[[Any], object], argument: Any) -> None:
        """The same for times that never go back from one call to the next: most of them are never reached, and in a
        queue of their own they cost a tenth of what they would in the heap."""
        self._deadlines.append((when, action, argument))

    def run(self, until: float = inf) -> None:
        """Let everything happen that is due up to ``until``; the clock stands at the last event then."""
        events, deadlines = self._events, self._deadlines
        pop, pop_deadline = heapq.heappop, deadlines.popleft
        while True:
            when = events[0][0] if events else inf
            if deadlines and deadlines[0][0] < when:
                when = deadlines[0][0]
                if when > until:
                    return
                _, action, argument = pop_deadline()
            elif when <= until and events:
                _, _, action, argument = pop(events)
            else:
                return
            self.now = when
            action(argument)

    # -- Background --------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Call at this very time, after what is happening now."""
        self.at(self.now, _call, (callback, args))
        return True

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        """Call after ``delay`` seconds."""
        self.at(self.now + delay, _call, (callback, ()))


def _call(task: tuple[Callable[..., object], tuple[Any, ...]]) -> None:
    callback, args = task
    callback(*args)
