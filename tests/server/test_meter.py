"""The meter under a clock and a processor time that the test moves."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from meshlb import ConfigError
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC
from meshlb.server import LoadMeter
from meshlb.server.meter import SAMPLE_PERIOD
from meshlb.testing import FakeClock


class Server:
    """A meter, and what it measures."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.cpu = 50.0
        self.meter = LoadMeter(clock=self.clock, cpu_time=lambda: self.cpu, **{"cores": 2, **options})

    def serve(self, seconds: float, *, work: float = 0.0, failed: bool = False) -> None:
        request = self.meter.begin()
        self.clock.advance(seconds)
        self.cpu += work
        request.finished(failed=failed)


def test_rates_and_utilization_are_over_the_same_time():
    server = Server()
    for number in range(50):  # 10 a second, each 20 ms of processor time, every fifth an error
        server.serve(0.1, work=0.02, failed=number % 5 == 0)
    report = server.meter.report()
    assert report.rps_fractional == pytest.approx(10)
    assert report.eps == pytest.approx(2)
    assert report.cpu_utilization == pytest.approx(10 * 0.02 / 2)  # of two processors


def test_nothing_is_reported_of_rates_before_the_first_period_is_over():
    server = Server()
    server.serve(SAMPLE_PERIOD / 2, work=0.01)
    report = server.meter.report()
    assert (report.rps_fractional, report.cpu_utilization) == (0, 0)
    server.serve(SAMPLE_PERIOD, work=0.01)
    assert server.meter.report().rps_fractional > 0


def test_the_window_forgets():
    server = Server(window=2)
    for _ in range(100):
        server.serve(0.1, work=0.1)
        server.meter.report()
    assert server.meter.report().cpu_utilization == pytest.approx(0.5)
    for _ in range(25):
        server.serve(0.1, work=0.01)
        server.meter.report()
    assert server.meter.report().cpu_utilization == pytest.approx(0.05)


def test_an_idle_time_counts_as_idle():
    server = Server(window=2)
    server.serve(0.1, work=0.1)
    server.meter.report()
    server.clock.advance(100)
    server.serve(0.1, work=0.1)
    assert server.meter.report().rps_fractional == pytest.approx(1 / 100, rel=0.01)


def test_the_processor_time_is_not_asked_for_at_each_request():
    asked = 0

    def cpu_time() -> float:
        nonlocal asked
        asked += 1
        return 0.0

    clock = FakeClock()
    meter = LoadMeter(clock=clock, cpu_time=cpu_time, cores=1)
    for _ in range(1000):
        meter.begin().finished()
        meter.report()
        clock.advance(SAMPLE_PERIOD / 100)
    assert asked <= 12


def test_in_flight_is_told_without_the_request_that_is_answered():
    server = Server()
    others = [server.meter.begin() for _ in range(3)]
    request = server.meter.begin()
    assert request.report().named_metrics[IN_FLIGHT_METRIC] == 3
    assert server.meter.report().named_metrics[IN_FLIGHT_METRIC] == 4
    request.finished()
    assert request.report().named_metrics[IN_FLIGHT_METRIC] == 3
    for other in others:
        other.finished()
    assert server.meter.in_flight == 0


def test_the_latency_is_the_median_at_the_load_of_now():
    server = Server()
    for seconds in (0.1, 0.2, 0.3, 0.2, 0.9):
        server.serve(seconds)
    others = [server.meter.begin() for _ in range(6)]
    for _ in range(5):
        server.serve(1.5)
    assert server.meter.begin().report().named_metrics[LATENCY_METRIC] == pytest.approx(1.5)
    for other in others:
        other.given_up()
    assert server.meter.report().named_metrics[LATENCY_METRIC] == pytest.approx(0.2)


def test_a_stream_is_measured_to_its_first_message_and_counts_until_its_end():
    server = Server()
    request = server.meter.begin()
    server.clock.advance(0.25)
    request.answered()
    server.clock.advance(9)
    assert server.meter.in_flight == 1
    assert server.meter.report().named_metrics[LATENCY_METRIC] == pytest.approx(0.25)
    request.finished()
    assert server.meter.report().named_metrics[LATENCY_METRIC] == pytest.approx(0.25)


def test_neither_an_error_nor_a_cancelled_request_tells_of_latency():
    server = Server()
    server.serve(0.001, failed=True)
    request = server.meter.begin()
    request.given_up()
    server.clock.advance(1)
    report = server.meter.report()
    assert LATENCY_METRIC not in report.named_metrics
    assert report.rps_fractional == pytest.approx(report.eps)  # the cancelled one counts in neither


def test_a_request_ends_once():
    server = Server()
    request = server.meter.begin()
    request.finished()
    request.finished(failed=True)
    request.given_up()
    del request
    gc.collect()
    assert server.meter.in_flight == 0
    server.clock.advance(1)
    assert server.meter.report().eps == 0


def test_a_request_that_is_dropped_ends_too():
    server = Server()
    request = server.meter.begin()
    assert server.meter.in_flight == 1
    del request
    gc.collect()
    assert server.meter.in_flight == 0
    server.serve(1)
    assert server.meter.in_flight == 0


def test_the_applications_own_utilization_comes_with_it():
    used = 0.5
    server = Server(application_utilization=lambda: used)
    assert server.meter.report().application_utilization == 0
    server.clock.advance(1)
    assert server.meter.report().application_utilization == 0.5
    used = 2
    server.clock.advance(1)
    assert server.meter.report().application_utilization == 2


@pytest.mark.parametrize("answer", [math.nan, math.inf, -1, "much", None])
def test_an_application_that_talks_nonsense_is_logged_once_and_ignored(answer: Any, caplog: pytest.LogCaptureFixture):
    server = Server(application_utilization=lambda: answer)
    for _ in range(5):
        server.clock.advance(1)
        server.serve(0.1, work=0.1)
        assert server.meter.report().application_utilization == 0
    assert len(caplog.records) == 1
    assert server.meter.report().cpu_utilization > 0


@pytest.mark.parametrize(
    "options",
    [{"cores": 0}, {"cores": math.nan}, {"window": 0}, {"window": "5"}, {"application_utilization": 0.5}],
)
def test_wrong_settings_are_named(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LoadMeter(**options)


def test_threads_lose_nothing():
    meter = LoadMeter()

    def work() -> None:
        for number in range(500):
            request = meter.begin()
            if number % 3 == 0:
                request.answered()
            if number % 5:
                meter.report()
                request.finished(failed=number % 7 == 0)
            else:
                del request

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.in_flight == 0


def in_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitpid(child, 0)[1] == 0


def test_a_worker_begins_at_zero_whatever_its_parent_was_doing():
    meter = LoadMeter()
    inherited = meter.begin()

    def check() -> bool:
        fresh = meter.in_flight == 0
        mine = meter.begin()
        inherited.finished()
        return fresh and meter.in_flight == 1 and mine.report().named_metrics[IN_FLIGHT_METRIC] == 0

    meter._lock.acquire()  # a request of the parent's, at the moment of the fork
    try:
        assert in_child(check)
    finally:
        meter._lock.release()
    assert meter.in_flight == 1
    inherited.finished()
