"""Rendezvous hashing (highest random weight): no table, exact weights, and nothing moves that need not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from typing import Final

from xxhash import xxh64_intdigest

from meshlb.balancing.alias import weights_differ

_SCALE: Final = 2.0**-64


class Rendezvous:
    """Every endpoint draws a number from (key, endpoint); the best draw wins (Thaler and Ravishankar 1998).

    The draw is ``u = xxh64(hash of the call's key, seed = xxh64(endpoint's key))``, scaled to (0, 1). The winner has
    the lowest ``-ln(u) / weight``, which gives every endpoint its exact share (Schindelhauer and Schomaker 2005); with
    equal weights that is the highest u. Changing one weight moves keys to or from that endpoint only.

    O(n) per choice, nothing to build. The ranking is also the order of the next best choices.
    """

    __slots__ = ("_seeds", "_weights")

    def __init__(self, keys: Sequence[str], weights: Sequence[float] = ()) -> None:
        self._seeds = [xxh64_intdigest(key.encode()) for key in keys]
        self._weights = list(weights) if weights_differ(weights) else None

    def choose(self, hash: int) -> int:
        """The index for a 64-bit hash. At least one endpoint is needed."""
        draws = self._draws(hash)
        return draws.index(min(draws))

    def order(self, hash: int) -> Iterator[int]:
        """All indexes, best first."""
        draws = self._draws(hash)
        yield from sorted(range(len(draws)), key=draws.__getitem__)

    def _draws(self, hash: int) -> list[float]:
        data = hash.to_bytes(8, "little")
        if self._weights is None:
            return [-xxh64_intdigest(data, seed) for seed in self._seeds]
        return [
            -log((xxh64_intdigest(data, seed) + 0.5) * _SCALE) / weight
            for seed, weight in zip(self._seeds, self._weights, strict=True)
        ]
