"""Failure rate and slow-call rate, by the vectors of resilience4j and Linkerd."""

from __future__ import annotations

from random import Random

import pytest

from meshlb import Breaker
from meshlb.resilience import BreakerState, CircuitBreaker, Verdict

# resilience4j's own example: 50 %, four half-open calls, slow above 4 s at 50 %, TIME_BASED 20 s, at least 5 calls,
# out for 5 s
LIKE_RESILIENCE4J = Breaker(
    consecutive_failures=None,
    failure_rate=0.5,
    slow_call_duration=4.0,
    slow_call_rate=0.5,
    window=20.0,
    minimum_calls=5,
    open_time=5.0,
    jitter=0,
    half_open_calls=4,
)


class Driver:
    def __init__(self, options: Breaker, now: float = 1000.0) -> None:
        self.breaker = CircuitBreaker(options, Random(1))
        self.now = now

    def run(self, calls: str, seconds: float = 0.1) -> list[Verdict]:
        """S: success, F: failure, O: overload; each takes ``seconds``."""
        verdicts = []
        for call in calls:
            assert self.breaker.acquire(self.now)
            end = {"S": self.breaker.succeeded, "F": self.breaker.failed, "O": self.breaker.overloaded}[call]
            verdict = end(self.breaker.generation, self.now, self.now, seconds)
            if verdict is Verdict.TRIP:
                self.breaker.open(self.now, self.breaker.cause)
            verdicts.append(verdict)
        return verdicts

    @property
    def state(self) -> BreakerState:
        return self.breaker.state


def test_no_rate_before_enough_calls_and_a_success_may_complete_it() -> None:
    driver = Driver(LIKE_RESILIENCE4J)
    for call in "FFFS":
        driver.run(call)
        assert driver.breaker.rate(driver.now) is None
        assert driver.state is BreakerState.CLOSED
    assert driver.run("S") == [Verdict.TRIP]
    assert driver.breaker.reason == "failure rate 0.60 (3 of 5 calls)"
    assert not driver.breaker.acquire(driver.now)


def test_at_the_threshold_it_opens() -> None:
    driver = Driver(LIKE_RESILIENCE4J)
    driver.run("SSSFF")
    assert driver.breaker.rate(driver.now) == 0.4
    assert driver.state is BreakerState.CLOSED
    driver.now += 1
    assert driver.run("F") == [Verdict.TRIP]
    assert driver.breaker.reason == "failure rate 0.50 (3 of 6 calls)"


def test_slow_calls_open_it() -> None:
    driver = Driver(LIKE_RESILIENCE4J)
    for seconds in (5.0, 5.0, 0.1, 0.1):
        driver.run("S", seconds)
        assert driver.state is BreakerState.CLOSED
    driver.run("S", 5.0)
    assert driver.breaker.reason == "slow-call rate 0.60 (3 of 5 calls)"
    assert driver.state is BreakerState.OPEN


def test_exactly_at_the_duration_is_not_slow() -> None:
    driver = Driver(LIKE_RESILIENCE4J)
    driver.run("S" * 50, 4.0)
    assert driver.state is BreakerState.CLOSED


def test_half_open_lets_exactly_n_through_and_judges_them_by_their_rate() -> None:
    driver = Driver(LIKE_RESILIENCE4J)
    driver.run("FFFFF")
    assert not driver.breaker.poll(driver.now + 3)
    assert not driver.breaker.acquire(driver.now + 3)
    driver.now += 6
    assert driver.breaker.poll(driver.now)
    breaker, generation = driver.breaker, driver.breaker.generation
    assert [breaker.acquire(driver.now + number) for number in range(6)] == [True] * 4 + [False] * 2
    breaker.ignored(generation, driver.now)  # resilience4j's releasePermission: one more may try
    assert breaker.acquire(driver.now + 4)
    assert not breaker.acquire(driver.now + 5)
    assert breaker.failed(generation, driver.now + 1, driver.now) is Verdict.NOTHING
    assert breaker.failed(generation, driver.now + 2, driver.now) is Verdict.NOTHING
    assert not breaker.acquire(driver.now + 6)  # those that have ended count too
    assert breaker.succeeded(generation, driver.now + 3, driver.now) is Verdict.NOTHING
    assert breaker.failed(generation, driver.now + 4, driver.now) is Verdict.TRIP
    assert breaker.cause == "probes failed 0.75 (3 of 4 calls)"


@pytest.mark.parametrize(
    ("probes", "seconds", "state"),
    [("SSSF", 0.1, BreakerState.CLOSED), ("SSFF", 0.1, BreakerState.OPEN), ("SSSS", 5.0, BreakerState.OPEN)],
)
def test_the_probes_verdict(probes: str, seconds: float, state: BreakerState) -> None:
    driver = Driver(LIKE_RESILIENCE4J)
    driver.run("FFFFF")
    driver.now += 6
    driver.breaker.poll(driver.now)
    driver.run(probes, seconds)
    assert driver.state is state


# linkerd2-proxy: success_rate.rs
@pytest.mark.parametrize(
    ("minimum", "rate", "calls", "trips"),
    [
        (1, 1.0, "F", True),
        (4, 0.25, "SSS", False),
        (4, 0.25, "SSSF", True),
        (5, 0.5, "FFFF", False),
        (5, 0.5, "FFFFF", True),
    ],
)
def test_linkerd_minimum_requests(minimum: int, rate: float, calls: str, trips: bool) -> None:
    driver = Driver(Breaker(consecutive_failures=None, failure_rate=rate, minimum_calls=minimum, window=10))
    verdicts = driver.run(calls)
    assert Verdict.TRIP not in verdicts[:-1]
    assert (verdicts[-1] is Verdict.TRIP) is trips


def test_overload_counts_in_the_rate_and_never_in_a_row() -> None:
    driver = Driver(Breaker(consecutive_failures=2, failure_rate=0.5, minimum_calls=10))
    driver.run("OOOOOOOOO")
    assert (driver.state, driver.breaker.failures) == (BreakerState.CLOSED, 0)
    driver.run("O")
    assert driver.breaker.reason == "failure rate 1.00 (10 of 10 calls)"


def test_half_of_the_calls_failing_is_seen_however_they_are_mixed() -> None:
    by_row = Driver(Breaker(failure_rate=None))
    by_row.run("SF" * 500)
    assert by_row.state is BreakerState.CLOSED
    by_rate = Driver(Breaker())
    by_rate.run("SF" * 10)
    assert by_rate.state is BreakerState.OPEN


def test_the_window_starts_anew_when_it_closes() -> None:
    driver = Driver(Breaker(consecutive_failures=None, minimum_calls=4, jitter=0))
    driver.run("FFFF")
    driver.now += 2
    driver.breaker.poll(driver.now)
    assert driver.run("S") == [Verdict.CLOSED]
    assert driver.breaker.rate(driver.now) is None
    driver.run("FSSSSS")
    assert driver.state is BreakerState.CLOSED


def test_a_count_window_is_not_asked_for_more_calls_than_it_holds() -> None:
    driver = Driver(Breaker(consecutive_failures=None, window_calls=3, minimum_calls=100))
    assert driver.run("FFF")[-1] is Verdict.TRIP


def test_a_rate_that_a_float_cannot_hold_trips_where_it_says() -> None:
    driver = Driver(Breaker(consecutive_failures=None, failure_rate=0.07, minimum_calls=100))
    driver.run("S" * 93 + "F" * 6)
    assert driver.state is BreakerState.CLOSED
    driver.run("F")  # 7 of 100, and 0.07 * 100 > 7 in floats
    assert driver.state is BreakerState.OPEN
