"""Hedging: a second attempt elsewhere while the first is still under way, against the slow tail.

Semantics of gRFC A6; the percentile is Finagle's ``BackupRequestFilter``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Final

from meshlb._validate import integer, number
from meshlb.errors import ConfigError

_DEFAULT_PERCENTILE: Final = 0.95
"""One call in twenty is sent twice at most: a quarter of what the default budget allows."""

_LEAST_DELAY: Final = 0.001
"""Seconds. Finagle's minimum: below, the first answer is about to arrive anyway."""

_WINDOW: Final = 30.0
"""Seconds that a latency counts, at least; twice that at most. Finagle's window."""

_LEAST_SAMPLES: Final = 20
"""Fewer say nothing of one call in twenty."""

_PER_DOUBLING: Final = 8
"""Buckets for each doubling of the latency: a bucket is 9 % wide."""

_RESOLUTION: Final = 1e-5
"""Seconds. All latencies below share the first bucket."""

_BUCKETS: Final = 200
"""The last one is for whatever exceeds 300 s."""

_REFRESH: Final = 32
"""Samples after which the quantile is computed anew."""


@dataclass(frozen=True, slots=True)
class Hedge:
    """When a call that has no answer yet is sent to another endpoint as well.

    Only for calls that may be sent twice (see ``Retry``); the answer that comes first is taken, the other attempt is
    cancelled. A hedge is paid for out of the retry budget.

    * ``delay``: seconds without an answer after which the next attempt is begun (0: all at once), or
    * ``percentile``: the share of the calls that are answered by then, as measured while the program runs (0.95 if
      neither is given). No hedges are made before 20 latencies have been seen.
    * ``max_attempts``: attempts under way side by side, at most (2: a third helps only if two endpoints are slow).

    Raises ConfigError naming the field.
    """

    delay: float | None = None
    percentile: float | None = None
    max_attempts: int = 2

    def __post_init__(self) -> None:
        if self.delay is not None:
            if self.percentile is not None:
                raise ConfigError(f"Hedge.percentile: {self.percentile!r}, but there is a delay too; give one of them")
            number("Hedge.delay", self.delay, least=0, most=3600)
        elif self.percentile is None:
            object.__setattr__(self, "percentile", _DEFAULT_PERCENTILE)
        else:
            number("Hedge.percentile", self.percentile, above=0, most=1)
            if not self.percentile < 1:
                raise ConfigError(f"Hedge.percentile: {self.percentile!r} must be below 1 (0.95, not 95)")
        integer("Hedge.max_attempts", self.max_attempts, least=2, most=100)


class LatencyQuantile:
    """A quantile of the latencies of the last 30 to 60 seconds, within 9 %. Safe from any thread."""

    __slots__ = ("_clock", "_current", "_lock", "_previous", "_quantile", "_samples", "_turn", "_unread", "_value")

    def __init__(self, quantile: float, clock: Callable[[], float]) -> None:
        self._quantile = quantile
        self._clock = clock
        self._lock = threading.Lock()
        self._current = [0] * _BUCKETS
        self._previous = [0] * _BUCKETS
        self._samples = 0
        self._turn = clock() + _WINDOW
        self._unread = 0
        self._value: float | None = None

    def record(self, latency: float) -> None:
        """Take in one latency (seconds)."""
        bucket = 0
        if latency > _RESOLUTION:
            bucket = min(_BUCKETS - 1, int(log2(latency / _RESOLUTION) * _PER_DOUBLING) + 1)
        with self._lock:
            self._move()
            self._current[bucket] += 1
            self._samples += 1
            self._unread += 1

    def value(self) -> float | None:
        """The quantile in seconds, at least a millisecond; None as long as there are too few samples."""
        with self._lock:
            self._move()
            if self._samples < _LEAST_SAMPLES:
                return None
            if self._value is None or self._unread >= _REFRESH:
                self._unread = 0
                self._value = self._compute()
            return self._value

    def _compute(self) -> float:
        wanted = self._quantile * self._samples
        bucket = seen = 0
        while (seen := seen + self._current[bucket] + self._previous[bucket]) < wanted:
            bucket += 1
        return max(_LEAST_DELAY, float(_RESOLUTION * 2.0 ** (bucket / _PER_DOUBLING)))  # the bucket's upper end

    def _move(self) -> None:
        now = self._clock()
        if now < self._turn:
            return
        # A service that was quiet for longer than both halves has forgotten both.
        self._previous = self._current if now < self._turn + _WINDOW else [0] * _BUCKETS
        self._current = [0] * _BUCKETS
        self._samples = sum(self._previous)
        self._turn = now + _WINDOW
        self._value = None


class HedgeTimer:
    """How long to wait before the next attempt of a call is begun beside the ones under way."""

    __slots__ = ("_fixed", "_quantile")

    def __init__(self, options: Hedge, clock: Callable[[], float]) -> None:
        self._fixed = options.delay
        self._quantile = None if options.percentile is None else LatencyQuantile(options.percentile, clock)

    def delay(self) -> float | None:
        """Seconds; None: no hedge."""
        return self._fixed if self._quantile is None else self._quantile.value()

    def record(self, latency: float | None) -> None:
        """Take in how long an attempt took to be answered, or how long it had been waited for when it was given up."""
        if self._quantile is not None and latency is not None:
            self._quantile.record(latency)
