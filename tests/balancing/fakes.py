"""A candidate with plain fields, and what builds pickers over it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

from meshlb.balancing import PeakEwma, Picker, Policy, PolicyEnvironment
from meshlb.model import NO_CONTEXT, CallContext, Endpoint, HashKey


@dataclass(eq=False)
class FakeCandidate:
    endpoint: Endpoint
    weight: float = 1.0
    in_flight: int = 0
    latency: PeakEwma = field(default_factory=PeakEwma)
    last_picked: float = -math.inf
    oldest: float = 0.0

    def oldest_wait(self, now: float) -> float:
        return self.oldest

    def __repr__(self) -> str:
        return self.endpoint.id


class FakeClock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def candidates(n: int, weights: Sequence[float] = (), latency: float | None = None) -> list[FakeCandidate]:
    """n endpoints named i0, i1, ...; with ``latency`` each has one sample of it, taken at time 0."""
    made = []
    for i in range(n):
        weight = weights[i] if weights else 1.0
        candidate = FakeCandidate(Endpoint(f"10.0.{i // 250}.{i % 250 + 1}", 8000, id=f"i{i}"), weight)
        if latency is not None:
            candidate.latency.observe(latency, 0.0)
        made.append(candidate)
    return made


def build(
    policy: Policy,
    members: Sequence[FakeCandidate],
    *,
    seed: int = 1,
    clock: FakeClock | None = None,
    previous: Picker[FakeCandidate] | None = None,
) -> Picker[FakeCandidate]:
    return policy.build(members, PolicyEnvironment("orders", clock or FakeClock(), Random(seed)), previous)


def pick(picker: Picker[FakeCandidate], key: HashKey | None = None, excluded: Collection[object] = ()) -> FakeCandidate:
    picked = picker.pick(CallContext(key, "", excluded) if excluded or key is not None else NO_CONTEXT)
    assert picked is not None
    return picked


def shares(picker: Picker[FakeCandidate], picks: int) -> Counter[FakeCandidate]:
    """How often each was picked, with nothing in flight in between."""
    return Counter(pick(picker) for _ in range(picks))
