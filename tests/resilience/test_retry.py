"""tenacity's real strategies, driven by Backoff."""

from __future__ import annotations

import http
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import tenacity

from meshlb import ConfigError, Outcome, OutcomeKind, Retry, Sent
from meshlb.resilience import Backoff
from meshlb.resilience.retry_on import is_retryable


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
    ("stop", "wait"),
    [
        (tenacity.stop_never, tenacity.wait_exponential()),
        (tenacity.stop_never, tenacity.wait_fixed(1) + tenacity.wait_incrementing(start=1, increment=1)),
        (tenacity.stop_never | tenacity.stop_never, tenacity.wait_exponential()),
        (tenacity.stop_after_attempt(3) & tenacity.stop_never, tenacity.wait_exponential()),
    ],
)
def test_what_never_ends_is_refused(stop: Any, wait: Any) -> None:
    with pytest.raises(ConfigError, match=r"Retry\.stop.*never stops"):
        Retry(stop=stop, wait=wait)


@pytest.mark.parametrize(
    ("stop", "wait"),
    [
        (tenacity.stop_never, tenacity.wait_exponential(max=10)),
        (tenacity.stop_never | tenacity.stop_after_delay(5), tenacity.wait_exponential()),
        (tenacity.stop_never, None),
        (None, tenacity.wait_exponential()),
        (lambda state: False, tenacity.wait_exponential()),  # a function of the user's is not tried out
    ],
)
def test_what_ends_somehow_is_not(stop: Any, wait: Any) -> None:
    Retry(stop=stop, wait=wait)


OVERLOADED = Outcome(OutcomeKind.OVERLOAD, retryable=True, reason="429")
REFUSED = Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason="ConnectError")
FATAL = Outcome(OutcomeKind.FAILURE, reason="500")
LOCAL = Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason="PoolTimeout")


@pytest.mark.parametrize(
    ("retry_on", "outcome", "expected"),
    [
        ((500, 429), FATAL, True),
        ((http.HTTPStatus.INTERNAL_SERVER_ERROR,), FATAL, True),
        (["500"], FATAL, True),
        ((503,), FATAL, False),
        ((503,), OVERLOADED, False),
        (("unavailable", "INTERNAL"), Outcome(OutcomeKind.FAILURE, reason="INTERNAL"), True),
        (("ReadTimeout",), Outcome(OutcomeKind.FAILURE, Sent.MAYBE, True, reason="ReadTimeout"), True),
        (("ReadTimeout",), Outcome(OutcomeKind.FAILURE, Sent.MAYBE, True, reason="ReadError"), False),
        ((503,), REFUSED, True),  # it reached nobody: a first sending, whatever the list says
        ((500,), LOCAL, False),
        (tenacity.retry_always, LOCAL, False),
        (tenacity.retry_always, FATAL, True),
        (tenacity.retry_never, OVERLOADED, False),
        (tenacity.retry_never, REFUSED, False),
        (tenacity.retry_if_exception_type(OSError), REFUSED, True),
        (tenacity.retry_if_exception_type(ValueError), REFUSED, False),
        (tenacity.retry_if_exception_type(ValueError) | tenacity.retry_if_exception_type(OSError), REFUSED, True),
        (tenacity.retry_if_exception_type(OSError) & tenacity.retry_if_exception_message("x"), REFUSED, False),
        (lambda state: state.attempt_number < 2 and state.seconds_since_start == 1.5, FATAL, True),
    ],
)
def test_retry_on(retry_on: Any, outcome: Outcome, expected: bool) -> None:
    retry = Retry(retry_on=retry_on)
    error = ConnectionRefusedError("gone") if outcome is REFUSED else None
    assert is_retryable(retry.retry_on, outcome, outcome.reason, error=error, elapsed=1.5) is expected  # type: ignore[arg-type]


def test_retry_on_sees_the_result() -> None:
    retry = Retry(retry_on=tenacity.retry_if_result(lambda found: found == 42))
    assert is_retryable(retry.retry_on, FATAL, "500", result=42)  # type: ignore[arg-type]
    assert not is_retryable(retry.retry_on, FATAL, "500", result=43)  # type: ignore[arg-type]


def test_a_predicate_that_raises_is_logged_and_the_table_holds(caplog: pytest.LogCaptureFixture) -> None:
    def broken(state: object) -> bool:
        raise ZeroDivisionError("mine")

    with caplog.at_level(logging.ERROR):
        assert is_retryable(broken, OVERLOADED, "429")
        assert not is_retryable(broken, FATAL, "500")
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
        ("retry_on", 7),
        ("retry_on", "503"),
        ("retry_on", ()),
        ("retry_on", (200,)),
        ("retry_on", (True,)),
        ("retry_on", ("NOPE",)),
        ("retry_on", ("OK",)),
        ("retry_on", tenacity.retry_if_result),
        ("hedge", 0.5),
        ("buffer_body", -1),
        ("buffer_body", 1.5),
        ("buffer_body", 2**40),
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
