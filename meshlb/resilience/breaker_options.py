"""The settings of circuit breakers, and what their listeners are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from meshlb._validate import integer, number, seconds
from meshlb.errors import ConfigError
from meshlb.model import Endpoint

_MOST_CALLS: Final = 1_000_000
"""Calls of a window. Each takes memory, for each endpoint."""


@dataclass(frozen=True, slots=True)
class StateChange:
    """An endpoint was taken out of rotation, is probed, or is back; by its breaker, by outlier detection, or by hand.

    ``before`` and ``after`` are values of ``meshlb.topology.Standing``: "ready", "open", "half_open", "ejected".
    ``reason``: why, in words; empty when it is back.
    """

    service: str
    endpoint: Endpoint
    before: str
    after: str
    reason: str


StateListener = Callable[[StateChange], object]


@dataclass(frozen=True, slots=True)
class Breaker:
    """When an endpoint is taken out of rotation, and how it comes back.

    It opens by whichever comes first:

    * ``consecutive_failures``: failures in a row (5: Envoy's and Finagle's default). None: not by that.
    * ``failure_rate``: share of the calls in the window that failed or were refused for overload (0.5, with
      ``minimum_calls`` and ``window`` as in Hystrix: half of the calls failing is seen however they are mixed with good
      ones, and a few errors of the application are no reason to lose an endpoint). None: not by that.
    * ``slow_call_rate``: share of the calls in the window whose response took longer than ``slow_call_duration``
      seconds to start (0.5). Off by default, ``slow_call_duration=None``: what is slow, only the service knows.
    * ``window``: seconds that calls count (10), or ``window_calls``: that many of the last calls count instead.
    * ``minimum_calls``: no rate is judged by fewer calls (20); at most ``window_calls``.

    It is out for a time that doubles when it has to open again, and shrinks again with good time:

    * ``open_time``: seconds out at first (1: Linkerd's; a probe is one call that is retried elsewhere if it fails).
    * ``max_open_time``: seconds out at most after repeated failures (30: an endpoint that has come back should
      not wait for a minute; Linkerd's 60 is for clients that do not retry a failed probe).
    * ``jitter``: up to this share is added at random to each time out, so that many clients do not probe at once
      (0.5: Linkerd's).
    * ``decay_time``: seconds of being closed that take back one doubling (10: the interval after which Envoy and gRFC
      A50 take back one step of theirs).

    Then it is half-open:

    * ``half_open_calls``: calls let through while probing (1: Hystrix's, Finagle's and Linkerd's). They are judged
      together, by the rates above; without ``failure_rate`` all have to go well.
    * ``probe_timeout``: seconds after which a probe that was never closed gives its place back (10): a lost permit
      must not keep an endpoint out for ever, as it does in resilience4j (its issues 903, 935, 2172).

    ``listeners``: functions of a ``StateChange``, called on the control loop's thread, off every call's path; what one
    raises is logged. They must not block.

    Raises ConfigError naming the field.
    """

    consecutive_failures: int | None = 5
    failure_rate: float | None = 0.5
    slow_call_duration: float | None = None
    slow_call_rate: float = 0.5
    window: float = 10.0
    window_calls: int | None = None
    minimum_calls: int = 20
    open_time: float = 1.0
    max_open_time: float = 30.0
    jitter: float = 0.5
    decay_time: float = 10.0
    half_open_calls: int = 1
    probe_timeout: float = 10.0
    listeners: tuple[StateListener, ...] = ()

    def __post_init__(self) -> None:
        if self.consecutive_failures is not None:
            integer("Breaker.consecutive_failures", self.consecutive_failures, least=1)
        if self.failure_rate is not None:
            number("Breaker.failure_rate", self.failure_rate, above=0, most=1)
        seconds("Breaker.slow_call_duration", self.slow_call_duration, optional=True)
        number("Breaker.slow_call_rate", self.slow_call_rate, above=0, most=1)
        if self.consecutive_failures is None and self.failure_rate is None and self.slow_call_duration is None:
            raise ConfigError(
                "Breaker.consecutive_failures: None, and failure_rate and slow_call_duration too: it would never open "
                "(ServiceConfig.breaker=None switches circuit breaking off)"
            )
        seconds("Breaker.window", self.window)
        if self.window_calls is not None:
            integer("Breaker.window_calls", self.window_calls, least=1, most=_MOST_CALLS)
        integer("Breaker.minimum_calls", self.minimum_calls, least=1)
        seconds("Breaker.open_time", self.open_time)
        seconds("Breaker.max_open_time", self.max_open_time)
        if self.max_open_time < self.open_time:
            raise ConfigError(
                f"Breaker.max_open_time: {self.max_open_time!r} is below Breaker.open_time ({self.open_time!r})"
            )
        number("Breaker.jitter", self.jitter, least=0, most=1)
        seconds("Breaker.decay_time", self.decay_time)
        integer("Breaker.half_open_calls", self.half_open_calls, least=1)
        seconds("Breaker.probe_timeout", self.probe_timeout)
        object.__setattr__(self, "listeners", checked_listeners("Breaker.listeners", self.listeners))


def checked_listeners(field: str, listeners: Iterable[StateListener]) -> tuple[StateListener, ...]:
    """Raises ConfigError naming ``field`` for what is not a sequence of functions."""
    if isinstance(listeners, str | bytes) or not isinstance(listeners, Iterable):
        raise ConfigError(f"{field}: {listeners!r} is not a sequence of functions")
    listeners = tuple(listeners)
    for listener in listeners:
        if not callable(listener):
            raise ConfigError(f"{field}: {listener!r} is not a function")
    return listeners
