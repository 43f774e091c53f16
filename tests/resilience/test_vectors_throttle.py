"""Token buckets and client-side throttling, number for number.

Sources: grpc/grpc ``test/core/client_channel/retry_throttle_test.cc``; grpc/grpc-go ``test/retry_test.go``; Google,
"Site Reliability Engineering", chapter 21.
"""

from __future__ import annotations

from random import Random

import pytest

from meshlb import AdaptiveThrottling, ConfigError
from meshlb.resilience import AdaptiveThrottle, RetryThrottle, RetryThrottling
from meshlb.resilience.throttle import rejection_probability
from meshlb.testing import FakeClock


def follow(throttle: RetryThrottle, steps: str) -> None:
    """Steps as ``F3+`` (a failure leaves 3 tokens, a retry is allowed), ``F2-`` (not allowed), ``S4`` (a success)."""
    for step in steps.split():
        if step[0] == "S":
            throttle.succeeded()
            assert throttle.tokens == float(step[1:]), step
        else:
            assert throttle.failed() == (step[-1] == "+"), step
            assert throttle.tokens == float(step[1:-1]), step


def test_grpc_core_tokens() -> None:
    throttle = RetryThrottle(RetryThrottling(4, 1.6))
    follow(throttle, "F3+ S4 F3+ F2- F1- F0- F0- S1.6 S3.2 F2.2+ F1.2- S2.8 F1.8- S3.4 F2.4+")


def test_grpc_core_replacement_is_as_full_as_what_it_replaces() -> None:
    first = RetryThrottle(RetryThrottling(4, 1))
    follow(first, "F3+")
    second = RetryThrottle(RetryThrottling(10, 3), first)
    assert second.tokens == 7.5
    follow(second, "F6.5+ F5.5+ F4.5- F3.5- S6.5 F5.5+ F4.5-")


def test_grpc_go_throttling() -> None:
    ok = {0, 3, 6, *range(10, 15), 16, 18}
    throttle = RetryThrottle(RetryThrottling(10, 0.5))
    served = -1
    found = []
    for _call in range(12):
        for attempt in range(1, 5):
            served += 1
            if served in ok:
                throttle.succeeded()
                found.append((True, served, throttle.tokens))
                break
            if not throttle.failed() or attempt == 4:
                found.append((False, served, throttle.tokens))
                break
    assert found == [
        (True, 0, 10), (True, 3, 8.5), (True, 6, 7), (False, 8, 5), (False, 9, 4), (True, 10, 4.5), (True, 11, 5),
        (True, 12, 5.5), (True, 13, 6), (True, 14, 6.5), (True, 16, 6), (False, 17, 5),
    ]  # fmt: skip


def test_token_ratio_has_three_decimals() -> None:
    throttle = RetryThrottle(RetryThrottling(10, 0.0019))
    throttle.failed()
    throttle.succeeded()
    assert throttle.tokens == 9.001
    for ratio, tokens in ((0.1, 9.1), (0.3, 9.3), (0.7, 9.7), (0.001, 9.001), (0.57, 9.57), (0.29, 9.29)):
        throttle = RetryThrottle(RetryThrottling(10, ratio))
        throttle.failed()
        throttle.succeeded()
        assert throttle.tokens == tokens


@pytest.mark.parametrize(
    ("accepts", "expected"), [(100, 0.0), (50, 0.0), (49, 0.0198), (25, 0.495), (10, 0.7921), (0, 0.9901)]
)
def test_sre_probability(accepts: int, expected: float) -> None:
    assert rejection_probability(100, accepts, 2) == pytest.approx(expected, abs=5e-5)
    throttle = AdaptiveThrottle(AdaptiveThrottling(most=1), FakeClock(), Always(1.0))
    for number in range(100):
        assert throttle.admit()
        if number >= accepts:
            throttle.rejected()
    assert throttle.probability == pytest.approx(expected, abs=5e-5)


class Always(Random):
    def __init__(self, value: float) -> None:
        super().__init__(1)
        self._value = value

    def random(self) -> float:
        return self._value


def test_what_is_refused_here_counts_as_not_accepted() -> None:
    clock = FakeClock()
    throttle = AdaptiveThrottle(AdaptiveThrottling(most=1), clock, Always(0.0))
    for _ in range(10):
        throttle.admit()
        throttle.rejected()
        if throttle.probability > 0:
            break
    before = throttle.probability
    assert not throttle.admit()
    assert throttle.probability > before


def test_the_window_forgets() -> None:
    clock = FakeClock()
    throttle = AdaptiveThrottle(AdaptiveThrottling(window=120), clock, Always(1.0))
    for _ in range(50):
        throttle.admit()
        throttle.rejected()
    assert throttle.probability == 0.9
    clock.advance(109)
    assert throttle.probability == 0.9
    clock.advance(12)
    assert throttle.probability == 0
    for _ in range(3):
        assert throttle.admit()


def test_calls_before_the_first_rejection_count() -> None:
    # One rejection after a hundred good calls must not refuse the next one.
    clock = FakeClock()
    throttle = AdaptiveThrottle(AdaptiveThrottling(), clock, Always(0.0))
    for _ in range(100):
        throttle.admit()
        clock.advance(1)
    throttle.rejected()
    assert throttle.probability == 0
    assert throttle.admit()


def test_a_share_always_goes_through_so_that_recovery_is_seen() -> None:
    clock = FakeClock()
    throttle = AdaptiveThrottle(AdaptiveThrottling(), clock, Random(7))
    sent = 0
    for _ in range(5000):
        if throttle.admit():
            sent += 1
            throttle.rejected()
        clock.advance(0.01)
    assert 350 < sent < 700
    for _ in range(30_000):
        throttle.admit()
        clock.advance(0.01)
    assert throttle.probability == 0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RetryThrottling(0, 1), "RetryThrottling.max_tokens"),
        (lambda: RetryThrottling(1001, 1), "RetryThrottling.max_tokens"),
        (lambda: RetryThrottling(10, 0), "RetryThrottling.token_ratio"),
        (lambda: RetryThrottling(10, 0.0004), "RetryThrottling.token_ratio"),
        (lambda: AdaptiveThrottling(k=0.5), "AdaptiveThrottling.k"),
        (lambda: AdaptiveThrottling(window=0), "AdaptiveThrottling.window"),
        (lambda: AdaptiveThrottling(most=1.1), "AdaptiveThrottling.most"),
    ],
)
def test_bad_settings(make: object, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        make()  # type: ignore[operator]
