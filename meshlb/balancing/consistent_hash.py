"""The same endpoint for the same key, from every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Literal, Protocol, cast

from xxhash import xxh64_intdigest

from meshlb._validate import integer, number
from meshlb.balancing.alias import weights_differ
from meshlb.balancing.base import CandidateT, Picker, Policy, PolicyEnvironment
from meshlb.balancing.bounded_load import envoy_slots, haproxy_slots, probe_order
from meshlb.balancing.hash_keys import endpoint_keys, key_bytes
from meshlb.balancing.maglev import DEFAULT_TABLE_SIZE, Maglev
from meshlb.balancing.random_choice import Random
from meshlb.balancing.rendezvous import Rendezvous
from meshlb.balancing.ring import MAX_RING_SIZE, KetamaRing
from meshlb.balancing.round_robin import RoundRobin
from meshlb.errors import ConfigError
from meshlb.model import CallContext, HashKey

TABLES: Final = ("auto", "rendezvous", "ring", "maglev")

RENDEZVOUS_LIMIT: Final = 128
"""Above this many endpoints ``auto`` takes Maglev: for a key that is not remembered, rendezvous costs about 0.1 us an
endpoint."""

_WHOLE: Final = 256
"""What the heaviest weight becomes where HAProxy's rule needs whole numbers (HAProxy's own maximum)."""


class HashTable(Protocol):
    """Maps a 64-bit hash to an index."""

    def choose(self, hash: int) -> int: ...
    def order(self, hash: int) -> Iterator[int]: ...


@dataclass(frozen=True, slots=True)
class ConsistentHash:
    """The same endpoint for the same key, from every process, and few keys moved when the set changes.

    ``table``: ``rendezvous`` (exact weights, the fewest keys move, O(n)), ``maglev`` (O(1), even to a slot, half a
    percent of collateral moves), ``ring`` (ketama, agrees with Envoy's and gRPC's), or ``auto``: rendezvous up to 128
    endpoints, Maglev above. When a set crosses 128 under ``auto`` nearly all keys move: name a table if yours may.

    ``bounded_load``: no endpoint holds more than this many times its share of the calls that this process has in
    flight; None for no bound. 1.25 to 2 are usual. A call over the bound goes, with ``overflow="random"``, to the next
    endpoint in an order drawn from its key (Envoy's rule), with ``"next"`` to the table's next best (HAProxy's).

    ``missing_key``: a call without a key goes to a ``random`` endpoint by weight (gRPC A76's rule), or ``round_robin``.

    An endpoint's own key is its id, or its address without one. A retry gets the next best choice for its key. Raises
    ConfigError naming the field.
    """

    name: ClassVar[str] = "consistent_hash"
    uses_weight: ClassVar[bool] = True
    uses_key: ClassVar[bool] = True

    table: Literal["auto", "rendezvous", "ring", "maglev"] = "auto"
    bounded_load: float | None = None
    overflow: Literal["random", "next"] = "random"
    missing_key: Literal["random", "round_robin"] = "random"
    table_size: int = DEFAULT_TABLE_SIZE
    """Slots of a Maglev table: a prime number, 100 times the endpoints for shares within 1 %."""
    min_ring_size: int = 1024
    """Envoy's and gRPC's default. More points make shares evener and building slower."""
    max_ring_size: int = 65_536
    """A bound on what an extreme weight may cost: 64 times the minimum takes about 50 ms to build."""

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("table", self.table, TABLES),
            ("overflow", self.overflow, ("random", "next")),
            ("missing_key", self.missing_key, ("random", "round_robin")),
        ):
            if value not in choices:
                known = ", ".join(map(repr, choices))
                raise ConfigError(f"ConsistentHash.{field}: {value!r} is not one of {known}")
        if self.bounded_load is not None:
            number("ConsistentHash.bounded_load", self.bounded_load, least=1, most=1000)
        integer("ConsistentHash.table_size", self.table_size, least=2, most=5_000_011)
        if not _is_prime(self.table_size):
            raise ConfigError(f"ConsistentHash.table_size: {self.table_size} is not a prime number")
        integer("ConsistentHash.min_ring_size", self.min_ring_size, least=1, most=MAX_RING_SIZE)
        integer("ConsistentHash.max_ring_size", self.max_ring_size, least=self.min_ring_size, most=MAX_RING_SIZE)

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        return HashPicker(self, candidates, environment, previous)

    def make_table(self, keys: Sequence[str], weights: Sequence[float]) -> HashTable:
        """The table for these endpoints. Pure: equal input, equal table, in every process."""
        if self.table == "ring":
            return KetamaRing(keys, weights, min_size=self.min_ring_size, max_size=self.max_ring_size)
        if self.table == "maglev" or (self.table == "auto" and len(keys) > RENDEZVOUS_LIMIT):
            return Maglev(keys, weights if weights_differ(weights) else (), table_size=self.table_size)
        return Rendezvous(keys, weights)


class HashPicker(Generic[CandidateT]):
    """Looks a call's key up in a table. Candidates are held in the order of their keys, so that every index, and with
    it the order of overflow, means the same endpoint in every process."""

    __slots__ = ("_candidates", "_choose", "_options", "_shares", "_table", "_whole", "built_from", "keyless", "table")

    def __init__(
        self,
        options: ConsistentHash,
        candidates: Sequence[CandidateT],
        environment: PolicyEnvironment,
        previous: Picker[Any] | None,
    ) -> None:
        unordered = endpoint_keys(candidates)
        in_order = sorted(range(len(unordered)), key=unordered.__getitem__)
        self._options = options
        self._candidates = [candidates[i] for i in in_order]
        keys = [unordered[i] for i in in_order]
        weights = [candidate.weight for candidate in self._candidates]
        heaviest = max(weights, default=1.0)
        # Before they are added up: the sum of huge weights is finite then, and the least keep a share above 0.
        scaled = [max(weight / heaviest, 1e-9) for weight in weights]
        total = sum(scaled)
        self._shares = [weight / total for weight in scaled]
        bounded = options.bounded_load is not None
        self._whole = [max(round(_WHOLE * weight), 1) for weight in scaled] if bounded else []
        self.built_from = (options, keys, weights)
        keyless = previous.keyless if isinstance(previous, HashPicker) else None
        self.keyless: Picker[CandidateT] = _keyless_policy(options).build(self._candidates, environment, keyless)
        if isinstance(previous, HashPicker) and previous.built_from == self.built_from:
            self.table: HashTable = previous.table  # same members and weights: an endpoint's status or tags changed
        elif candidates:
            self.table = options.make_table(keys, self._shares)
        else:
            self.table = Rendezvous([])
        self._choose = self.table.choose

    def pick(self, call: CallContext) -> CandidateT | None:
        key = call.key
        if key is None or not self._candidates:
            return self.keyless.pick(call)
        hash = xxh64_intdigest(self.bytes_of(key))
        if call.excluded or self._options.bounded_load is not None:
            return self._pick_with_care(hash, call)
        return self._candidates[self._choose(hash)]

    def bytes_of(self, key: HashKey) -> bytes:
        """What is hashed of a key."""
        return key_bytes(key)

    def _pick_with_care(self, hash: int, call: CallContext) -> CandidateT | None:
        candidates, excluded = self._candidates, call.excluded
        if not excluded:
            best: int | None = self._choose(hash)
        else:
            best = next((i for i in self.table.order(hash) if candidates[i] not in excluded), None)
            if best is None:  # one too light to have a place in the table may still be there
                return self.keyless.pick(call)
        if best is None or self._options.bounded_load is None or not candidates[best].in_flight:
            return candidates[best] if best is not None else None
        return candidates[self._within_bound(hash, best, call)]

    def _within_bound(self, hash: int, best: int, call: CallContext) -> int:
        """``best``, or the next in line that has a slot free, or the least overloaded of all."""
        candidates = self._candidates
        in_flight = [candidate.in_flight for candidate in candidates]
        factor = round(cast("float", self._options.bounded_load) * 100)
        if self._options.overflow == "random":
            slots = envoy_slots(sum(in_flight), self._shares, factor)
            full = 1.0  # Envoy accepts in_flight <= slots
            order = probe_order(hash, len(candidates))
        else:
            slots = haproxy_slots(sum(in_flight), self._whole, factor)
            full = 1.0 - 1e-9  # HAProxy accepts in_flight < slots
            order = self.table.order(hash)
        least, lowest = best, in_flight[best] / slots[best]
        if lowest <= full:
            return best
        for i in order:
            load = in_flight[i] / slots[i]
            if load < lowest and candidates[i] not in call.excluded:
                least, lowest = i, load
                if load <= full:
                    break
        return least


def _keyless_policy(options: ConsistentHash) -> Policy:
    return RoundRobin() if options.missing_key == "round_robin" else Random()


def _is_prime(number: int) -> bool:
    return number >= 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
