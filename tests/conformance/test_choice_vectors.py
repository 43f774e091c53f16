"""Published vectors of least connections and least response time, and of how even the hashes are. Each names its
source. Those that are statistical run with a fixed seed."""

from __future__ import annotations

from collections import Counter
from math import ceil, log
from random import Random

import pytest
from xxhash import xxh64_intdigest

from meshlb.balancing import LeastConnections, LeastResponseTime, PolicyEnvironment, RoundRobin
from meshlb.balancing import Random as RandomPolicy
from meshlb.balancing.least_response_time import UNKNOWN_BUSY_COST, response_time_cost
from meshlb.balancing.maglev import Maglev
from meshlb.balancing.rendezvous import Rendezvous
from meshlb.balancing.ring import KetamaRing
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick

# --- round robin


def test_envoy_round_robin_seed() -> None:
    """G10, envoy round_robin_lb_test.cc ``Seed``: three hosts, begun with number 1."""

    class Seed(Random):
        def randrange(self, *args: object, **options: object) -> int:
            return 1

        def getrandbits(self, k: int) -> int:
            return 1

        def random(self) -> float:
            return 1 / 3 + 1e-9

    members = candidates(3)
    picker = RoundRobin().build(members, PolicyEnvironment("orders", FakeClock(), Seed()), None)
    assert [members.index(pick(picker)) for _ in range(4)] == [1, 2, 0, 1]


# --- least connections


def test_envoy_full_scan_ties() -> None:
    """G22, envoy least_request_lb_test.cc: three tied hosts get a third each, within half a percent."""
    members = candidates(3)
    picker = build(LeastConnections(full_scan=True), members)
    picks = 200_000
    counts = Counter(pick(picker) for _ in range(picks))
    assert [counts[member] / picks for member in members] == pytest.approx([1 / 3] * 3, abs=0.005)


@pytest.mark.parametrize(("percent", "effort"), [(10, 1), (30, 2), (40, 3), (50, 4)])
def test_finagle_panic_effort(percent: int, effort: int) -> None:
    """G44, finagle PanicMode.scala: so many draws of two, and less than one in a hundred finds only bad nodes.

    Here nobody draws again and again: unhealthy endpoints are not among those drawn from. For those that have only just
    failed it is ``choices`` that says how many are looked at.
    """
    share = percent / 100
    assert effort == ceil(log(0.01) / log(share**2) - 1e-9)
    members = candidates(1000)
    for failing in members[: 10 * percent]:
        failing.latency.penalize(0.0)
    for choices, most in ((2 * effort, 0.0135), (2 * effort - 2, 1.0)):
        if choices < 2:
            continue
        picker = build(LeastConnections(choices=choices), members)
        bad = sum(pick(picker).latency.penalty > 0 for _ in range(20_000)) / 20_000
        assert bad == pytest.approx(share**choices, rel=0.25)
        assert (0.0135 if most == 1.0 else 0.0) <= bad <= most


def test_balls_in_bins() -> None:
    """G45: as many balls as bins, 20,000. At random the fullest gets 8 or so, with two choices 3."""
    fullest = {}
    for policy in (RandomPolicy(), LeastConnections()):
        members = candidates(20_000)
        picker = build(policy, members, seed=3)
        for _ in members:
            pick(picker).in_flight += 1
        fullest[policy.name] = max(member.in_flight for member in members)
    assert 6 <= fullest["random"] <= 10
    assert fullest["least_connections"] == 3


# --- least response time


@pytest.mark.parametrize(("rtt", "active", "cost"), [(20, 5, 120), (30, 0, 30), (50, 2, 150)])
def test_envoy_peak_ewma_cost(rtt: float, active: int, cost: float) -> None:
    """G42, envoy peak_ewma cost test: rtt * (active + 1)."""
    (member,) = candidates(1, latency=rtt)
    member.in_flight = active
    assert response_time_cost(member, 1.0, 0.0) == cost


def test_envoy_peak_ewma_cost_of_unknown_hosts() -> None:
    """G42 has 1,000,003 for three calls in flight and no sample, and 10, a default rtt, for none.

    Ours is further off in both directions, as Finagle's: above anything measured, and nothing at all. So an unknown
    endpoint gets one call, at once, and no second one before it has answered.
    """
    (member,) = candidates(1)
    assert response_time_cost(member, 1.0, 0.0) == 0.0
    member.in_flight = 3
    assert response_time_cost(member, 1.0, 0.0) == 3 * UNKNOWN_BUSY_COST > 1_000_003


R = 100_000
N = 100
EPSILON = 0.0005 * R


def mean_loads(latencies: list[int]) -> list[float]:
    """R requests, one a step, each under way for its node's latency in steps; the estimate decays over 150 steps. For
    each node the mean, over its requests, of how many it had had: half of what it got in the end, as there."""
    clock, members = FakeClock(), candidates(len(latencies))
    # Ties within a millisecond and forced picks after a second mean nothing in steps.
    policy = LeastResponseTime(decay=150.0, tie=0, tie_floor=0, force_pick_after=None)
    picker = build(policy, members, seed=12345, clock=clock)
    latency_of = dict(zip(members, latencies, strict=True))
    under_way: dict[int, list[FakeCandidate]] = {}
    counts: Counter[FakeCandidate] = Counter()
    sums: Counter[FakeCandidate] = Counter()
    for now in range(R):
        clock.now = float(now)
        member = pick(picker)
        counts[member] += 1
        sums[member] += counts[member]
        member.in_flight += 1
        member.last_picked = clock.now
        under_way.setdefault(now + latency_of[member], []).append(member)
        for answering in under_way.pop(now, ()):
            answering.in_flight -= 1
            answering.latency.observe(latency_of[answering], clock.now)
    return [sums[member] / max(counts[member], 1) for member in members]


def assert_even(means: list[float]) -> None:
    mean = sum(means) / len(means)
    assert max(abs(each - mean) for each in means) < EPSILON


def test_finagle_balances_evenly() -> None:
    """G43, finagle P2CPeakEwmaTest.scala: identical nodes."""
    assert_even(mean_loads([5] * N))


def test_finagle_probes_a_node_without_history_once() -> None:
    """G43: one more node, that does not answer."""
    *rest, silent = mean_loads([1] * N + [2 * R])
    assert_even(rest)
    assert silent == 1.0


def test_finagle_half_the_load_for_twice_the_latency() -> None:
    """G43: a node that is twice as slow gets half of the others' load or more, as there with this decay."""
    *rest, slow = mean_loads([5] * N + [10])
    assert_even(rest)
    assert rest[0] - 2 * slow < EPSILON
    assert slow < rest[0]


# --- evenness of the hashes


def surplus(counts: Counter[int], total: int, members: int) -> float:
    """By how much the fullest exceeds the mean: what has to be provisioned above it."""
    return max(counts.values()) / (total / members) - 1


def test_maglev_paper_overprovisioning() -> None:
    """G57, NSDI 2016, section 5.3, 1,000 backends: what the fullest has above the mean. Maglev is even to a slot; a
    ring with as many points needs some 30 %, rendezvous with as many keys some 50 % (12 % with ten times as many)."""
    keys = [f"10.0.{i // 256}.{i % 256}:80" for i in range(1000)]
    for size in (65537, 655373):
        assert surplus(Counter(Maglev(keys, table_size=size).table), size, 1000) <= 1000 / size
    ring = KetamaRing(keys, min_size=65537)
    arcs: Counter[int] = Counter()
    for i, owner in enumerate(ring.owners):
        arcs[owner] += (ring.hashes[i] - ring.hashes[i - 1]) % 2**64
    assert 0.2 < surplus(arcs, 2**64, 1000) < 0.6
    # A tenth of it, to be quick: as many keys for each backend.
    rendezvous = Rendezvous(keys[:100])
    drawn = Counter(rendezvous.choose(xxh64_intdigest(b"%d" % key)) for key in range(6554))
    assert 0.2 < surplus(drawn, 6554, 100) < 0.6
