"""Back-off series of other implementations, number for number.

Sources: envoyproxy/envoy ``test/common/common/backoff_strategy_test.cc``; grpc/proposal A6; hynek/stamina
``src/stamina/_core.py``; AWS "Exponential Backoff And Jitter".
"""

from __future__ import annotations

import warnings
from random import Random
from typing import Any

import pytest
import tenacity

from meshlb import ConfigError, Retry
from meshlb.resilience import Backoff
from meshlb.resilience.backoff import DecorrelatedJitter, EqualJitter, FullJitter, GrpcBackoff, LowerBoundJitter
from meshlb.resilience.retry_on import call_state


class Fixed(Random):
    """Envoy's tests: the same random number each time, taken modulo what is asked for."""

    def __init__(self, value: int) -> None:
        super().__init__(1)
        self._value = value

    def randrange(self, start: int, *rest: Any) -> int:
        assert not rest
        return self._value % start


def milliseconds(wait: Any, count: int) -> list[int]:
    return [round(1000 * wait(call_state(attempt, 0.0, None))) for attempt in range(1, count + 1)]


@pytest.mark.parametrize(
    ("base", "cap", "random", "expected"),
    [
        (0.025, 0.030, 27, [2, 27]),
        (0.005, 0.100, 9999, [4, 9, 19, 39, 79, 99, 99]),
        (0.005, 0.100, 9999, [4]),  # after reset
    ],
)
def test_envoy_jittered_exponential(base: float, cap: float, random: int, expected: list[int]) -> None:
    assert milliseconds(FullJitter(base, cap, Fixed(random)), len(expected)) == expected


@pytest.mark.parametrize(("random", "expected"), [(22, 522), (9999, 749)])
def test_envoy_jittered_lower_bound(random: int, expected: int) -> None:
    assert milliseconds(LowerBoundJitter(0.5, Fixed(random)), 1) == [expected]


def test_envoy_defaults_of_a_retry() -> None:
    tops = [24, 49, 99, 199, 249, 249]
    found = [milliseconds(FullJitter(0.025, 0.25, Random(seed)), 6) for seed in range(2000)]
    assert [max(row) for row in zip(*found, strict=True)] == tops
    assert [min(row) for row in zip(*found, strict=True)] == [0] * 6


BOUNDS = [(0.08, 0.12), (0.16, 0.24), (0.32, 0.48), (0.64, 0.96), (0.8, 1.2)]


def test_grpc_a6_bounds() -> None:
    for seed in range(500):
        wait = GrpcBackoff(0.1, 1.0, 2.0, Random(seed))
        for attempt, (least, most) in enumerate(BOUNDS, 1):
            assert least <= wait(call_state(attempt, 0.0, None)) <= most


def test_grpc_a6_the_series_begins_anew_after_a_pushback() -> None:
    backoff = Backoff(Retry(max_attempts=9, wait=GrpcBackoff(0.1, 1.0, 2.0, Random(1))))
    bounds = [*BOUNDS[:3], None, *BOUNDS[:3]]
    for attempt, bound in enumerate(bounds, 1):
        pause = 3.5 if bound is None else None
        wait = backoff.next_wait(attempt, 0.0, None, pause=pause, hinted=bound is None)
        assert wait is not None
        assert wait == 3.5 if bound is None else bound[0] <= wait <= bound[1]


def test_grpc_a6_does_not_overflow() -> None:
    assert GrpcBackoff(0.1, 5.0, 1e10, Random(1))(call_state(1000, 0.0, None)) <= 6.0


def test_stamina_defaults_out_of_tenacitys_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # newer versions call it multiplier, older ones know only it
        wait = tenacity.wait_exponential_jitter(initial=0.1, max=5, exp_base=2, jitter=1)
    bounds = [(0.1, 1.1), (0.2, 1.2), (0.4, 1.4), (0.8, 1.8), (1.6, 2.6), (3.2, 4.2), (5, 5)]
    backoff = Backoff(Retry(max_attempts=9, wait=wait))
    for attempt, (least, most) in enumerate(bounds, 1):
        found = backoff.next_wait(attempt, 0.0, None)
        assert found is not None
        assert least <= found <= most


def test_aws_equal_and_decorrelated() -> None:
    for seed in range(300):
        equal = EqualJitter(0.1, 1.0, Random(seed))
        for attempt, top in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0], 1):
            assert top / 2 <= equal(call_state(attempt, 0.0, None)) <= top
        backoff = Backoff(Retry(max_attempts=9, wait=DecorrelatedJitter(0.1, 1.0, Random(seed))))
        previous = 0.1
        for attempt in range(1, 8):
            wait = backoff.next_wait(attempt, 0.0, None)
            assert wait is not None
            assert 0.1 <= wait <= min(1.0, 3 * previous)
            previous = wait


def test_they_add_up_with_tenacitys() -> None:
    both = FullJitter(0.005, 0.1, Fixed(9999)) + tenacity.wait_fixed(1)
    assert both(call_state(1, 0.0, None)) == pytest.approx(1.004)
    assert (tenacity.wait_fixed(1) + LowerBoundJitter(0.5, Fixed(22)))(call_state(1, 0.0, None)) == pytest.approx(1.522)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FullJitter(0, 1), "FullJitter.base"),
        (lambda: FullJitter(1, 0.5), "FullJitter.cap"),
        (lambda: EqualJitter(-1, 1), "EqualJitter.base"),
        (lambda: DecorrelatedJitter(1, float("inf")), "DecorrelatedJitter.cap"),
        (lambda: LowerBoundJitter(0), "LowerBoundJitter.base"),
        (lambda: GrpcBackoff(0, 1, 2), "GrpcBackoff.initial"),
        (lambda: GrpcBackoff(1, 1, 0), "GrpcBackoff.multiplier"),
    ],
)
def test_bad_settings(make: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make()
