"""Weighted random choice in constant time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class AliasTable(NamedTuple):
    """Walker's alias table in Vose's construction (Vose 1991; Finagle's ``Alias.scala``).

    Draw ``u`` uniformly from [0, n); ``i = int(u)``; the choice is ``i`` if ``u < threshold[i]``, else ``alias[i]``.
    One random number serves both decisions. Pickers inline these two lines.
    """

    threshold: list[float]
    alias: list[int]

    @classmethod
    def build(cls, weights: Sequence[float]) -> AliasTable:
        """O(n). Weights are finite and above 0, in any scale."""
        n = len(weights)
        peak = max(weights, default=1.0)  # dividing first keeps the sum of huge weights finite
        scaled = [weight / peak for weight in weights]
        total = sum(scaled)
        share = [weight * n / total for weight in scaled]  # mean 1
        threshold = [i + 1.0 for i in range(n)]  # what rounding leaves over below stays whole, so no bucket leaks
        alias = list(range(n))
        small = [i for i in range(n) if share[i] < 1.0]
        large = [i for i in range(n) if share[i] >= 1.0]
        while small and large:
            i, j = small.pop(), large.pop()
            threshold[i] = i + share[i]
            alias[i] = j
            share[j] -= 1.0 - share[i]
            (small if share[j] < 1.0 else large).append(j)
        return cls(threshold, alias)

    def draw(self, uniform: float) -> int:
        """The choice for ``uniform`` from [0, 1)."""
        u = uniform * len(self.alias)
        i = int(u)
        return i if u < self.threshold[i] else self.alias[i]


def weights_differ(weights: Sequence[float]) -> bool:
    """Whether weighting makes any difference: 1, 1, 1 and 7, 7, 7 need no table."""
    return any(weight != weights[0] for weight in weights)
