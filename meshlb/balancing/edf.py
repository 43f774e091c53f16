"""Earliest deadline first: weighted turns from a heap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

T = TypeVar("T")

EPSILON: Final = 1e-13
"""Envoy adds it to every weight when it emulates picks, so that weights that are multiples of each other do not come
out in another order than by picking (envoyproxy/envoy#31592). Not added when an entry is put back."""

MAX_EMULATED: Final = 429_496_729
"""Envoy takes the number of emulated picks modulo this, a tenth of 2^32."""


class EdfScheduler(Generic[T]):
    """Envoy's EDF scheduler (``edf_scheduler.h``): an entry's next deadline lies ``1 / weight`` after its last.

    O(log n) per pick, exact shares, first in first out among equal deadlines. A changed weight counts from the next
    time its entry is put back. Weights are above 0. Not safe from several threads without a lock.
    """

    __slots__ = ("_heap", "_now", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._now = 0.0
        self._order = 0

    @classmethod
    def with_picks(cls, entries: Sequence[T], weight_of: Callable[[T], float], picks: int) -> EdfScheduler[T]:
        """A scheduler as it stands after ``picks`` picks, in O(n) (Envoy's ``createWithPicks``).

        A fresh one always begins with the heaviest entry. Where many clients start, or one rebuilds often, the light
        ones starve (envoyproxy/envoy#31378); a random ``picks`` spreads the first picks by weight.
        """
        scheduler = cls()
        picks %= MAX_EMULATED
        weights = [weight_of(entry) + EPSILON for entry in entries]
        total = sum(weights)
        emulated = 0
        for entry, weight in zip(entries, weights, strict=True):
            done = int(weight * picks / total)
            if done and done / weight >= picks / total:  # rounding gave it one too many
                done -= 1
            emulated += done
            scheduler._now = max(scheduler._now, done / weight)
            scheduler._heap.append(((done + 1) / weight, scheduler._order, entry))
            scheduler._order += 1
        heapify(scheduler._heap)
        if entries:
            for _ in range(picks - emulated):  # fewer than n
                scheduler.pick(weight_of)
        return scheduler

    def add(self, weight: float, entry: T) -> None:
        """Put an entry in, its first turn ``1 / weight`` from now."""
        heappush(self._heap, (self._now + 1.0 / weight, self._order, entry))
        self._order += 1

    def pick(self, weight_of: Callable[[T], float]) -> T:
        """Take the entry whose deadline comes first, and put it back with its weight of now. IndexError if empty."""
        self._now, _, entry = heappop(self._heap)
        self.add(weight_of(entry), entry)
        return entry
