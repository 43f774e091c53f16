"""The rules of a watch on Consul, apart from any I/O: index, time-outs, back-off, refresh rate, empty answers.

Sources: Consul's documentation of blocking queries and its own implementation of them (``api/watch/plan.go``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

CONNECT_TIMEOUT: Final = 5.0
"""Seconds. An agent is on this host or nearby: one that cannot be connected to in this time is gone."""

READ_MARGIN: Final = 10.0
"""Seconds on top of what a query may take by itself: without a leader Consul alone takes 7 s to say so."""

POLL_INTERVAL: Final = 5.0
"""Seconds between queries of a registry that sends no X-Consul-Index, so that it cannot be asked to wait."""

BACKOFF_FIRST: Final = 1.0
BACKOFF_CAP: Final = 30.0
"""Seconds. Consul's own client goes up to 180 s, which is too long for callers that wait for a registry to return."""

BACKOFF_FLOOR: Final = 0.1
"""Seconds. Full jitter may come out as 0, and a refused connection is refused at once: that would be a hot loop."""

FIRST_QUERIES_AT_ONCE: Final = 16
FIRST_QUERIES_PER_SECOND: Final = 100.0
"""A process that starts watching hundreds of services spreads its first queries; one with a few does not wait."""


def next_index(previous: int, received: int | None, *, early: bool = False) -> int:
    """The index to ask with next; 0 means a query that does not block.

    Going backwards (a restored snapshot, another server under ``stale``) resets to 0. An equal index is a time-out and
    stays, unless the answer came ``early``. Below 1 is treated as 1: Consul would answer an index of 0 at once, again
    and again. Only for an answer with status 200: errors carry an index too (1), which must not be kept.
    """
    if received is None or received < previous or (early and 0 < received == previous):
        return 0
    return max(received, 1)


def is_early(elapsed: float, wait: float) -> bool:
    """Whether an answer with an equal index came too soon to be a time-out.

    A server that restores a snapshot ends its blocking queries with what it knew before. The index of the restored
    state is lower, so that a query with the old one would wait for its whole time and miss every change in it.
    """
    return elapsed < wait / 2


def parse_index(header: str | None) -> int | None:
    """The value of X-Consul-Index, or None if it is missing or no number."""
    return int(header) if header is not None and header.isascii() and header.isdigit() else None


def read_timeout(wait: float) -> float:
    """Seconds to wait for an answer to a query that may block for ``wait``: Consul adds up to a 16th as jitter."""
    return wait * 17 / 16 + READ_MARGIN


def first_delay(recent: int, random: Callable[[], float]) -> float:
    """Seconds before a watch's first query, when ``recent`` other watches were started within the last second."""
    return random() * max(0, recent - FIRST_QUERIES_AT_ONCE + 1) / FIRST_QUERIES_PER_SECOND


class Backoff:
    """Exponential back-off with full jitter: from 1 s to 30 s, spread so that clients do not return all at once.

    An answer 429 counts twice: there the registry itself says that it is asked too much.
    """

    __slots__ = ("_random", "failures")

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.failures = 0

    def next(self, *, throttled: bool = False) -> float:
        """Count a failure and return the pause after it, in seconds."""
        self.failures += 2 if throttled else 1
        # 2 ** 10 is beyond the cap already; without the limit a long outage would compute ever larger powers.
        ceiling = min(BACKOFF_CAP, BACKOFF_FIRST * 2.0 ** min(self.failures - 1, 10))
        return max(BACKOFF_FLOOR, self._random() * ceiling)

    def reset(self) -> None:
        self.failures = 0


class RefreshLimiter:
    """A token bucket over refreshes: a few changes in a row pass at once, endless ones once per interval."""

    __slots__ = ("_interval", "_tokens", "_updated")

    BURST: Final = 5.0
    """Changes that pass undelayed: a rolling deployment shows each of its steps at once."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._tokens = self.BURST
        self._updated = float("-inf")

    def delay(self, now: float) -> float:
        """Take one token; the seconds to wait until it is there."""
        if self._interval <= 0:
            return 0.0
        if self._updated > float("-inf"):
            self._tokens = min(self.BURST, self._tokens + (now - self._updated) / self._interval)
        self._updated = now
        self._tokens -= 1
        return max(0.0, -self._tokens * self._interval)


class EmptyGuard:
    """Decides when an empty answer is believed.

    At once if nothing was known before. After instances were known, only when it still holds ``grace`` seconds later:
    a registry that lost its data answers just like one whose last instance was de-registered.
    """

    __slots__ = ("_grace", "_since")

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._since: float | None = None

    def accepts(self, *, empty: bool, known: bool, now: float) -> bool:
        """Whether an answer may replace what is known."""
        if not empty or not known:
            self._since = None
            return True
        if self._since is None:
            self._since = now
        if now - self._since < self._grace:
            return False
        self._since = None
        return True

    def remaining(self, now: float) -> float | None:
        """Seconds until the held-back empty answer should be confirmed; None if none is held back."""
        return None if self._since is None else max(0.0, self._since + self._grace - now)
