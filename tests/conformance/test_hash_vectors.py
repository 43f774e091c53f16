"""Published vectors of the consistent hashes and of bounded loads. Each names its source."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from xxhash import xxh64_intdigest

from meshlb.balancing.bounded_load import envoy_slots, haproxy_slots, probe_order, total_slots
from meshlb.balancing.maglev import Maglev, fill, weighted_turns
from meshlb.balancing.ring import KetamaRing

HOSTS = [f"127.0.0.1:{port}" for port in range(90, 96)]


# --- Maglev: envoy maglev_lb_test.cc


def test_envoy_maglev_basic() -> None:
    """G46."""
    assert Maglev(HOSTS, table_size=7).table == [2, 4, 0, 1, 5, 0, 3]


def test_envoy_maglev_does_not_depend_on_the_order_of_hosts() -> None:
    turned = Maglev(HOSTS[::-1], table_size=7)
    assert [HOSTS[::-1][i] for i in turned.table] == [HOSTS[i] for i in (2, 4, 0, 1, 5, 0, 3)]


def test_envoy_maglev_weighted() -> None:
    """G48 and G49: weights 1:2 and 1:1 over 17 slots."""
    assert Maglev(HOSTS[:2], [1, 2], table_size=17).table == [1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1]
    equal = [1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert Maglev(HOSTS[:2], [1, 1], table_size=17).table == equal
    assert Maglev(HOSTS[:2], table_size=17).table == equal


def test_envoy_maglev_weighted_share_of_a_full_table() -> None:
    """G51."""
    assert Counter(Maglev(HOSTS[:2], [1, 2]).table) == {0: 21846, 1: 43691}


def test_envoy_maglev_retry_looks_elsewhere() -> None:
    """maglev_lb.cc ``chooseHost``: hash ^= ~0 - attempt + 1."""
    maglev = Maglev(HOSTS, table_size=7)
    for attempt in range(1, 4):
        assert maglev.choose(3, attempt) == maglev.table[(3 ^ (2**64 - attempt)) % 7]
    assert [maglev.choose(hash) for hash in range(14)] == maglev.table * 2


def test_maglev_paper_table_1() -> None:
    """G54, NSDI 2016: three backends over 7 slots, before and after B2 leaves."""
    assert fill([(3, 4), (0, 2), (3, 1)], [], 7) == [1, 0, 1, 0, 2, 2, 0]
    assert fill([(3, 4), (3, 1)], [], 7) == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_weighted_turns_are_those_of_the_plain_loop(seed: int) -> None:
    """Envoy's loop asks every host in every round; ours works the round out. The turns must be the same."""
    random = Random(seed)
    raw = [random.choice([1, 2, 3, 7, 100, 0.3, 1e-3]) for _ in range(random.randrange(1, 12))]
    weights = [weight / sum(raw) for weight in raw]
    expected: list[int] = []
    targets = [0.0] * len(weights)
    iteration = 0
    while len(expected) < 3000:
        iteration += 1
        for i, weight in enumerate(weights):
            if iteration * weight >= targets[i]:
                targets[i] += max(weights)
                expected.append(i)
    turns = weighted_turns(weights)
    assert [next(turns) for _ in range(3000)] == expected[:3000]


# --- ring: envoy ring_hash_lb_test.cc


RING = [
    (833437586790550860, 94), (928266305478181108, 92), (1033482794131418490, 90), (3551244743356806947, 95),
    (3851675632748031481, 93), (5583722120771150861, 91), (6311230543546372928, 91), (7700377290971790572, 93),
    (13144177310400110813, 95), (13444792449719432967, 92), (15516499411664133160, 94), (16117243373044804889, 90),
]  # fmt: skip


def test_envoy_ring() -> None:
    """G52: min 12, six equal hosts."""
    ring = KetamaRing(HOSTS, min_size=12)
    assert list(zip(ring.hashes, [90 + owner for owner in ring.owners], strict=True)) == RING


def test_envoy_ring_choices_and_attempts() -> None:
    """ring_hash_lb_test.cc ``Basic``: first point not before the hash, wrapping; a retry one point further."""
    ring = KetamaRing(HOSTS, min_size=12)
    ports = [port for _, port in RING]
    for i, (position, port) in enumerate(RING):
        assert 90 + ring.choose(position) == port
        assert 90 + ring.choose(position + 1) == ports[(i + 1) % 12]
        assert 90 + ring.choose(position, 1) == ports[(i + 1) % 12]
        assert 90 + ring.choose(position, 2) == ports[(i + 2) % 12]
    assert 90 + ring.choose(0) == 94
    assert 90 + ring.choose(2**64 - 1) == 94


def test_grpc_ring_does_not_depend_on_the_order_of_endpoints() -> None:
    """gRPC sorts by key before it hands out the points; with fractions of points the order would matter."""
    weights = [1.0, 1.7, 2.3, 1.1, 3.9, 1.3]
    ring = KetamaRing(HOSTS, weights, min_size=64, max_size=70)
    turned = KetamaRing(HOSTS[::-1], weights[::-1], min_size=64, max_size=70)
    assert turned.hashes == ring.hashes
    assert [5 - owner for owner in turned.owners] == ring.owners


@pytest.mark.parametrize(
    ("weights", "minimum", "maximum", "points"),
    [
        ([1, 2], 3, 8_388_608, [1, 2]),  # HostWeightedTinyRing in small
        ([1, 2, 3], 6, 8_388_608, [1, 2, 3]),
        ([1, 2, 3], 1024, 8_388_608, [171, 342, 513]),  # the lightest: ceil(1024 / 6) whole points
        ([85, 85, 1], 4, 10, None),  # the maximum wins: ten points in all, the lightest may get none
    ],
)
def test_envoy_ring_sizes(weights: list[float], minimum: int, maximum: int, points: list[int] | None) -> None:
    ring = KetamaRing(HOSTS[: len(weights)], weights, min_size=minimum, max_size=maximum)
    counts = Counter(ring.owners)
    if points is None:
        assert len(ring.owners) == maximum
    else:
        assert [counts[i] for i in range(len(weights))] == points


def test_a_key_with_several_points_is_named_by_its_number() -> None:
    ring = KetamaRing(["a", "b", "c"], [3, 3, 4], min_size=10)
    assert sorted(ring.hashes) == sorted(
        xxh64_intdigest(f"{key}_{k}".encode()) for key, points in (("a", 3), ("b", 3), ("c", 4)) for k in range(points)
    )
    assert ring.hashes[0] == 4148279810343392165  # not what the comment in grpc-go's ring.go lists


# --- bounded loads


@pytest.mark.parametrize(("seed", "order"), [(2, [2, 1, 0, 4, 3]), (6, [4, 0, 2, 3, 1]), (7, [0, 1, 4, 3, 2])])
def test_envoy_bounded_load_probe_order(seed: int, order: list[int]) -> None:
    """G55, envoy load_balancing_policies/common bounded load test, n = 5 (mt19937)."""
    assert list(probe_order(seed, 5)) == order
    assert list(probe_order(seed + 2**32, 5)) == order  # mt19937 takes the low 32 bits


def test_slots() -> None:
    """G56: 9 calls in flight."""
    assert envoy_slots(9, [0.25] * 4, 150) == [4, 4, 4, 4]
    assert haproxy_slots(9, [1, 1, 1, 1], 150) == [3, 4, 4, 4]
    assert haproxy_slots(9, [1, 2, 3], 125) == [2, 4, 7]
    assert (total_slots(0, 100), total_slots(9, 125), total_slots(99, 125)) == (1, 13, 125)
    assert haproxy_slots(0, [1, 1, 1], 100) == [1, 1, 1]
