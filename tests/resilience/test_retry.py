"""tenacity's real strategies, driven by Backoff."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import tenacity

from meshlb import ConfigError, Retry
from meshlb.resilience import Backoff


def waits(retry: Retry, count: int, elapsed: float = 0.0, error: BaseException | None = None) -> list[float | None]:
    backoff = Backoff(retry)
    return [backoff.next_wait(attempt, elapsed, error) for attempt in range(1, count + 1)]


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (tenacity.wait_none(), [0, 0, 0]),
        (tenacity.wait_fixed(0.5), [0.5, 0.5, 0.5]),
        (tenacity.wait_fixed(timedelta(seconds=2)), [2, 2, 2]),
        (tenacity.wait_exponential(multiplier=0.1, max=0.3), [0.1, 0.2, 0.3]),
        (tenacity.wait_incrementing(start=1, increment=2), [1, 3, 5]),
        (tenacity.wait_fixed(0.5) + tenacity.wait_exponential(multiplier=0.1), [0.6, 0.7, 0.9]),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(3)), [1, 3, 3]),
        (lambda state: 0.25 * state.attempt_number, [0.25, 0.5, 0.75]),
        (lambda state: -1.0, [0, 0, 0]),
        (lambda state: float("nan"), [0, 0, 0]),
        (lambda state: float("inf"), [None, None, None]),
    ],
)
def test_waits(wait: Callable[[Any], float], expected: list[float | None]) -> None:
    assert waits(Retry(wait=wait), 3) == [pytest.approx(value) if value else value for value in expected]


@pytest.mark.parametrize(
    ("stop", "elapsed", "stops"),
    [
        (tenacity.stop_never, 1e6, False),
        (tenacity.stop_after_attempt(2), 0.0, False),
        (tenacity.stop_after_attempt(1), 0.0, True),
        (tenacity.stop_after_delay(3), 2.9, False),
        (tenacity.stop_after_delay(3), 3.0, True),
        (tenacity.stop_before_delay(3), 1.9, False),
        (tenacity.stop_before_delay(3), 2.0, True),  # 2 s gone, 1 s of wait to come
        (tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(3), 3.0, True),
        (tenacity.stop_after_attempt(5) & tenacity.stop_after_delay(3), 3.0, False),
    ],
)
def test_stops(stop: Callable[[Any], bool], elapsed: float, stops: bool) -> None:
    assert waits(Retry(wait=tenacity.wait_fixed(1), stop=stop), 1, elapsed) == [None if stops else 1.0]


def test_stop_is_told_the_wait_that_really_comes() -> None:
    # The retry goes to another endpoint, at once: the wait strategy's ten seconds are not to come.
    retry = Retry(wait=tenacity.wait_fixed(10), stop=tenacity.stop_before_delay(3))
    backoff = Backoff(retry)
    assert backoff.next_wait(1, 1.0, None, pause=0.0) == 0.0
    assert backoff.next_wait(1, 1.0, None, pause=2.5) is None
    assert backoff.next_wait(1, 1.0, None) is None


def test_strategies_see_the_error() -> None:
    seen: list[BaseException | None] = []

    def look(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        seen.append(state.outcome.exception())
        return 0.0

    error = ConnectionError("gone")
    waits(Retry(wait=look), 1, error=error)
    waits(Retry(wait=look), 1)
    assert seen == [error, None]


def test_wait_exception() -> None:
    if not hasattr(tenacity, "wait_exception"):
        pytest.skip("needs a newer tenacity")
    retry = Retry(wait=tenacity.wait_exception(lambda error: float(str(error))))
    assert waits(retry, 1, error=ValueError("1.5")) == [1.5]


def test_full_jitter_between_nothing_and_25_to_250_ms_without_a_strategy() -> None:
    found = [[wait for wait in waits(Retry(), 6) if wait is not None] for _ in range(300)]
    for attempt, most in enumerate((0.025, 0.05, 0.1, 0.2, 0.25, 0.25)):
        values = [row[attempt] for row in found]
        assert 0 <= min(values) < 0.2 * most
        assert 0.8 * most < max(values) <= most


@pytest.mark.parametrize("name", ["wait", "stop"])
def test_a_strategy_that_raises_is_logged_and_stops(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(state: object) -> Any:
        raise ZeroDivisionError("mine")

    with caplog.at_level(logging.ERROR):
        assert waits(Retry(**{name: broken}), 1) == [None]
    assert "mine" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_attempts", 0),
        ("max_attempts", -3),
        ("max_attempts", 1.5),
        ("wait", 0.5),
        ("wait", tenacity.wait_fixed),  # the class, not one of it
        ("stop", 3),
        ("stop", tenacity.stop_after_attempt),
        ("per_try_timeout", 0),
        ("per_try_timeout", -1.0),
        ("per_try_timeout", float("nan")),
        ("budget", 0.2),
        ("idempotent_methods", "POST"),
        ("idempotent_methods", b"POST"),
        ("idempotent_methods", [b"POST"]),
    ],
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Retry\.{field}"):
        Retry(**{field: value})  # type: ignore[arg-type]
