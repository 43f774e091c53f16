"""Prequal's latency signal: how long requests take at about the load of now (Wydrowski et al., NSDI 2024, 4.1)."""

from __future__ import annotations

from collections import deque
from typing import Final

_PER_BUCKET: Final = 16
"""Answers remembered for each size of load: enough for a median that one slow request does not move."""

_ENOUGH: Final = 5
"""Answers for a median; with fewer, those at the next smaller and greater loads are taken in."""

MAX_AGE: Final = 10.0
"""Seconds that an answer says something for: caches fill and neighbours come and go within that time."""


class LatenciesByLoad:
    """The last latencies, kept apart by how many other requests were in flight when theirs arrived.

    Numbers up to 7 are kept apart, greater ones in buckets of at most a quarter's width. Not safe from several threads
    without a lock.
    """

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: dict[int, deque[tuple[float, float]]] = {}

    def add(self, in_flight: int, latency: float, now: float) -> None:
        """Take in one answer."""
        index = bucket_of(in_flight)
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = deque(maxlen=_PER_BUCKET)
        bucket.append((now, latency))

    def near(self, in_flight: int, now: float) -> list[float]:
        """Recent latencies at about this load; none if there was no answer lately."""
        buckets = self._buckets
        index = bucket_of(in_flight)
        oldest = now - MAX_AGE
        found = _recent(buckets.get(index), oldest)
        if len(found) < _ENOUGH:
            distances = sorted({abs(other - index) for other in buckets if other != index})
            for distance in distances:
                found += _recent(buckets.get(index - distance), oldest)
                found += _recent(buckets.get(index + distance), oldest)
                if len(found) >= _ENOUGH:
                    break
        return found


def bucket_of(number: int) -> int:
    """The index of the bucket of a number: itself up to 7, then four buckets for each doubling."""
    shift = max(0, number.bit_length() - 3)
    return (shift << 2) + (number >> shift)


def median(values: list[float]) -> float:
    """The median of at least one value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _recent(bucket: deque[tuple[float, float]] | None, oldest: float) -> list[float]:
    return [latency for at, latency in bucket if at >= oldest] if bucket else []
