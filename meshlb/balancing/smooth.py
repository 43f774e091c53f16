"""nginx's smooth weighted round robin."""

from __future__ import annotations

from collections.abc import Sequence


class SmoothWeighted:
    """Picks 5, 1, 1 as ``a a b a c a a`` instead of ``a a a a a b c`` (nginx commit 52327e0627f4).

    Before a pick everybody's current weight grows by its own weight; the largest is picked (the first of equals) and
    pays the total. Exact over every full cycle; O(n) per pick. Not safe from several threads without a lock.
    """

    __slots__ = ("_total", "_weights", "current")

    def __init__(self, weights: Sequence[float], current: Sequence[float] | None = None) -> None:
        self._weights = list(weights)
        self._total = sum(weights)
        self.current = list(current) if current is not None else [0.0] * len(self._weights)

    def pick(self) -> int:
        """The next index."""
        current = [was + weight for was, weight in zip(self.current, self._weights, strict=True)]
        best = current.index(max(current))
        current[best] -= self._total
        self.current = current
        return best
