"""The settings of hedging, and the quantile that its delay is taken from."""

from __future__ import annotations

import threading
from random import Random

import pytest

from meshlb import ConfigError, Hedge
from meshlb.resilience.hedge import HedgeTimer, LatencyQuantile
from meshlb.testing import FakeClock


def test_a_fixed_delay() -> None:
    timer = HedgeTimer(Hedge(delay=0.25), FakeClock())
    assert timer.delay() == 0.25
    timer.record(9.0)
    assert timer.delay() == 0.25
    assert HedgeTimer(Hedge(delay=0), FakeClock()).delay() == 0


def test_no_hedges_before_enough_is_known() -> None:
    timer = HedgeTimer(Hedge(), FakeClock())
    for _ in range(19):
        assert timer.delay() is None
        timer.record(0.1)
    timer.record(None)
    assert timer.delay() is None
    timer.record(0.1)
    assert timer.delay() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 0.99])
def test_the_quantile_is_right_within_a_bucket(quantile: float) -> None:
    random = Random(3)
    estimate = LatencyQuantile(quantile, FakeClock())
    samples = [random.lognormvariate(-3, 1) for _ in range(5000)]
    for sample in samples:
        estimate.record(sample)
    exact = sorted(samples)[int(quantile * 5000) - 1]
    assert exact * 0.99 <= (estimate.value() or 0) <= exact * 1.1


def test_old_latencies_are_forgotten() -> None:
    clock = FakeClock()
    estimate = LatencyQuantile(0.5, clock)
    for _ in range(100):
        estimate.record(1.0)
    clock.advance(31)
    for _ in range(300):
        estimate.record(0.01)
    assert estimate.value() == pytest.approx(0.01, rel=0.1)
    clock.advance(31)
    assert estimate.value() == pytest.approx(0.01, rel=0.1)
    clock.advance(100)
    assert estimate.value() is None


def test_extremes() -> None:
    estimate = LatencyQuantile(0.5, FakeClock())
    for sample in (0.0, -1.0, 1e-9, 1e9) * 10:
        estimate.record(sample)
    assert estimate.value() == 0.001, "at least a millisecond"


def test_threads() -> None:
    estimate = LatencyQuantile(0.5, FakeClock())
    threads = [threading.Thread(target=lambda: [estimate.record(0.1) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert estimate._samples == 8000


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"delay": -1}, "delay"),
        ({"delay": "1s"}, "delay"),
        ({"percentile": 95}, "percentile"),
        ({"percentile": 0}, "percentile"),
        ({"percentile": 1}, "percentile"),
        ({"delay": 1, "percentile": 0.5}, "percentile"),
        ({"max_attempts": 1}, "max_attempts"),
        ({"max_attempts": 2.5}, "max_attempts"),
    ],
)
def test_bad_settings(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"Hedge\.{field}"):
        Hedge(**options)  # type: ignore[arg-type]
