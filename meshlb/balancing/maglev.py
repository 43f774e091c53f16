"""Google's Maglev table: a choice in constant time, shares even to one slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, cycle, islice, repeat
from math import ceil
from typing import Final

from xxhash import xxh64_intdigest

DEFAULT_TABLE_SIZE: Final = 65537
"""The paper's and Envoy's: prime, and shares even to 1 % for up to 655 endpoints (to 7 % for 10,000)."""

_ALL_ONES: Final = 2**64 - 1

_CROWDED: Final = 16
"""A table with less than one free slot in so many is crowded: from there on longer searches pay for the copies."""

_COPIES: Final = 32
_ALL_TAKEN: Final = b"\1" * _COPIES


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
            (offset % table_size, skip % (table_size - 1) + 1)
            for offset, skip in zip(
                map(xxh64_intdigest, encoded), map(xxh64_intdigest, encoded, repeat(1)), strict=True
            )
        ]
        total = sum(weights)
        filled = fill(permutations, [weights[i] / total for i in in_order] if weights else [], table_size)
        self.table = filled if in_order == list(range(len(keys))) else [in_order[i] for i in filled]

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
    taken = bytearray(size)
    at = [offset for offset, _ in permutations]
    skips = [skip for _, skip in permutations]
    turns = weighted_turns(weights) if weights else cycle(range(len(permutations)))
    crowded = size // _CROWDED
    for i in islice(turns, size - crowded):
        slot = at[i]
        if taken[slot]:
            skip = skips[i]
            slot += skip
            if slot >= size:
                slot -= size
            while taken[slot]:
                slot += skip
                if slot >= size:
                    slot -= size
            at[i] = slot  # taken now: the next turn moves on from here
        taken[slot] = 1
        table[slot] = i
    # To find one of the last free slots takes up to ``size`` steps. In a row of copies of the table a slice with a
    # stride makes many steps at once.
    row = taken * _COPIES
    last = len(row) - 1
    for i in islice(turns, crowded):
        slot, skip = at[i], skips[i]
        while (steps := row[slot::skip].find(0)) < 0:
            slot = (slot + (last - slot) // skip * skip) % size
        slot = at[i] = (slot + steps * skip) % size
        row[slot::size] = _ALL_TAKEN
        table[slot] = i
    return table


def weighted_turns(weights: Sequence[float]) -> Iterator[int]:
    """Envoy's turns, without end: in round r = 1, 2, ... those whose ``r * weight`` has reached their target, in order.

    Everybody's next round is worked out instead of asking all in every round: with one heavy endpoint and a thousand
    light ones there are as many rounds as slots. And it is worked out once for all who have the same weight.
    """
    return chain.from_iterable(_weighted_rounds(weights))


def _weighted_rounds(weights: Sequence[float]) -> Iterator[list[int]]:
    heaviest = max(weights)
    by_weight: dict[float, list[int]] = {}
    for i, weight in enumerate(weights):
        by_weight.setdefault(weight, []).append(i)
    distinct, members = list(by_weight), list(by_weight.values())
    targets = [0.0] * len(distinct)
    rounds: dict[int, list[int]] = {1: list(range(len(distinct)))}
    for now in count(1):
        due = rounds.pop(now, None)
        if due is None:
            continue
        yield members[due[0]] if len(due) == 1 else sorted(chain.from_iterable(map(members.__getitem__, due)))
        for group in due:
            weight = distinct[group]
            target = targets[group] = targets[group] + heaviest
            following = ceil(target / weight)
            if (following - 1) * weight >= target:  # the quotient was rounded another way than the product
                following -= 1
            elif following * weight < target:
                following += 1
            if following <= now:  # one turn a round, whatever the sum of many weights was rounded to
                following = now + 1
            if following in rounds:
                rounds[following].append(group)
            else:
                rounds[following] = [group]
