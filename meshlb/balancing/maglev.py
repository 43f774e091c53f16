"""Google's Maglev table: a choice in constant time, shares even to one slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, cycle, islice
from math import ceil
from typing import Final

from xxhash import xxh64_intdigest

DEFAULT_TABLE_SIZE: Final = 65537
"""The paper's and Envoy's: prime, and shares even to 1 % for up to 655 endpoints (to 7 % for 10,000)."""

_ALL_ONES: Final = 2**64 - 1


class Maglev:
    """Endpoints take turns claiming slots of a table, each by its own permutation (Eisenbud et al., NSDI 2016, section
    3.4; Envoy ``maglev_lb.cc`` for hashes and weights).

    ``offset = xxh64(key) % size``, ``skip = xxh64(key, seed 1) % (size - 1) + 1``. With weights an endpoint takes its
    turn in round r only once ``r * weight`` has reached its target, which then grows by the largest weight. Turns go
    in the order of the keys.

    O(1) per choice, O(size log size) to build. Removing one endpoint moves its own keys and about half a percent more.
    """

    __slots__ = ("_count", "table")

    def __init__(
        self, keys: Sequence[str], weights: Sequence[float] = (), *, table_size: int = DEFAULT_TABLE_SIZE
    ) -> None:
        self._count = len(keys)
        in_order = sorted(range(len(keys)), key=keys.__getitem__)
        encoded = [keys[i].encode() for i in in_order]
        permutations = [
            (xxh64_intdigest(key) % table_size, xxh64_intdigest(key, 1) % (table_size - 1) + 1) for key in encoded
        ]
        total = sum(weights)
        filled = fill(permutations, [weights[i] / total for i in in_order] if weights else [], table_size)
        self.table = [in_order[i] for i in filled]

    def choose(self, hash: int, attempt: int = 0) -> int:
        """The index for a 64-bit hash; a later ``attempt`` looks in another slot (Envoy's rule for retries)."""
        if attempt:
            hash ^= _ALL_ONES - attempt + 1
        return self.table[hash % len(self.table)]

    def order(self, hash: int) -> Iterator[int]:
        """Indexes, best first: the choices of the first attempts, then what the table holds from there on. One so light
        that it has no slot is not among them."""
        seen: set[int] = set()
        size = len(self.table)
        first = hash % size
        slots = [(hash ^ (_ALL_ONES - attempt + 1)) % size for attempt in range(1, 9)]
        for slot in chain((first,), slots, range(first + 1, size), range(first)):
            owner = self.table[slot]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == self._count:
                    return


def fill(permutations: Sequence[tuple[int, int]], weights: Sequence[float], size: int) -> list[int]:
    """The table for (offset, skip) pairs, which take turns in this order. ``size`` is prime. No weights: equal ones."""
    table = [-1] * size
    at = [offset for offset, _ in permutations]
    skips = [skip for _, skip in permutations]
    turns = weighted_turns(weights) if weights else cycle(range(len(permutations)))
    for i in islice(turns, size):
        slot, skip = at[i], skips[i]
        while table[slot] >= 0:
            slot += skip
            if slot >= size:
                slot -= size
        table[slot] = i
        at[i] = slot  # taken now: the next turn moves on from here
    return table


def weighted_turns(weights: Sequence[float]) -> Iterator[int]:
    """Envoy's turns, without end: in round r = 1, 2, ... those whose ``r * weight`` has reached their target, in order.

    Everybody's next round is worked out instead of asking all in every round: with one heavy endpoint and a thousand
    light ones there are as many rounds as slots.
    """
    heaviest = max(weights)
    targets = [0.0] * len(weights)
    rounds: dict[int, list[int]] = {1: list(range(len(weights)))}
    for now in count(1):
        turns = rounds.pop(now, [])
        turns.sort()
        for i in turns:
            yield i
            weight = weights[i]
            target = targets[i] = targets[i] + heaviest
            following = ceil(target / weight)
            if (following - 1) * weight >= target:  # the quotient was rounded another way than the product
                following -= 1
            elif following * weight < target:
                following += 1
            following = max(following, now + 1)  # one turn a round, whatever the sum of many weights was rounded to
            if following in rounds:
                rounds[following].append(i)
            else:
                rounds[following] = [i]
