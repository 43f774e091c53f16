from __future__ import annotations

import sys
import threading
from collections import Counter
from typing import Any

import pytest

from meshlb.balancing import WeightedRoundRobin
from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT
from tests.balancing.fakes import FakeCandidate, build, candidates, pick, shares

SCHEDULERS = ("static_stride", "smooth", "edf")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_shares_are_the_weights(scheduler: Any) -> None:
    members = candidates(4, [1, 2, 3, 4])
    counts = shares(build(WeightedRoundRobin(scheduler), members), 1000)
    assert [counts[member] for member in members] == pytest.approx([100, 200, 300, 400], abs=2)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_clients_start_at_different_endpoints(scheduler: Any) -> None:
    members = candidates(4, [1, 2, 3, 4])
    first = Counter(pick(build(WeightedRoundRobin(scheduler), members, seed=seed)) for seed in range(400))
    assert set(first) == set(members)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_frequent_rebuilds_do_not_starve_the_light_ones(scheduler: Any) -> None:
    members = candidates(4, [1, 2, 3, 4])
    picker = build(WeightedRoundRobin(scheduler), members)
    counts: Counter[FakeCandidate] = Counter()
    for seed in range(2000):
        counts[pick(picker)] += 1
        picker = build(WeightedRoundRobin(scheduler), members, seed=seed, previous=picker)
    assert [counts[member] for member in members] == pytest.approx([200, 400, 600, 800], rel=0.3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_retry_goes_elsewhere_by_weight(scheduler: Any) -> None:
    members = candidates(3, [1, 1, 3])
    picker = build(WeightedRoundRobin(scheduler), members)
    counts = Counter(pick(picker, excluded={members[0]}) for _ in range(2000))
    assert counts[members[0]] == 0
    assert counts[members[2]] == pytest.approx(1500, abs=100)
    assert pick(picker, excluded=set(members[:2])) is members[2]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_none_one_and_all_excluded(scheduler: Any) -> None:
    assert build(WeightedRoundRobin(scheduler), []).pick(NO_CONTEXT) is None
    members = candidates(2, [1, 2])
    assert pick(build(WeightedRoundRobin(scheduler), members[:1])) is members[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_threads_lose_no_turn(scheduler: Any) -> None:
    members = candidates(4, [1, 2, 3, 4])
    picker = build(WeightedRoundRobin(scheduler), members)
    counts: list[Counter[FakeCandidate]] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=lambda: counts.append(shares(picker, 500))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    total = sum(counts, Counter())
    assert [total[member] for member in members] == pytest.approx([400, 800, 1200, 1600], abs=5)


def test_an_extreme_weight_is_clamped_by_stride_and_kept_by_the_others() -> None:
    members = candidates(2, [1, 1000])  # mean 500.5: the light one counts as 50.05
    assert shares(build(WeightedRoundRobin(), members), 10_500)[members[0]] == pytest.approx(500, abs=5)
    assert shares(build(WeightedRoundRobin("edf"), members), 10_010)[members[0]] == pytest.approx(10, abs=1)


@pytest.mark.parametrize("scheduler", ["random", None, 3])
def test_unknown_scheduler(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match=r"WeightedRoundRobin\.scheduler: .*'static_stride'"):
        WeightedRoundRobin(scheduler)
