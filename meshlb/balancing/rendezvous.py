"""Rendezvous hashing (highest random weight): no table, exact weights, and nothing moves that need not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from math import exp, log
from typing import Final

from xxhash import xxh64_intdigest

from meshlb.balancing.alias import weights_differ

_SCALE: Final = 2.0**-64

_SLACK: Final = 1.0 - 1e-9
"""More than what rounding can do to a bound."""

MOST_REMEMBERED: Final = 8192
"""Choices remembered: the users of some minutes, in a megabyte."""


class Rendezvous:
    """Every endpoint draws a number from (key, endpoint); the best draw wins (Thaler and Ravishankar 1998).

    The draw is ``u = xxh64(hash of the call's key, seed = xxh64(endpoint's key))``, scaled to (0, 1). The winner has
    the lowest ``-ln(u) / weight``, which gives every endpoint its exact share (Schindelhauer and Schomaker 2005); with
    equal weights that is the highest u. Changing one weight moves keys to or from that endpoint only.

    O(n) per choice, nothing to build. Choices are remembered, since keys come again: a session makes many calls. The
    ranking is also the order of the next best choices.
    """

    __slots__ = ("_heaviest", "_remembered", "_seeds", "_weights")

    def __init__(self, keys: Sequence[str], weights: Sequence[float] = ()) -> None:
        self._seeds = [xxh64_intdigest(key.encode()) for key in keys]
        self._weights = list(weights) if weights_differ(weights) else None
        self._heaviest = max(weights, default=1.0)
        self._remembered: dict[int, int] = {}

    def choose(self, hash: int) -> int:
        """The index for a 64-bit hash. At least one endpoint is needed."""
        chosen = self._remembered.get(hash)
        if chosen is None:
            chosen = self._best(hash)
            if len(self._remembered) >= MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[hash] = chosen
        return chosen

    def order(self, hash: int) -> Iterator[int]:
        """All indexes, best first."""
        draws = self._draws(hash)
        if self._weights is None:
            yield from sorted(range(len(draws)), key=draws.__getitem__, reverse=True)
        else:
            costs = list(map(_cost, draws, self._weights))
            yield from sorted(range(len(costs)), key=costs.__getitem__)

    def _draws(self, hash: int) -> list[int]:
        return list(map(xxh64_intdigest, repeat(hash.to_bytes(8, "little")), self._seeds))

    def _best(self, hash: int) -> int:
        draws = self._draws(hash)
        highest = draws.index(max(draws))
        weights = self._weights
        if weights is None:
            return highest
        # Logarithms cost more than draws. With the greatest weight there is, who draws less than this cannot win.
        least = int(exp(-_cost(draws[highest], weights[highest]) * self._heaviest) * _SLACK / _SCALE) - 1
        contenders = [i for i, draw in enumerate(draws) if draw >= least]
        return highest if len(contenders) == 1 else min(contenders, key=lambda i: _cost(draws[i], weights[i]))


def _cost(draw: int, weight: float) -> float:
    return -log((draw + 0.5) * _SCALE) / weight
