"""The ketama ring, in the form that Envoy and gRPC give it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import ceil
from operator import add
from typing import Final

from xxhash import xxh64_intdigest

MAX_RING_SIZE: Final = 8_388_608
"""Envoy's upper bound, above which gRPC rejects a configuration."""


class KetamaRing:
    """Endpoints as points on a ring of 64-bit hashes; a key belongs to the next point (Envoy ``ring_hash_lb.cc``, A42).

    Point k of an endpoint lies at ``xxh64(key + "_" + k)``. The lightest endpoint gets enough whole points for the
    ring to have ``min_size``, the others in proportion, unless that exceeds ``max_size``. Endpoints are taken in the
    order of their keys, as gRPC does, so the ring does not depend on the order of the input.

    O(log size) per choice. At 1,024 points and 100 endpoints the fullest holds about twice the mean: Maglev or
    rendezvous spread better, the ring is here for callers that must agree with one.
    """

    __slots__ = ("_count", "hashes", "owners")

    def __init__(
        self, keys: Sequence[str], weights: Sequence[float] = (), *, min_size: int = 1024, max_size: int = MAX_RING_SIZE
    ) -> None:
        self._count = len(keys)
        weights = weights or [1.0] * len(keys)
        total = sum(weights)
        shares = [weight / total for weight in weights]
        lightest = min(shares)
        scale = min(ceil(lightest * min_size) / lightest, float(max_size))
        # Many thousand points: what is done for each of them is done by C.
        owners: list[int] = []
        numbers: list[bytes] = []
        suffixes = [b"_0"]
        target = 0.0
        for i in sorted(range(len(keys)), key=keys.__getitem__):
            target += scale * shares[i]
            points = ceil(target) - len(owners)
            if points > 0:
                if points > len(suffixes):
                    suffixes.extend(b"_%d" % k for k in range(len(suffixes), points))
                owners += [i] * points
                numbers += suffixes[:points]
        names = map(add, map([key.encode() for key in keys].__getitem__, owners), numbers)
        positions = list(map(xxh64_intdigest, names))
        owner_of = dict(zip(reversed(positions), reversed(owners), strict=True))  # of two at one point the first has it
        positions.sort(key=float)  # twice as fast as ints of this size, and all but sorts them
        positions.sort()
        self.hashes = positions
        self.owners = list(map(owner_of.__getitem__, positions))

    def choose(self, hash: int, attempt: int = 0) -> int:
        """The index for a 64-bit hash; a later ``attempt`` goes that many points further (Envoy's rule for retries)."""
        return self.owners[(bisect_left(self.hashes, hash) + attempt) % len(self.owners)]

    def order(self, hash: int) -> Iterator[int]:
        """The indexes as they are met clockwise. One without a point is not among them."""
        start = bisect_left(self.hashes, hash)
        size = len(self.owners)
        seen: set[int] = set()
        for step in range(size):
            owner = self.owners[(start + step) % size]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == self._count:
                    return
