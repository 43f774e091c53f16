"""Published vectors of the weighted round robin family. Each table names its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from meshlb.balancing.edf import EdfScheduler
from meshlb.balancing.smooth import SmoothWeighted
from meshlb.balancing.static_stride import StaticStride

JAVA_START = -1155484576 & 0xFFFFFFFF
"""``new Random(0).nextInt()`` as the unsigned number that grpc-java's scheduler counts with."""


class Recorder(Iterator[int]):
    """A counter whose next value can be read, as grpc-java's tests read their AtomicInteger."""

    def __init__(self, start: int) -> None:
        self.value = start

    def __next__(self) -> int:
        self.value += 1
        return self.value - 1


def indexed(weights: list[float], picks: int) -> tuple[EdfScheduler[int], list[int]]:
    scheduler = EdfScheduler.with_picks(range(len(weights)), weights.__getitem__, 0)
    return scheduler, [scheduler.pick(weights.__getitem__) for _ in range(picks)]


# --- smooth weighted round robin


def test_nginx_commit_message_5_1_1() -> None:
    """G1, nginx commit 52327e0627f4: the sequence and the state after each pick."""
    scheduler = SmoothWeighted([5, 1, 1])
    picked, states = "", []
    for _ in range(7):
        picked += "abc"[scheduler.pick()]
        states.append(tuple(scheduler.current))
    assert picked == "aabacaa"
    assert states == [(-2, 1, 1), (-4, 2, 2), (1, -4, 3), (-1, -3, 4), (4, -2, -2), (2, -1, -1), (0, 0, 0)]


def test_kitex_10_20_30() -> None:
    """G2, kitex pkg/loadbalance/weighted_round_robin_test.go."""
    scheduler = SmoothWeighted([10, 20, 30])
    assert Counter(scheduler.pick() for _ in range(3000)) == {0: 500, 1: 1000, 2: 1500}


# --- earliest deadline first


def test_envoy_round_robin_weighted() -> None:
    """G3 and G4, envoy round_robin_lb_test.cc ``Weighted``: 1,2 and then 2,1 without a rebuild."""
    weights = [1.0, 2.0]
    scheduler, picks = indexed(weights, 6)
    assert picks == [1, 0, 1, 1, 0, 1]
    weights[:] = [2.0, 1.0]
    assert [scheduler.pick(weights.__getitem__) for _ in range(8)] == [1, 0, 0, 1, 0, 0, 1, 0]


def test_envoy_edf_weighted() -> None:
    """G7, envoy edf_scheduler_test.cc: weights 1 to 128, one full cycle."""
    weights = [float(i) for i in range(1, 129)]
    _, picks = indexed(weights, 128 * 129 // 2)
    assert Counter(picks) == {i: i + 1 for i in range(128)}
    by_hand: EdfScheduler[int] = EdfScheduler()
    for i, weight in enumerate(weights):
        by_hand.add(weight, i)
    assert Counter(by_hand.pick(weights.__getitem__) for _ in range(128 * 129 // 2)) == {i: i + 1 for i in range(128)}


def test_envoy_edf_unweighted_is_first_in_first_out() -> None:
    """edf_scheduler_test.cc ``Unweighted``."""
    _, picks = indexed([1.0] * 128, 256)
    assert picks == [*range(128), *range(128)]


def test_envoy_first_picks_over_seeds() -> None:
    """G8, envoy round_robin_lb_test.cc ``WeightedInitializationPicksAllHosts``: 6,3,1 over ten seeds."""
    weights = [6.0, 3.0, 1.0]
    first = Counter(
        EdfScheduler.with_picks(range(3), weights.__getitem__, seed).pick(weights.__getitem__) for seed in range(10)
    )
    assert first == {0: 6, 1: 3, 2: 1}


@pytest.mark.parametrize("seed", range(30))
def test_envoy_emulated_picks_are_real_picks(seed: int) -> None:
    """edf_scheduler_test.cc: after P emulated picks it goes on as after P real ones."""
    random = Random(seed)
    weights = [float(random.randrange(1, 100)) for _ in range(random.randrange(1, 30))]
    picks = random.randrange(0, 1000)
    emulated = EdfScheduler.with_picks(range(len(weights)), weights.__getitem__, picks)
    total = Counter(emulated.pick(weights.__getitem__) for _ in range(500))
    real, _ = indexed(weights, picks)
    expected = Counter(real.pick(weights.__getitem__) for _ in range(500))
    assert all(abs(total[i] - expected[i]) <= 1 for i in range(len(weights)))


def test_envoy_weighted_least_request() -> None:
    """G19, envoy least_request_lb_test.cc: weights 1,2 with w / (active + 1), idle."""
    weights, active = [1.0, 2.0], [0, 0]
    scheduler = EdfScheduler.with_picks(range(2), lambda i: weights[i] / (active[i] + 1), 0)
    assert [scheduler.pick(lambda i: weights[i] / (active[i] + 1)) for _ in range(6)] == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(("factor", "expected"), [(0.2, [0, 0, 0, 0, 1]), ((20 / 60), [0, 0, 1])])
def test_envoy_slow_start_picks(factor: float, expected: list[int]) -> None:
    """G23, G24, envoy round_robin slow start tests: a ready host 0 and host 1 at 12 s and 20 s of 60 s."""
    weights = [1.0, factor]
    scheduler = EdfScheduler.with_picks(range(2), weights.__getitem__, 0)
    assert [scheduler.pick(weights.__getitem__) for _ in expected] == expected


# --- static stride: grpc-java WeightedRoundRobinLoadBalancerTest.java


def test_grpc_deterministic_picks() -> None:
    """G11 ``testDeterministicPicks``: scaled weights, picks, and the counter after each."""
    turn = Recorder(0)
    stride = StaticStride([2, 3, 6], turn)
    assert stride.scaled == [21845, 32768, 65535]
    picks, counters = [], []
    for _ in range(6):
        picks.append(stride.pick())
        counters.append(turn.value)
    assert picks == [1, 2, 2, 0, 1, 2]
    assert counters == [2, 3, 6, 7, 8, 9]


def test_grpc_picks_in_proportion() -> None:
    """G13: weights 1,2,3 from Java's first random start."""
    stride = StaticStride([1, 2, 3], JAVA_START)
    assert Counter(stride.pick() for _ in range(6)) == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize("weights", [[1, 1, 1], [0, 0, 0], [-1, 0, -5], [7, 0, 0]])
def test_grpc_equal_or_unknown_weights_are_round_robin(weights: list[float]) -> None:
    """G15: equal and all unknown; and with one known the others count as it."""
    stride = StaticStride(weights, JAVA_START)
    assert Counter(stride.pick() for _ in range(6)) == {0: 2, 1: 2, 2: 2}


def test_grpc_shares_of_uneven_weights() -> None:
    """G18: 1000 picks, each share within 0.002."""
    weights = [1.3, 2.5, 3.23, 4.11, 7.001]
    stride = StaticStride(weights, JAVA_START)
    counts = Counter(stride.pick() for _ in range(1000))
    assert [counts[i] / 1000 for i in range(5)] == pytest.approx([w / sum(weights) for w in weights], abs=0.002)


def test_grpc_clamps() -> None:
    """No more than 10 times and no less than a tenth of the mean."""
    assert StaticStride([81.0, *[1.0] * 9]).scaled == [65535, *[809] * 9]  # mean 9: floor 0.9, below 1
    assert StaticStride([1.0, *[1000.0] * 3]).scaled[0] == 4917  # mean 750.25: a tenth of it, rounded up
    top = StaticStride([1000.0, *[1.0] * 99]).scaled  # mean 10.99: ceiling 109.9
    assert (top[0], top[1]) == (65535, 656)  # and the floor of 1.099 lifts the 1.0


def test_grpc_java_comment_is_not_a_vector() -> None:
    """The comment's {0,1,2,2,1,2,0,2,1,2,2} has no offset; the code from generation 0 starts 1 2 2 0 1 2."""
    stride = StaticStride([2, 3, 6])
    assert [stride.pick() for _ in range(6)] != [0, 1, 2, 2, 1, 2]
