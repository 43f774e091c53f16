"""Outlier detection by the vectors of Envoy, gRPC and grpc-java. The detector has no clock: tests pass the time."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import ConfigError, OutlierDetection
from meshlb.resilience import EjectionCap, OutlierDetector
from meshlb.resilience.outlier import Sentence


class Host:
    """What the detector sees of an endpoint."""

    def __init__(self, name: int, cap: EjectionCap) -> None:
        self.name = name
        self.cap = cap
        self.successes = self.failures = self.overloads = 0
        self.reason = ""
        self.until = 0.0

    def serve(self, good: int, bad: int = 0, refused: int = 0) -> None:
        self.successes += good
        self.failures += bad
        self.overloads += refused

    @property
    def is_out(self) -> bool:
        return bool(self.reason)

    def eject(self, reason: str, until: float) -> bool:
        if self.is_out or not self.cap.try_take(0.0):
            return False
        self.reason, self.until = reason, until
        return True

    def readmit(self) -> None:
        self.reason = ""
        self.cap.give_back()


class Fleet:
    def __init__(self, hosts: int, options: OutlierDetection, max_percent: float = 50, seed: int = 1) -> None:
        self.cap = EjectionCap(max_percent, 0.5)
        self.cap.resize(hosts)
        self.hosts = [Host(number, self.cap) for number in range(hosts)]
        self.detector: OutlierDetector[Host] = OutlierDetector(options, Random(seed))
        self.options = options
        self.now = 0.0

    def sweep(self) -> list[int]:
        self.now += self.options.interval
        return [host.name for host in self.detector.sweep(self.now, self.hosts)]

    @property
    def out(self) -> list[int]:
        return [host.name for host in self.hosts if host.is_out]


BY_RATE = OutlierDetection(failure_percentage_enforcement=0)
BY_PERCENTAGE = OutlierDetection(success_rate_enforcement=0)


# Envoy, test/common/upstream/outlier_detection_impl_test.cc: mean 90, deviation 20, threshold 52
def test_envoy_success_rate() -> None:
    fleet = Fleet(5, BY_RATE)
    fleet.hosts[0].serve(50, 50)
    for host in fleet.hosts[1:]:
        host.serve(100)
    assert fleet.sweep() == [0]
    assert fleet.hosts[0].reason == "success rate 0.50, threshold 0.52 over 5 hosts"


# grpc-java, OutlierDetectionLoadBalancerTest.mathChecksOut: mean 394, deviation 147.32277488562318
def test_grpc_java_mathematics() -> None:
    rates = [600, 470, 170, 430, 300]
    fleet = Fleet(5, OutlierDetection(success_rate_stdev_factor=1.5, failure_percentage_enforcement=0))
    for host, rate in zip(fleet.hosts, rates, strict=True):
        host.serve(rate, 1000 - rate)
    assert fleet.sweep() == [2]  # 0.17 is below 0.394 - 1.5 * 0.14732 = 0.17302
    fleet = Fleet(5, OutlierDetection(success_rate_stdev_factor=1.53, failure_percentage_enforcement=0))
    for host, rate in zip(fleet.hosts, rates, strict=True):
        host.serve(rate, 1000 - rate)
    assert fleet.sweep() == []  # and not below 0.16860


# Derived of the geometry: k of n hosts dead are seen if (n - k) / k > 1.9 ** 2. (Up to four hosts by minimum_hosts 3.)
@pytest.mark.parametrize(
    ("hosts", "visible"),
    [(3, 0), (4, 0), (5, 1), (6, 1), (8, 1), (9, 1), (10, 2), (14, 3), (20, 4), (30, 6)],
)
def test_how_many_dead_hosts_the_deviation_can_see(hosts: int, visible: int) -> None:
    options = OutlierDetection(success_rate_minimum_hosts=3, failure_percentage_enforcement=0)
    seen = []
    for dead in range(1, hosts):
        fleet = Fleet(hosts, options, max_percent=100)
        for host in fleet.hosts:
            host.serve(*((0, 100) if host.name < dead else (100, 0)))
        fleet.sweep()
        if fleet.out == list(range(dead)):
            seen.append(dead)
        else:
            assert fleet.out == []
    assert seen == list(range(1, visible + 1))


# Envoy: threshold 85, 5 hosts
@pytest.mark.parametrize(
    ("good", "bad", "ejected"),
    [(50, 250, False), (50, 300, True), (15, 85, True), (16, 84, False), (0, 49, False), (0, 50, True)],
)
def test_failure_percentage(good: int, bad: int, ejected: bool) -> None:
    fleet = Fleet(5, BY_PERCENTAGE)
    fleet.hosts[3].serve(good, bad)
    for host in fleet.hosts:
        if host.name != 3:
            host.serve(50)
    assert fleet.sweep() == ([3] if ejected else [])


def test_words_and_overload() -> None:
    fleet = Fleet(5, BY_PERCENTAGE)
    for host in fleet.hosts:
        host.serve(100)
    fleet.hosts[4].serve(0, 900, 1000)
    assert fleet.sweep() == [4]
    assert fleet.hosts[4].reason == "95 % of 2000 calls failed, threshold 85 %"


def test_too_few_hosts_or_calls_are_not_judged() -> None:
    for options in (BY_RATE, BY_PERCENTAGE):
        few = Fleet(4, options)
        for host in few.hosts:
            host.serve(0 if host.name == 0 else 1000, 1000 if host.name == 0 else 0)
        assert few.sweep() == []
        quiet = Fleet(5, options)
        for host in quiet.hosts:
            host.serve(0 if host.name == 0 else 49, 49 if host.name == 0 else 0)
        assert quiet.sweep() == []


def test_an_interval_is_judged_by_its_own_calls() -> None:
    fleet = Fleet(5, BY_RATE)
    for host in fleet.hosts:
        host.serve(1000)
    assert fleet.sweep() == []
    fleet.hosts[1].serve(50, 50)
    for host in fleet.hosts:
        host.serve(100)
    assert fleet.sweep() == [1]


@pytest.mark.parametrize(("hosts", "percent", "out"), [(10, 10, 1), (11, 10, 1), (5, 30, 1), (5, 0, 0), (10, 20, 2)])
def test_never_more_than_the_cap_allows(hosts: int, percent: float, out: int) -> None:
    fleet = Fleet(hosts, BY_PERCENTAGE, percent)
    for host in fleet.hosts:
        host.serve(0, 100)
    assert len(fleet.sweep()) == out
    for host in fleet.hosts:
        host.serve(0, 100)
    assert fleet.sweep() == []
    if out:
        host = fleet.hosts[0]
        assert host.until == 40.0  # the first time is 30 s; what was refused a place did not count as one


def test_enforcement_is_a_chance() -> None:
    ejected = 0
    for seed in range(400):
        fleet = Fleet(5, OutlierDetection(failure_percentage_enforcement=25, success_rate_enforcement=0), seed=seed)
        fleet.hosts[0].serve(0, 100)
        for host in fleet.hosts[1:]:
            host.serve(100)
        ejected += len(fleet.sweep())
    assert 70 < ejected < 130


def test_ejected_hosts_count_in_nobodys_mean_and_come_back() -> None:
    fleet = Fleet(6, BY_RATE)
    fleet.hosts[0].serve(0, 100)
    for host in fleet.hosts[1:]:
        host.serve(100)
    assert fleet.sweep() == [0]
    for tick in range(2):
        for host in fleet.hosts:
            host.serve(*((0, 100) if host.name == 0 else (99 + host.name % 2, 1 - host.name % 2)))
        assert fleet.sweep() == [], tick
    assert fleet.sweep() == [0]
    assert fleet.out == []
    for host in fleet.hosts:
        host.serve(100)
    assert fleet.sweep() == []  # what it did while it was out is forgotten


def test_a_host_that_somebody_else_put_back_may_be_ejected_again() -> None:
    fleet = Fleet(5, BY_PERCENTAGE)
    for _ in range(2):
        fleet.hosts[0].serve(0, 100)
        for host in fleet.hosts[1:]:
            host.serve(100)
        assert fleet.sweep() == [0]
        fleet.hosts[0].readmit()


# -- how long: Envoy's EjectTimeBackoff and MaxEjectTime tests


def sentence(base: float = 10, most: float = 300, jitter: float = 0, random: Random | None = None) -> Sentence:
    options = OutlierDetection(
        interval=10, base_ejection_time=base, max_ejection_time=most, max_ejection_time_jitter=jitter
    )
    return Sentence(options, random or Random(1))


def back_at(one: Sentence, now: float) -> float:
    one.begin(now)
    while not one.tick(now):
        now += 10
    return now


def test_envoy_the_times_grow_and_decay() -> None:
    one = sentence()
    assert [back_at(one, 0), back_at(one, 10), back_at(one, 30)] == [10, 30, 60]
    for tick in (70, 80):
        assert not one.tick(tick)
    assert one.multiplier == 1
    assert back_at(one, 80) == 100
    for number in range(50):
        one.tick(110 + 10 * number)
    assert back_at(one, 610) == 620


def test_the_interval_of_the_return_itself_takes_nothing_back() -> None:
    one = sentence()
    assert back_at(one, 0) == 10
    one.tick(10)
    one.tick(19)
    assert one.multiplier == 1
    one.tick(20)
    assert one.multiplier == 0


def test_envoy_the_times_have_a_maximum_and_the_growth_too() -> None:
    one, now = sentence(), 0.0
    for number in range(1, 60):
        end = back_at(one, now)
        assert end - now == min(10 * number, 300)
        now = end
    assert one.multiplier == 31  # not 59, which would take as many good intervals to decay
    assert back_at(sentence(most=305), 0) == 10
    longest = sentence(base=305, most=305)
    assert back_at(longest, 0) == 310  # by ticks of ten


def test_envoy_jitter_in_whole_milliseconds() -> None:
    class Fixed(Random):
        def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
            return 123456789 % start

    assert sentence(jitter=10, random=Fixed()).begin(0) == 10 + 4.445


def test_envoy_before_its_time_nobody_returns() -> None:
    one = sentence(base=30)
    one.begin(0)
    assert not one.tick(9.999)
    assert one.tick(30.001)


@given(st.lists(st.sampled_from(["serve", "fail", "sweep"]), max_size=60), st.integers(1, 12), st.integers(0, 100))
def test_whatever_happens_the_cap_holds_and_everybody_returns(steps: list[str], hosts: int, percent: int) -> None:
    options = OutlierDetection(
        success_rate_minimum_hosts=1,
        success_rate_request_volume=1,
        failure_percentage_minimum_hosts=1,
        failure_percentage_request_volume=1,
    )
    fleet = Fleet(hosts, options, percent)
    for number, step in enumerate(steps):
        if step == "sweep":
            fleet.sweep()
        else:
            fleet.hosts[number % hosts].serve(int(step == "serve"), int(step == "fail"))
        assert len(fleet.out) == fleet.cap.out <= max(1, percent * hosts / 100)
    for _ in range(40):
        fleet.sweep()
    assert (fleet.out, fleet.cap.out) == ([], 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0),
        ("base_ejection_time", -1),
        ("max_ejection_time", 1),
        ("max_ejection_time_jitter", -0.1),
        ("success_rate_stdev_factor", 0),
        ("success_rate_enforcement", 101),
        ("success_rate_minimum_hosts", 0),
        ("success_rate_request_volume", 1.5),
        ("failure_percentage_threshold", 101),
        ("failure_percentage_enforcement", -1),
        ("failure_percentage_minimum_hosts", "5"),
        ("failure_percentage_request_volume", 0),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"OutlierDetection\.{field}"):
        OutlierDetection(**{field: value})  # type: ignore[arg-type]
