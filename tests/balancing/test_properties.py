"""What must hold for every policy, with any members, weights and history."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlb.balancing import (
    ClientWeightedRoundRobin,
    ConsistentHash,
    IPHash,
    LeastConnections,
    LeastResponseTime,
    Policy,
    Prequal,
    RoundRobin,
    WeightedRoundRobin,
    policy_names,
    resolve_policy,
)
from meshlb.balancing import Random as RandomPolicy
from meshlb.model import CallContext
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick

POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "random": RandomPolicy,
    "weighted_round_robin": WeightedRoundRobin,
    "client_weighted_round_robin": lambda: ClientWeightedRoundRobin(expiration_period=2.0),
    "prequal": Prequal,
    "smooth": lambda: WeightedRoundRobin("smooth"),
    "edf": lambda: WeightedRoundRobin("edf"),
    "least_connections": LeastConnections,
    "three choices": lambda: LeastConnections(choices=3),
    "full scan": lambda: LeastConnections(full_scan=True),
    "least_response_time": LeastResponseTime,
    "consistent_hash": ConsistentHash,
    "ring": lambda: ConsistentHash("ring", bounded_load=1.25),
    "maglev": lambda: ConsistentHash("maglev", table_size=251, bounded_load=1.25, overflow="next"),
    "ip_hash": lambda: IPHash(24, 64),
}


def test_every_built_in_policy_is_under_test() -> None:
    assert {policy().name for policy in POLICIES.values()} >= set(policy_names())
    assert all(resolve_policy(name).name == name for name in policy_names())


states = st.tuples(
    st.floats(0.01, 100), st.integers(0, 5), st.booleans(), st.floats(0, 2), st.booleans(), st.floats(0, 3)
)


def members_of(drawn: list[Any], clock: FakeClock) -> list[FakeCandidate]:
    members = candidates(len(drawn), [entry[0] for entry in drawn])
    for member, (_, in_flight, known, latency, failed, age) in zip(members, drawn, strict=True):
        member.in_flight = in_flight
        member.oldest = age if in_flight else 0.0
        if known:
            member.latency.observe(latency, clock.now - 1.0)
        if failed:
            member.latency.penalize(clock.now - 0.5, 30.0 if known else None)
        member.last_picked = clock.now - age if known else -math.inf
    return members


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(states, min_size=1, max_size=12),
    out=st.sets(st.integers(0, 11)),
    key=st.one_of(st.none(), st.text(max_size=5), st.integers(), st.sampled_from(["10.0.0.1", "::1"])),
    seed=st.integers(0, 2**16),
)
def test_no_policy_picks_an_excluded_endpoint_while_another_exists(
    name: str, drawn: list[Any], out: set[int], key: Any, seed: int
) -> None:
    clock = FakeClock(100.0)
    members = members_of(drawn, clock)
    picker = build(POLICIES[name](), members, seed=seed, clock=clock)
    excluded = {members[i] for i in out if i < len(members)}
    for form in (excluded, frozenset(excluded), tuple(excluded), dict.fromkeys(excluded)):
        picked = picker.pick(CallContext(key, "", form))
        if len(excluded) == len(members):
            assert picked is None
        else:
            assert picked in members
            assert picked not in excluded


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(changes=st.lists(st.integers(0, 2**20), min_size=1, max_size=12), seed=st.integers(0, 2**16))
def test_picks_over_churn_never_raise_and_stay_within_the_set(name: str, changes: list[int], seed: int) -> None:
    clock, random = FakeClock(), Random(seed)
    everybody = candidates(20, [random.uniform(0.1, 10) for _ in range(20)])
    policy = POLICIES[name]()
    previous = None
    running: list[FakeCandidate] = []
    for change in changes:
        members = [member for i, member in enumerate(everybody) if change >> i & 1]
        picker = build(policy, members, seed=seed, clock=clock, previous=previous)
        for step in range(20):
            clock.now += random.random()
            picked = picker.pick(CallContext(f"k{step}" if step % 2 else None))
            if picked is None:
                assert not members
                break
            assert picked in members
            picked.in_flight += 1
            picked.last_picked = clock.now
            running.append(picked)
            if len(running) > 5:
                done = running.pop(random.randrange(5))
                done.in_flight -= 1
                if random.random() < 0.2:
                    done.latency.penalize(clock.now)
                else:
                    done.latency.observe(random.random(), clock.now)
        previous = picker


@pytest.mark.parametrize("name", POLICIES)
def test_no_endpoint_starves(name: str) -> None:
    """Twelve endpoints of unequal weight and speed, one ten times slower than the rest, in a closed loop."""
    clock, random = FakeClock(), Random(11)
    members = candidates(12, [1.0 + i % 3 for i in range(12)])
    picker = build(POLICIES[name](), members, clock=clock)
    counts: Counter[FakeCandidate] = Counter()
    running: list[tuple[float, float, int, FakeCandidate]] = []
    for step in range(12_000):
        if len(running) >= 8:
            running.sort()
            clock.now, began, _, done = running.pop(0)
            done.in_flight -= 1
            done.latency.observe(clock.now - began, clock.now)
        picked = pick(picker, f"10.{step % 251}.{step % 13}.{step % 7}")
        picked.in_flight += 1
        picked.last_picked = clock.now
        counts[picked] += 1
        latency = random.uniform(0.04, 0.06) * (10 if picked is members[0] else 1)
        running.append((clock.now + latency, clock.now, step, picked))
    assert len(counts) == 12
    assert min(counts.values()) >= 15


@pytest.mark.parametrize("name", ["random", "weighted_round_robin", "smooth", "edf", "least_connections"])
@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.floats(1, 5), min_size=2, max_size=6), seed=st.integers(0, 2**16))
def test_shares_converge_to_weights(name: str, weights: list[float], seed: int) -> None:
    members = candidates(len(weights), weights)
    picker = build(POLICIES[name](), members, seed=seed)
    counts = Counter(pick(picker) for _ in range(6000))
    total = sum(weights)
    tolerance = 0.005 if name in ("weighted_round_robin", "smooth", "edf") else 0.04
    for member, weight in zip(members, weights, strict=True):
        assert counts[member] / 6000 == pytest.approx(weight / total, abs=tolerance)
