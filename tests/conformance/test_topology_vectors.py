"""Published vectors of priorities, panic, localities, zones and network coordinates. Each names its source."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from meshlb.balancing.edf import EdfScheduler
from meshlb.topology.coordinates import Coordinate, great_circle, round_trip_time
from meshlb.topology.priority import PriorityLevel, availability, priority_load
from meshlb.topology.zones import headroom_weights, locality_weight, zone_routing

# --- priority load and panic: envoy load_balancer_impl_test.cc (LoadBalancerBaseTest); levels are
# hosts, healthy, degraded, excluded


@pytest.mark.parametrize(
    ("levels", "load", "panic"),
    [
        ([(1, 1), (1, 1)], (100, 0), (False, False)),
        ([(2, 1), (2, 1)], (70, 30), (False, False)),
        ([(4, 1), (4, 1)], (50, 50), (True, True)),
        ([(4, 1, 0, 3), (5, 1)], (100, 0), (False, False)),
        ([(4, 0, 0, 4), (4, 1)], (50, 50), (True, True)),
        ([(1, 0), (1, 0)], (50, 50), (True, True)),
        ([(2, 1)] * 3, (70, 30, 0), (False, False, False)),
        ([(4, 1)] * 3, (35, 35, 30), (False, False, False)),
        ([(5, 1)] * 3, (34, 33, 33), (True, True, True)),
        ([(5, 0), (5, 0), (5, 5)], (0, 0, 100), (False, False, False)),
        ([(5, 0), (5, 0), (5, 4)], (0, 0, 100), (False, False, False)),
        ([(5, 0), (3, 0), (2, 0)], (50, 30, 20), (True, True, True)),
        ([(0, 0), (6, 0), (3, 0)], (0, 67, 33), (True, True, True)),
        ([(4, 1), (2, 2)], (35, 65), (False, False)),
        ([(4, 2), (4, 2)], (70, 30), (False, False)),
        # (0, 0, 40 %): 56 % are available in all, and no level reaches the threshold.
        ([(5, 0), (5, 0), (5, 2)], (34, 33, 33), (True, True, True)),
    ],
)
def test_envoy_priority_load(levels: list[tuple[int, ...]], load: tuple[int, ...], panic: tuple[bool, ...]) -> None:
    found = priority_load([PriorityLevel(*level) for level in levels])
    assert found.healthy == load
    assert found.degraded == (0,) * len(levels)
    assert found.panic == panic


def test_envoy_degraded_after_all_healthy() -> None:
    """``PriorityLoadTest``: a fully degraded P0, P1 with 2 healthy and 2 degraded of 5, P2 with 2 healthy of 5."""
    found = priority_load([PriorityLevel(5, 0, 5), PriorityLevel(5, 2, 2), PriorityLevel(5, 2)])
    assert (found.healthy, found.degraded) == ((0, 56, 44), (0, 0, 0))


def test_envoy_without_panic() -> None:
    """``PriorityLoadWithPanicDisabled``: threshold 0; healthy and degraded hosts."""
    degraded = [PriorityLevel(5, 0), PriorityLevel(5, 0, 2), PriorityLevel(5, 0, 1)]
    found = priority_load(degraded, panic_threshold=0)
    assert (found.healthy, found.degraded, found.panic) == ((0, 0, 0), (0, 67, 33), (False,) * 3)
    healthy = [PriorityLevel(5, 0), PriorityLevel(5, 2), PriorityLevel(5, 1)]
    assert priority_load(healthy, panic_threshold=0).healthy == (0, 67, 33)
    # Nobody at all: to the first level, which has nobody to give it to.
    assert priority_load([PriorityLevel(5, 0)] * 2, panic_threshold=0).healthy == (100, 0)


def test_envoy_overprovisioning() -> None:
    """``OverrideOverprovisioningFactor``."""
    levels = [PriorityLevel(4, 2)] * 2
    assert priority_load(levels).healthy == (70, 30)
    assert priority_load(levels, overprovisioning=100).healthy == (50, 50)
    assert availability(71, 100) == 99
    assert availability(72, 100) == 100


@pytest.mark.parametrize(
    ("percents", "load"),
    [
        ((100, 100), (100, 0)),
        ((72, 72), (100, 0)),
        ((71, 71), (99, 1)),
        ((50, 50), (70, 30)),
        ((25, 100), (35, 65)),
        ((25, 25), (50, 50)),
        ((50, 60), (70, 30)),
        # The page prints 7/93 and 36/36/28; what rounding leaves goes to the first level, and the last is all panic.
        ((5, 65), (8, 92)),
        ((25, 25, 20), (34, 33, 33)),
    ],
)
def test_envoy_docs_priority_table(percents: tuple[int, ...], load: tuple[int, ...]) -> None:
    """``priority.rst``, as the code has it."""
    assert priority_load([PriorityLevel(100, percent) for percent in percents]).healthy == load


# --- localities


@pytest.mark.parametrize(
    ("healthy", "picks"), [(5, (33, 67)), (4, (33, 67)), (3, (29, 71)), (2, (22, 78)), (1, (12, 88)), (0, (0, 100))]
)
def test_g30_envoy_locality_edf(healthy: int, picks: tuple[int, int]) -> None:
    """``locality_wrr_test.cc``: weights 1 and 2, 5 hosts each, of the first one ``healthy``; 100 picks by EDF."""
    scheduler: EdfScheduler[int] = EdfScheduler()
    weights = [locality_weight(1, healthy, 5), locality_weight(2, 5, 5)]
    for locality, weight in enumerate(weights):
        if weight:
            scheduler.add(weight, locality)
    counts: Counter[int] = Counter()
    for _ in range(100):
        counts[scheduler.pick(weights.__getitem__)] += 1
    assert (counts[0], counts[1]) == picks


@pytest.mark.parametrize(
    ("percent", "share"), [(100, 33.33), (70, 32.89), (69, 32.57), (50, 25.93), (25, 14.89), (0, 0.0)]
)
def test_g32_envoy_docs_locality_table(percent: int, share: float) -> None:
    """``locality_weight.rst``: weights 1 and 2; it prints 33, 33, 33, 26, 15, 0."""
    weights = [locality_weight(1, percent, 100), locality_weight(2, 100, 100)]
    assert round(100 * weights[0] / sum(weights), 2) == share
    assert locality_weight(1, 0, 0) == 0.0


def test_g33_envoy_zone_residual_capacity() -> None:
    """Zone-aware tests of ``load_balancer_impl_test.cc``: callers A2 B2 C1 D1, endpoints A1 C3 D3 E1."""
    routing = zone_routing({"A": 2, "B": 2, "C": 1, "D": 1}, {"A": 1, "C": 3, "D": 3, "E": 1}, "A")
    assert routing is not None
    assert routing.local == 3750
    assert routing.cumulative == (0, 2084, 4168, 5418)
    assert sum(routing.shares().values()) == pytest.approx(1.0)


def test_envoy_zone_comment() -> None:
    """The example in ``regenerateLocalityRoutingStructures``: callers 40, 40, 20 %, endpoints 25, 50, 25 %."""
    routing = zone_routing({"a": 4, "b": 4, "c": 2}, {"a": 5, "b": 10, "c": 5}, "a")
    assert routing is not None
    assert routing.local == 6250
    assert routing.cumulative == (0, 1000, 1500)


def test_envoy_zone_early_exits() -> None:
    """``NoZoneAwareRouting...`` and the settings' limits: zones are ignored."""
    even = {"a": 3, "b": 3}
    assert zone_routing(even, even, "a") is not None
    assert zone_routing(even, {"a": 2, "b": 3}, "a") is None  # fewer than min_cluster_size
    assert zone_routing(even, {"a": 2, "b": 3}, "a", min_cluster_size=5) is not None
    assert zone_routing(even, {"a": 6}, "a") is None  # one zone
    assert zone_routing({"a": 6}, even, "a") is None
    assert zone_routing(even, {"b": 3, "c": 3}, "a") is None  # nobody here
    assert zone_routing({"b": 3, "c": 3}, even, "a") is None  # we are not known
    assert zone_routing({}, even, "a") is None
    all_stay = zone_routing(even, {"a": 4, "b": 3}, "a")  # at least our share of the endpoints is here
    assert all_stay is not None
    assert all_stay.shares() == {"a": 1.0, "b": 0.0}
    forced = zone_routing({}, {"a": 1, "b": 9}, "a", force_local=True)
    assert forced is not None
    assert forced.shares() == {"a": 1.0, "b": 0.0}


def test_g36_envoy_load_aware_locality() -> None:
    """Load-aware locality, documentation: 10 hosts each, utilization 0.7, 0.3, 0.4 (printed as 19, 44, 37)."""
    weights = headroom_weights([10, 10, 10], [0.7, 0.3, 0.4])
    assert [100 * weight / sum(weights) for weight in weights] == pytest.approx([18.75, 43.75, 37.5])
    assert headroom_weights([10], [1.5]) == [0.0]


# --- network coordinates


def test_g64_serf_distance() -> None:
    """serf ``coordinate_test.go``, ``TestCoordinate_DistanceTo``."""
    one, other = (-0.5, 1.3, 2.4), (1.2, -2.3, 3.4)
    plain = round_trip_time(Coordinate(one), Coordinate(other))
    assert plain == pytest.approx(4.104875150354758, abs=1e-12)
    assert round_trip_time(Coordinate(one), Coordinate(one)) == 0.0
    # A negative adjustment that would make it negative is ignored.
    assert round_trip_time(Coordinate(one, adjustment=-1e6), Coordinate(other)) == plain
    adjusted = round_trip_time(Coordinate(one, adjustment=0.1), Coordinate(other, adjustment=0.2))
    assert adjusted == pytest.approx(plain + 0.3)
    high = round_trip_time(Coordinate(one, 0.7, 0.1), Coordinate(other, 0.1, 0.2))
    assert high == pytest.approx(plain + 0.3 + 0.8)


def test_g66_consul_distance() -> None:
    """consul ``lib/rtt_test.go``: 10 ms, 2 ms, and a missing coordinate."""

    def at(seconds: float) -> Coordinate:  # GenerateCoordinate
        return Coordinate((seconds, *[0.0] * 7))

    assert round_trip_time(at(0.0), at(0.010)) == pytest.approx(0.010)
    assert round_trip_time(at(0.010), at(0.0)) == pytest.approx(0.010)
    assert round_trip_time(at(0.008), at(0.010)) == pytest.approx(0.002)
    assert round_trip_time(at(0.0), None) == math.inf
    assert round_trip_time(None, at(0.0)) == math.inf


@pytest.mark.parametrize(
    "odd",
    [Coordinate(()), Coordinate((0.1,) * 4), Coordinate((math.nan, *[0.0] * 7)), Coordinate((0.1,) * 8, math.inf)],
)
def test_serf_incompatible_coordinates(odd: Coordinate) -> None:
    """serf panics on another number of dimensions (``TestCoordinate_DistanceTo``); here it is infinitely far."""
    assert round_trip_time(Coordinate((0.0,) * 8), odd) == math.inf
    assert round_trip_time(odd, Coordinate((0.0,) * 8)) == math.inf


@pytest.mark.parametrize(
    ("one", "other", "kilometres"),
    [
        ((52.52, 13.405), (48.8566, 2.3522), 877),  # Berlin, Paris
        ((40.7128, -74.0060), (51.5074, -0.1278), 5570),  # New York, London
        ((0.0, 179.5), (0.0, -179.5), 111),  # over the date line
        ((90.0, 0.0), (-90.0, 0.0), 20015),  # pole to pole
    ],
)
def test_great_circle(one: tuple[float, float], other: tuple[float, float], kilometres: int) -> None:
    """Known distances, within a kilometre."""
    assert great_circle(one, other) == pytest.approx(kilometres, abs=1)
    assert great_circle(other, one) == great_circle(one, other)
