"""Which endpoint is checked when: checks of many endpoints are spread in time, and never begin faster than agreed."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from random import Random

    from meshlb.health.options import HealthCheck

KeyT = TypeVar("KeyT", bound=Hashable)

_FIRST_SHARE: Final = 0.25
"""Of ``max_rate``, at which new keys are checked first: three endpoints are known after an eighth of a second, and from
``interval * max_rate / 4`` of them on, they are spread over a whole interval."""

_SLACK: Final = 0.05
"""Seconds of the agreed rate that may be made up for at once: an event loop keeps no time to the millisecond. So in any
window of s seconds at most ``(s + 0.05) * max_rate + 1`` checks begin."""


class Schedule(Generic[KeyT]):
    """When each key is due. Pure: times are passed in, seconds of any monotonic clock.

    New keys get a random phase within one interval, or less if they are few, so that the checks of a whole service are
    spread from the beginning; jitter keeps them so.
    """

    __slots__ = ("_due", "_heap", "_numbers", "_options", "_paced", "_random")

    def __init__(self, options: HealthCheck, random: Random) -> None:
        self._options = options
        self._random = random
        self._numbers = itertools.count()
        self._due: dict[KeyT, int] = {}
        """The number of each key's valid entry in the heap; others are left over."""
        self._heap: list[tuple[float, int, KeyT]] = []
        self._paced = float("-inf")
        """When the next check may begin, at the agreed rate."""

    def __len__(self) -> int:
        return len(self._due)

    def add(self, keys: Collection[KeyT], now: float) -> None:
        """Have new keys checked soon, but not at once."""
        window = min(self._options.interval, len(keys) / (_FIRST_SHARE * self._options.max_rate))
        for key in keys:
            self._push(key, now + self._random.random() * window)

    def again(self, key: KeyT, started: float, now: float, *, in_doubt: bool, idle: bool) -> None:
        """Have a key checked again that was checked from ``started`` to ``now``.

        ``in_doubt``: its endpoint may be bad, or is; ``idle``: nobody calls the service.
        """
        options = self._options
        pause = options.unhealthy_interval if in_doubt else options.interval
        if idle and options.no_traffic_interval is not None:
            pause = max(pause, options.no_traffic_interval)
        pause *= 1.0 + options.jitter * (2.0 * self._random.random() - 1.0)
        self._push(key, max(now, started + pause))

    def hurry(self, now: float) -> None:
        """Bring forward what an idle time has put off: everybody is due within one interval, spread over it."""
        waiting = [(due, key) for due, number, key in self._heap if self._due.get(key) == number]
        self._heap = []
        for due, key in waiting:
            self._push(key, min(due, now + self._random.random() * self._options.interval))

    def discard(self, key: KeyT) -> None:
        """Forget a key."""
        self._due.pop(key, None)

    def take(self, now: float) -> KeyT | None:
        """The key to check now, which is then out of the schedule; None if there is none, or it would be too fast."""
        self._drop_stale()
        if not self._heap or self._heap[0][0] > now or self._paced > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._paced = max(self._paced, now - _SLACK) + 1.0 / self._options.max_rate
        return key

    def wait(self, now: float) -> float | None:
        """Seconds until ``take`` may have something; None if nothing is scheduled."""
        self._drop_stale()
        return max(0.0, self._heap[0][0] - now, self._paced - now) if self._heap else None

    def _push(self, key: KeyT, due: float) -> None:
        number = self._due[key] = next(self._numbers)
        heapq.heappush(self._heap, (due, number, key))

    def _drop_stale(self) -> None:
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
