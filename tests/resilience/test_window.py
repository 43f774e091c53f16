"""Exact counts in a sliding window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.resilience.window import SLICES, CountWindow, TimeWindow


def feed(window: CountWindow | TimeWindow, calls: str, now: float = 0.0, step: float = 0.0) -> float:
    """S: a success, F: a failure."""
    for call in calls:
        window.record(now, failed=call == "F")
        now += step
    return now


# linkerd2-proxy, linkerd/app/outbound/src/http/breaker/success_rate.rs
@pytest.mark.parametrize("step", [0.0002, 1.0], ids=["within a millisecond", "one a second"])
def test_linkerd_a_burst_counts_like_a_trickle(step: float) -> None:
    window = TimeWindow(10)
    feed(window, "FFFFF", 100.0, step)
    assert (window.calls, window.failures) == (5, 5)


def test_linkerd_old_failures_are_forgotten() -> None:
    window = TimeWindow(10)
    feed(window, "FFFFF", 100.0)
    feed(window, "S", 111.0)
    assert (window.calls, window.failures) == (1, 0)


def test_linkerd_a_mixture_within_the_window() -> None:
    window = TimeWindow(10)
    feed(window, "FF", 100.0)
    feed(window, "SSSSSSSS", 106.0)
    assert 1 - window.failures / window.calls == 0.8
    window.clear()
    assert (window.calls, window.failures) == (0, 0)


def test_a_count_window_slides_over_the_last_calls() -> None:
    window = CountWindow(4)
    feed(window, "FFSS")
    assert (window.calls, window.failures) == (4, 2)
    window.record(0, failed=True, slow=True)
    assert (window.calls, window.failures, window.slow) == (4, 2, 1)
    feed(window, "SSS")
    assert (window.calls, window.failures, window.slow) == (4, 1, 1)
    feed(window, "S")
    assert (window.calls, window.failures, window.slow) == (4, 0, 0)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.booleans()), max_size=80), st.floats(0.1, 20))
def test_a_time_window_counts_exactly_what_is_in_it(calls: list[tuple[float, bool, bool]], seconds: float) -> None:
    window = TimeWindow(seconds)
    noted: list[tuple[int, bool, bool]] = []
    now, span = 0.0, seconds / SLICES
    for pause, failed, slow in calls:
        now += pause
        window.record(now, failed=failed, slow=slow)
        noted.append((int(now / span), failed, slow))
        inside = [call for call in noted if call[0] > int(now / span) - SLICES]
        assert window.calls == len(inside)
        assert window.failures == sum(call[1] for call in inside)
        assert window.slow == sum(call[2] for call in inside)


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=80))
def test_successes_handed_in_late_count_as_if_told_at_once(calls: list[tuple[float, bool]]) -> None:
    told, counted = TimeWindow(5), TimeWindow(5)
    now, quiet = 0.0, 0
    told.advance(now)
    counted.advance(now)
    for pause, failed in calls:
        now += pause
        told.record(now, failed=failed)
        if not failed and now < counted.turns_at:
            quiet += 1
            continue
        counted.add_successes(quiet)
        quiet = 0
        counted.record(now, failed=failed)
    counted.add_successes(quiet)
    assert (told.calls, told.failures) == (counted.calls, counted.failures)
