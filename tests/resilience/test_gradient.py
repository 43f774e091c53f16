"""Netflix's Gradient2, step by step, and what must hold whatever latencies do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import ConfigError, Gradient2
from meshlb.resilience import GradientLimit


def exact(limit: GradientLimit) -> float:
    return limit._estimate


# concurrency-limits, Gradient2Limit: worked by hand of its formulas (tolerance 1.5, smoothing 0.2, queue 4)
def test_steady_latency_grows_the_limit_by_a_share_of_the_queue_a_window() -> None:
    limit = GradientLimit(Gradient2())
    assert [limit.update(0.01, 20) for _ in range(3)] == [20, 21, 22]
    assert exact(limit) == pytest.approx(22.4)  # 0.2 * 4 a window


def test_higher_latency_within_the_tolerance_still_grows_it() -> None:
    limit = GradientLimit(Gradient2(initial_limit=100, long_window=10**9))
    for _ in range(10):
        limit.update(0.01, 100)
    before = exact(limit)
    limit.update(0.0149, 200)
    assert exact(limit) == pytest.approx(before + 0.8)


def test_latency_beyond_it_shrinks_the_limit_in_proportion_and_at_most_by_half() -> None:
    for latency, gradient in ((0.02, 0.75), (0.03, 0.5), (10.0, 0.5)):
        limit = GradientLimit(Gradient2(initial_limit=100, long_window=10**9))
        for _ in range(10):
            limit.update(0.01, 0)  # the limit stays: it is not what holds the load back
        limit.update(latency, 100)
        assert exact(limit) == pytest.approx(100 * 0.8 + 0.2 * (100 * gradient + 4), rel=1e-3)


def test_it_stays_where_the_load_is_low() -> None:
    limit = GradientLimit(Gradient2())
    assert [limit.update(0.01, 9) for _ in range(50)] == [20] * 50
    assert limit.update(0.01, 10) == 20
    assert exact(limit) == pytest.approx(20.8)


def test_after_a_long_overload_the_long_term_latency_comes_down_at_once() -> None:
    limit = GradientLimit(Gradient2())
    for _ in range(10):
        limit.update(1.0, 20)
    long_term = limit._long
    limit.update(0.01, 20)
    average = long_term + (0.01 - long_term) * 2 / 601
    assert limit._long == pytest.approx(average * 0.95)


def test_a_window_needs_its_time_and_enough_calls() -> None:
    limit = GradientLimit(Gradient2(window=1.0, window_calls=10))
    for number in range(30):
        limit.observe(0.01, 20, number * 0.03)  # within the first second
    assert limit.limit == 20
    limit.observe(0.01, 20, 1.0)
    assert exact(limit) == pytest.approx(20.8)
    limit.observe(0.01, 20, 5.0)
    assert exact(limit) == pytest.approx(20.8)  # time enough, and one call


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10_000)), max_size=200),
    st.integers(1, 50),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_the_limit_stays_within_its_bounds(windows: list[tuple[float, int]], least: int, more: int, most: int) -> None:
    options = Gradient2(min_limit=least, initial_limit=least + more, max_limit=least + more + most)
    limit = GradientLimit(options)
    for latency, in_flight in windows:
        assert options.min_limit <= limit.update(latency, in_flight) <= options.max_limit


def simulated(limit: GradientLimit, capacity: int, windows: int) -> None:
    """A server that works on ``capacity`` calls at a time, 10 ms each; more of them queue."""
    for _ in range(windows):
        limit.update(0.01 * max(1.0, limit.limit / capacity), limit.limit)


def test_it_settles_between_what_the_server_can_do_and_a_short_queue() -> None:
    limit = GradientLimit(Gradient2(min_limit=5, max_limit=1000))
    simulated(limit, 50, 300)
    assert 50 <= limit.limit <= 150  # 75 by the tolerance, and more as the long-term latency follows


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initial_limit", 19),
        ("initial_limit", 201),
        ("min_limit", 0),
        ("max_limit", 10),
        ("queue_size", 0),
        ("smoothing", 0),
        ("smoothing", 1.1),
        ("tolerance", 0.9),
        ("long_window", 0),
        ("window", 0),
        ("window_calls", 0),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Gradient2\.{field}"):
        Gradient2(**{field: value})  # type: ignore[arg-type]
