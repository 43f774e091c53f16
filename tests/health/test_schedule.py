"""When checks begin: no burst, however many endpoints there are; nobody forgotten."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.health import TcpCheck
from meshlb.health.schedule import Schedule


class Simulation:
    """A loop that does what the monitor does, on a clock of its own: wakes when something is due, and checks."""

    def __init__(self, options: TcpCheck, *, seed: int = 1, took: float = 0.001, coarse: float = 0.001) -> None:
        self.schedule: Schedule[int] = Schedule(options, Random(seed))
        self.now = 100.0
        self.took = took
        self.coarse = coarse
        self.in_doubt: set[int] = set()
        self.idle = False
        self.starts: list[tuple[float, int]] = []

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            while (key := self.schedule.take(self.now)) is not None:
                self.starts.append((self.now, key))
                self.schedule.again(key, self.now, self.now + self.took, in_doubt=key in self.in_doubt, idle=self.idle)
            wait = self.schedule.wait(self.now)
            if wait is None or self.now + wait > until:
                self.now = until
                return
            self.now += max(wait, self.coarse)  # a timer is never early

    def most_in(self, window: float) -> int:
        times = [time for time, _ in self.starts]
        return max(bisect_left(times, time + window) - position for position, time in enumerate(times))

    def starts_of(self, key: int) -> list[float]:
        return [time for time, other in self.starts if other == key]


def test_ten_thousand_endpoints_are_spread_over_the_interval():
    simulation = Simulation(TcpCheck(interval=10, max_rate=2000, no_traffic_interval=None))
    simulation.schedule.add(range(10_000), simulation.now)
    simulation.run(60)
    counts = [len(simulation.starts_of(key)) for key in range(0, 10_000, 97)]
    assert min(counts) >= 5 and max(counts) <= 7
    # 1,000 a second on the average, and half as many again where the first round runs into the second.
    assert simulation.most_in(0.1) < 200
    assert simulation.most_in(1.0) < 1500


@pytest.mark.parametrize("rate", [100, 1000])
def test_the_agreed_rate_holds_even_if_all_fail(rate):
    simulation = Simulation(TcpCheck(interval=10, unhealthy_interval=2, max_rate=rate))
    simulation.schedule.add(range(10_000), simulation.now)
    simulation.in_doubt = set(range(10_000))
    simulation.run(60 if rate == 1000 else 210)
    for window in (0.01, 0.1, 1.0, 10.0):
        assert simulation.most_in(window) <= rate * (window + 0.05) + 1
    # And it is used: the checks come as fast as they may, in turn.
    assert simulation.most_in(10.0) >= rate * 10 * 0.95
    simulation.starts.clear()
    simulation.run(3 * 10_000 / rate)
    counts = [len(simulation.starts_of(key)) for key in range(0, 10_000, 97)]
    assert min(counts) >= 2 and max(counts) <= 4


def test_few_endpoints_are_checked_at_once_and_then_in_their_time():
    simulation = Simulation(TcpCheck(interval=10, jitter=0))
    simulation.schedule.add(range(3), simulation.now)
    simulation.run(40)
    for key in range(3):
        first, *others = simulation.starts_of(key)
        assert first - 100 <= 0.13
        assert others == pytest.approx([first + 10, first + 20, first + 30], abs=0.1)


def test_in_doubt_sooner_without_traffic_later():
    simulation = Simulation(TcpCheck(interval=10, unhealthy_interval=2, no_traffic_interval=60, jitter=0))
    simulation.schedule.add([1, 2], simulation.now)
    simulation.in_doubt = {1}
    simulation.run(21)
    assert (len(simulation.starts_of(1)), len(simulation.starts_of(2))) == (11, 3)
    simulation.idle = True
    simulation.starts.clear()
    simulation.run(180)
    assert len(simulation.starts_of(1)) <= 4 and len(simulation.starts_of(2)) <= 4
    simulation.idle = False
    simulation.starts.clear()
    simulation.schedule.hurry(simulation.now)
    simulation.run(11)
    assert simulation.starts_of(1) and simulation.starts_of(2)


def test_jitter_moves_clients_apart():
    pauses = []
    simulation = Simulation(TcpCheck(interval=10, jitter=0.1))
    simulation.schedule.add([1], simulation.now)
    simulation.run(2000)
    times = simulation.starts_of(1)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(pauses) >= 9 and max(pauses) <= 11.01
    assert sum(pauses) / len(pauses) == pytest.approx(10, abs=0.3)
    assert len({round(pause, 3) for pause in pauses}) > 50


def test_who_has_left_is_not_checked():
    schedule: Schedule[int] = Schedule(TcpCheck(interval=10), Random(1))
    assert schedule.wait(0.0) is None and schedule.take(0.0) is None
    schedule.add(range(5), 0.0)
    for key in (0, 2, 4):
        schedule.discard(key)
    schedule.discard(99)
    taken = []
    now = 0.0
    while (wait := schedule.wait(now)) is not None:
        now += wait
        taken.append(schedule.take(now))
    assert sorted(taken) == [1, 3] and len(schedule) == 0


@given(
    st.lists(st.tuples(st.sampled_from(["add", "discard", "run", "hurry", "doubt"]), st.integers(0, 30)), max_size=40),
    st.floats(1, 500),
    st.integers(0, 2**32),
)
def test_whatever_happens_the_rate_holds_and_everybody_gets_a_turn(steps, rate, seed):
    options = TcpCheck(interval=5, unhealthy_interval=1, max_rate=rate)
    simulation = Simulation(options, seed=seed)
    present: set[int] = set()
    for what, number in steps:
        if what == "add" and number not in present:
            present.add(number)
            simulation.schedule.add([number], simulation.now)
        elif what == "discard":
            present.discard(number)
            simulation.schedule.discard(number)
        elif what == "run":
            simulation.run(number)
        elif what == "hurry":
            simulation.schedule.hurry(simulation.now)
        elif what == "doubt":
            simulation.in_doubt ^= {number}
    assert len(simulation.schedule) == len(present)
    simulation.starts.clear()
    simulation.run(10 + 3 * len(present) / rate)
    assert {key for _, key in simulation.starts} == present
    if present:
        for window in (0.02, 0.5, 2.0):
            assert simulation.most_in(window) <= rate * (window + 0.05) + 1
