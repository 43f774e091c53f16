"""Waits that tenacity lacks, in its own shape: callables of a RetryCallState that combine with ``+``.

They stand beside ``tenacity.wait_*`` and are used alike: ``Retry(wait=FullJitter(0.025, 0.25))``. Seconds throughout;
``random`` is a parameter, so that a test or a simulation can decide.

======================  ==================================================  ==========================================
``FullJitter``          ``random % min(cap, base * 2**(n-1))``, whole ms     Envoy ``JitteredExponentialBackOff``
``LowerBoundJitter``    ``base + random % (base / 2)``, whole ms             Envoy ``JitteredLowerBoundBackOff``
``EqualJitter``         ``x / 2 + U(0, x / 2)``                              AWS "Exponential Backoff And Jitter"
``DecorrelatedJitter``  ``min(cap, U(base, 3 * previous))``                  the same; Finagle ``Backoff``
``GrpcBackoff``         ``min(initial * m**(n-1), max) * U(0.8, 1.2)``       gRFC A6
======================  ==================================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Final

from meshlb._validate import number, seconds
from meshlb.errors import ConfigError

if TYPE_CHECKING:
    from tenacity import RetryCallState

_MILLISECONDS: Final = 1000

_MOST_DOUBLINGS: Final = 64
"""Beyond, every series has reached its cap, and a float would overflow before long."""

_GRPC_JITTER: Final = 0.2
"""gRFC A6: plus or minus 20 %, so that a delay may exceed ``max_backoff`` by as much."""

_process_random: Final = Random()


class Jitter:
    """What the waits share: ``+`` with other waits, and the random source."""

    def __init__(self, random: Random | None) -> None:
        self._random = _process_random if random is None else random

    def __call__(self, retry_state: RetryCallState) -> float:
        raise NotImplementedError

    def __add__(self, other: Callable[[RetryCallState], float]) -> Callable[[RetryCallState], float]:
        from tenacity import wait_combine

        return wait_combine(self, other)

    def __radd__(self, other: Any) -> Any:
        return self if other == 0 else self.__add__(other)  # 0: sum() begins with it


class Exponential(Jitter):
    """A series that doubles from ``base`` and ends at ``cap``. Raises ConfigError naming the parameter."""

    def __init__(self, base: float, cap: float, random: Random | None = None) -> None:
        super().__init__(random)
        name = type(self).__name__
        seconds(f"{name}.base", base)
        seconds(f"{name}.cap", cap)
        if cap < base:
            raise ConfigError(f"{name}.cap: {cap!r} is below {name}.base ({base!r})")
        self.base = base
        self.cap = cap

    def interval(self, attempt: int) -> float:
        """The n-th interval, before any jitter."""
        return float(min(self.cap, self.base * 2 ** min(attempt - 1, _MOST_DOUBLINGS)))


class FullJitter(Exponential):
    """Anything from nothing to the whole interval, which spreads clients best (AWS: least work in total)."""

    def __call__(self, retry_state: RetryCallState) -> float:
        most = max(1, round(self.interval(retry_state.attempt_number) * _MILLISECONDS))
        return self._random.randrange(most) / _MILLISECONDS


class EqualJitter(Exponential):
    """Half the interval, and anything up to the other half."""

    def __call__(self, retry_state: RetryCallState) -> float:
        half = self.interval(retry_state.attempt_number) / 2
        return half + self._random.uniform(0.0, half)


class DecorrelatedJitter(Exponential):
    """From ``base`` to three times the wait before. A call's first wait counts as having followed ``base``."""

    def __call__(self, retry_state: RetryCallState) -> float:
        previous = getattr(retry_state, "upcoming_sleep", 0.0) or self.base
        return min(self.cap, self._random.uniform(self.base, max(self.base, 3 * previous)))


class LowerBoundJitter(Jitter):
    """At least ``base``, at most half as much again: for waits that somebody asked for. Raises ConfigError."""

    def __init__(self, base: float, random: Random | None = None) -> None:
        super().__init__(random)
        seconds("LowerBoundJitter.base", base)
        self.base = base

    def __call__(self, retry_state: RetryCallState) -> float:
        milliseconds = round(self.base * _MILLISECONDS)
        return (milliseconds + self._random.randrange(max(1, milliseconds // 2))) / _MILLISECONDS


class GrpcBackoff(Jitter):
    """gRFC A6. After a server's pushback the series begins anew at ``initial``. Raises ConfigError."""

    def __init__(self, initial: float, most: float, multiplier: float, random: Random | None = None) -> None:
        super().__init__(random)
        seconds("GrpcBackoff.initial", initial)
        seconds("GrpcBackoff.most", most)
        number("GrpcBackoff.multiplier", multiplier, above=0)
        self.initial = initial
        self.most = most
        self.multiplier = multiplier

    def __call__(self, retry_state: RetryCallState) -> float:
        nth = getattr(retry_state, "series", retry_state.attempt_number)
        try:
            interval = self.initial * self.multiplier ** (nth - 1)
        except OverflowError:
            interval = self.most
        return min(interval, self.most) * self._random.uniform(1 - _GRPC_JITTER, 1 + _GRPC_JITTER)
