"""The state machine alone. What its endpoint does with it: tests/core/test_node.py."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import Breaker, ConfigError
from meshlb.resilience import BreakerState, CircuitBreaker, Verdict

STEADY = Breaker(consecutive_failures=3, failure_rate=None, open_time=5, max_open_time=300, jitter=0)


class Driver:
    """Begins attempts and ends them, as an endpoint does."""

    def __init__(self, options: Breaker, random: Random | None = None) -> None:
        self.breaker = CircuitBreaker(options, random or Random(1))
        self.now = 0.0

    def begin(self) -> tuple[int, float] | None:
        self.now += 0.001
        return (self.breaker.generation, self.now) if self.breaker.acquire(self.now) else None

    def fail(self, attempt: tuple[int, float] | None = None) -> float:
        attempt = attempt or self.begin()
        assert attempt is not None
        trips = self.breaker.failed(*attempt, self.now) is Verdict.TRIP
        return self.breaker.open(self.now, "test") if trips else 0.0

    def succeed(self, attempt: tuple[int, float] | None = None) -> bool:
        attempt = attempt or self.begin()
        assert attempt is not None
        verdict = self.breaker.succeeded(*attempt, self.now)
        if verdict is Verdict.TRIP:
            self.breaker.open(self.now, "test")
        return verdict is Verdict.CLOSED

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.breaker.poll(self.now)


def open_one(options: Breaker) -> Driver:
    driver = Driver(options)
    while driver.breaker.state is BreakerState.CLOSED:
        driver.fail()
    return driver


def test_finagle_consecutive_failures_open_it_for_its_time() -> None:
    driver = Driver(STEADY)
    assert [driver.fail(), driver.fail(), driver.fail()] == [0.0, 0.0, 5.0]
    assert driver.breaker.state is BreakerState.OPEN
    assert driver.breaker.reason == "test"


def test_finagle_a_success_starts_the_count_again() -> None:
    driver = Driver(STEADY)
    assert [driver.fail(), driver.fail(), driver.succeed(), driver.fail(), driver.fail()] == [0, 0, False, 0, 0]
    assert driver.fail() == 5.0


def test_linkerd_one_failure_trips_where_one_is_enough() -> None:
    assert Driver(Breaker(consecutive_failures=1, jitter=0)).fail() == 1.0


def test_open_refuses_until_its_time_is_up() -> None:
    driver = open_one(STEADY)
    assert driver.begin() is None
    assert not driver.wait(4.9)
    assert driver.begin() is None
    assert driver.wait(0.2)
    assert driver.breaker.state is BreakerState.HALF_OPEN
    assert driver.begin() is not None


def test_resilience4j_exactly_n_probes_and_a_released_place_is_given_out_again() -> None:
    driver = open_one(Breaker(half_open_calls=4, jitter=0))
    driver.wait(2)
    probes = [driver.begin() for _ in range(6)]
    assert [probe is not None for probe in probes] == [True] * 4 + [False] * 2
    assert probes[1] is not None
    driver.breaker.ignored(*probes[1])
    assert driver.begin() is not None
    assert driver.begin() is None


def test_as_many_successes_as_probes_close_it() -> None:
    driver = open_one(Breaker(half_open_calls=3, jitter=0))
    driver.wait(2)
    assert [driver.succeed(), driver.succeed(), driver.succeed()] == [False, False, True]
    assert driver.breaker.state is BreakerState.CLOSED
    assert driver.breaker.failures == 0
    assert driver.breaker.reason == ""


def test_a_failed_probe_opens_it_again_for_twice_as_long_up_to_the_maximum() -> None:
    driver = open_one(Breaker(open_time=1, max_open_time=5, jitter=0))
    durations = []
    for _ in range(4):
        driver.wait(10)
        durations.append(driver.fail())
    assert durations == [2.0, 4.0, 5.0, 5.0]
    driver.wait(10)
    assert driver.succeed()


def fail_until_open(driver: Driver) -> float:
    while not (duration := driver.fail()):
        pass
    return duration


def test_good_time_takes_the_growth_back_step_by_step() -> None:
    driver = open_one(Breaker(open_time=1, max_open_time=60, jitter=0, decay_time=10))
    for expected in (2.0, 4.0, 8.0):
        driver.wait(10)
        assert driver.fail() == expected
    driver.wait(10)
    assert driver.succeed()  # back, after four openings
    assert fail_until_open(driver) == 16.0  # and out again at once
    driver.wait(20)
    assert driver.succeed()
    driver.now += 25  # five openings, two steps taken back
    assert fail_until_open(driver) == 8.0
    driver.wait(20)
    assert driver.succeed()
    driver.now += 1e6
    assert fail_until_open(driver) == 1.0  # a long good time forgives everything


def test_by_hand_it_stays_as_it_was_set() -> None:
    driver = Driver(STEADY)
    before = driver.begin()
    driver.breaker.force_open("migration")
    assert (driver.breaker.is_open, driver.breaker.reason) == (True, "opened by hand: migration")
    assert not driver.wait(1e6)
    assert not driver.breaker.probe_now(driver.now)
    assert driver.begin() is None
    driver.breaker.close(driver.now)
    assert driver.fail(before) == 0.0
    assert driver.breaker.failures == 0  # what began before has no say
    driver.breaker.disable("")
    assert driver.breaker.reason == "breaker disabled by hand"
    assert [driver.fail() for _ in range(50)] == [0.0] * 50
    assert (driver.breaker.lets_all_through, driver.breaker.failures) == (True, 0)
    driver.breaker.close(driver.now)
    assert [driver.fail(), driver.fail(), driver.fail()] == [0, 0, 5.0]


def test_a_reset_forgets_the_growth_and_closing_does_not() -> None:
    for forget, duration in ((False, 10.0), (True, 5.0)):
        driver = open_one(STEADY)
        if forget:
            driver.breaker.reset(driver.now)
        else:
            driver.breaker.close(driver.now)
        assert driver.breaker.state is BreakerState.CLOSED
        assert fail_until_open(driver) == duration


def test_a_thousand_failed_probes_do_not_overflow() -> None:
    driver = open_one(Breaker(open_time=1, max_open_time=5, jitter=0))
    for _ in range(1200):
        driver.wait(10)
        driver.fail()
    assert driver.breaker.state is BreakerState.OPEN


def test_what_began_before_a_change_of_state_has_no_say_after_it() -> None:
    driver = Driver(STEADY)
    old = [driver.begin() for _ in range(4)]
    for _ in range(3):
        driver.fail()
    assert driver.fail(old[0]) == 0.0  # open: a late failure does not open it again
    driver.wait(6)
    assert not driver.succeed(old[1])  # half-open: a late success is no probe's
    assert driver.fail(old[2]) == 0.0
    assert driver.breaker.state is BreakerState.HALF_OPEN
    assert driver.begin() is not None  # and no late end gives a probe's place back
    assert driver.begin() is None
    old_one = old[3]
    assert old_one is not None
    driver.breaker.ignored(*old_one)
    assert driver.begin() is None


def test_a_verdict_that_the_owner_does_not_carry_out_is_no_dead_end() -> None:
    driver = open_one(STEADY)
    driver.wait(6)
    attempt = driver.begin()
    assert attempt is not None
    assert driver.breaker.failed(*attempt, driver.now) is Verdict.TRIP
    assert driver.begin() is not None


def test_a_lost_probe_gives_its_place_back_after_a_while() -> None:
    driver = open_one(Breaker(jitter=0, probe_timeout=10))
    driver.wait(2)
    lost = driver.begin()
    assert lost is not None
    assert driver.begin() is None
    driver.wait(10)
    assert driver.begin() is not None
    assert driver.begin() is None
    driver.breaker.ignored(*lost)  # it turns up after all: the place it had is somebody else's now
    assert driver.begin() is None


def test_each_probe_gives_back_its_own_place() -> None:
    driver = open_one(Breaker(half_open_calls=2, jitter=0, probe_timeout=10))
    driver.wait(2)
    first = driver.begin()
    driver.wait(6)
    assert driver.begin() is not None  # the second one, which is lost at 16
    assert first is not None
    driver.breaker.ignored(*first)
    assert driver.begin() is not None
    driver.wait(5)  # 11 s after the first, 5 s after the others
    assert driver.begin() is None


def test_jitter_spreads_the_time_out_and_keeps_to_the_maximum() -> None:
    random = Random(7)
    times = []
    for _ in range(200):
        driver = Driver(Breaker(consecutive_failures=1, open_time=1, max_open_time=1.25, jitter=0.5), random)
        times.append(driver.fail())
    assert min(times) >= 1.0
    assert max(times) == 1.25
    assert len({round(time, 3) for time in times}) > 50


def test_news_from_elsewhere_ends_the_waiting() -> None:
    driver = open_one(STEADY)
    assert driver.breaker.probe_now(driver.now)
    assert driver.breaker.state is BreakerState.HALF_OPEN
    assert not driver.breaker.probe_now(driver.now)


@given(st.data())
def test_never_more_probes_than_allowed_and_no_dead_end(data: st.DataObject) -> None:
    options = Breaker(
        consecutive_failures=data.draw(st.integers(1, 4)),
        failure_rate=data.draw(st.sampled_from([None, 0.3, 0.5, 1.0])),
        slow_call_duration=data.draw(st.sampled_from([None, 1.0])),
        window_calls=data.draw(st.sampled_from([None, 5])),
        half_open_calls=data.draw(st.integers(1, 3)),
        jitter=0,
    )
    driver = Driver(options)
    under_way: list[tuple[int, float]] = []
    for step in data.draw(st.lists(st.sampled_from(["begin", "succeed", "fail", "ignore", "wait"]), max_size=80)):
        if step == "wait":
            driver.wait(1.0)
        elif step == "begin":
            attempt = driver.begin()
            if attempt is not None:
                under_way.append(attempt)
        elif under_way:
            attempt = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            if step == "succeed":
                driver.succeed(attempt)
            elif step == "fail":
                driver.fail(attempt)
            else:
                driver.breaker.ignored(*attempt)
        if driver.breaker.state is BreakerState.HALF_OPEN:
            lately = driver.now - options.probe_timeout
            probes = [a for a in under_way if a[0] == driver.breaker.generation and a[1] > lately]
            assert len(probes) <= options.half_open_calls
    for _ in range(20):  # what failed earlier may open it once more
        driver.wait(options.max_open_time + options.probe_timeout)
        attempt = driver.begin()
        assert attempt is not None
        driver.succeed(attempt)
    assert driver.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("consecutive_failures", 0),
        ("consecutive_failures", 2.0),
        ("consecutive_failures", True),
        pytest.param("consecutive_failures", 10**400, id="consecutive_failures-401 digits"),
        ("open_time", 0),
        ("open_time", -1),
        ("open_time", float("nan")),
        ("open_time", 1e-300),
        ("open_time", b"1"),
        ("max_open_time", 0.5),
        ("max_open_time", float("inf")),
        ("jitter", 1.5),
        ("failure_rate", 1.1),
        ("failure_rate", 0),
        ("failure_rate", "half"),
        ("slow_call_duration", 0),
        ("slow_call_rate", 1.01),
        ("slow_call_rate", None),
        ("window", 0),
        ("window_calls", 0),
        ("window_calls", 10**9),
        ("minimum_calls", 0),
        ("decay_time", 0),
        ("listeners", "print"),
        ("listeners", print),
        ("listeners", ["print"]),
        ("half_open_calls", 0),
        ("probe_timeout", None),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Breaker\.{field}"):
        Breaker(**{field: value})  # type: ignore[arg-type]


def test_a_breaker_that_could_never_open_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"Breaker\.consecutive_failures"):
        Breaker(consecutive_failures=None, failure_rate=None)
    Breaker(consecutive_failures=None, failure_rate=None, slow_call_duration=1)
