"""The rules of the Prequal paper (NSDI 2024, sections 4 and 5), as pure functions."""

from __future__ import annotations

import math

import pytest

from meshlb.balancing.probe_pool import (
    DEFAULT_QUANTILE,
    Probe,
    ProbePool,
    choose_probe,
    hot_threshold,
    reuse_bound,
    worst_probe,
)


def probes(*values: tuple[float, float]) -> list[Probe[int]]:
    return [Probe(i, in_flight, latency, 0.0, 1) for i, (in_flight, latency) in enumerate(values)]


def test_the_default_quantile_is_the_papers() -> None:
    assert pytest.approx(0.8409, abs=1e-4) == DEFAULT_QUANTILE


@pytest.mark.parametrize(
    ("quantile", "threshold"), [(0.0, -math.inf), (0.25, 1), (0.5, 2), (0.51, 3), (2**-0.25, 4), (1.0, 4)]
)
def test_hot_threshold(quantile: float, threshold: float) -> None:
    assert hot_threshold([4, 1, 3, 2], quantile) == threshold


def test_the_cold_one_with_the_lowest_latency_wins_however_fast_the_hot_one_is() -> None:
    pool = probes((1, 0.5), (2, 0.2), (3, 0.3), (9, 0.01))
    assert choose_probe(pool, 0.75).replica == 1
    assert worst_probe(pool, 0.75).replica == 3


def test_when_all_are_hot_the_fewest_in_flight_win() -> None:
    pool = probes((3, 0.01), (2, 0.9), (7, 0.001))
    assert choose_probe(pool, 0.0).replica == 1


def test_quantile_one_is_latency_only() -> None:
    pool = probes((3, 0.1), (2, 0.9), (700, 0.001))
    assert choose_probe(pool, 1.0).replica == 2
    assert worst_probe(pool, 1.0).replica == 1


def test_reuse_bound() -> None:
    assert reuse_bound(16, 100, 3.0, 1.0) == pytest.approx(2 / (0.84 * 3 - 1))
    assert reuse_bound(16, 10_000, 10.0, 0.0) == 1.0
    assert reuse_bound(16, 16, 3.0, 0.0) == reuse_bound(16, 100, 1.0, 1.0) == 16.0  # no surplus: the cap


def test_a_burst_does_not_all_go_to_one_replica() -> None:
    pool: ProbePool[int] = ProbePool(lambda: 0.0, quantile=0.5)
    for replica, latency in ((1, 0.010), (2, 0.011), (3, 0.012), (4, 0.013)):
        pool.add(replica, 0, latency, 0.0, reuse=10)
    picked = [pool.choose(0.0) for _ in range(8)]
    assert len(set(picked)) >= 3
    assert max(picked.count(replica) for replica in set(picked)) <= 3


def test_probes_age_and_are_used_up_and_pushed_out() -> None:
    pool: ProbePool[str] = ProbePool(lambda: 0.9, size=3, max_age=1.0)
    assert pool.choose(0.0) is None
    pool.add("a", 0, 0.1, 0.0)
    assert pool.choose(0.0) is None  # one probe is no choice
    pool.add("b", 0, 0.2, 0.5)
    assert pool.choose(1.0) == "a"
    assert [probe.replica for probe in pool.probes] == ["b"]
    pool.add("c", 0, 0.2, 1.4)
    assert pool.choose(1.6) is None  # b is 1.1 s old
    for replica in "defg":
        pool.add(replica, 0, 0.2, 1.6)
    assert [probe.replica for probe in pool.probes] == ["e", "f", "g"]


def test_removal_takes_turns_between_the_oldest_and_the_worst() -> None:
    pool: ProbePool[str] = ProbePool(lambda: 0.9, quantile=0.5)
    for replica, in_flight in (("a", 1), ("b", 9), ("c", 2), ("d", 3)):
        pool.add(replica, in_flight, 0.1, 0.0)
    pool.remove(0.5)  # 0.9 is not below 0.5: none this time
    assert len(pool.probes) == 4
    pool.remove(1.0)
    assert [probe.replica for probe in pool.probes] == ["b", "c", "d"]
    pool.remove(1.0)
    assert [probe.replica for probe in pool.probes] == ["c", "d"]
    pool.remove(5.0)
    assert pool.probes == []
