"""The circuit breaker of one endpoint: a state machine without clock, lock or I/O of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Final

from meshlb._validate import integer, number, seconds
from meshlb.errors import ConfigError

_GROWTH: Final = 2.0
"""Each failed probe doubles the time out, as Linkerd's and gRPC's exponential back-off do."""

_LONGEST_STREAK: Final = 64
"""Where doubling stops: far beyond any ``max_open_time``, far below what a float can hold."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """When an endpoint is taken out of rotation, and how it comes back.

    * ``consecutive_failures``: failures in a row that open it (5: Envoy's and Finagle's default).
    * ``open_time``: seconds out at first (1: Linkerd's; a probe is one call that is retried elsewhere if it fails).
    * ``max_open_time``: seconds out at most after repeated failed probes (30: an endpoint that has come back should
      not wait for a minute; Linkerd's 60 is for clients that do not retry a failed probe).
    * ``jitter``: up to this share is added at random to each time out, so that many clients do not probe at once
      (0.5: Linkerd's).
    * ``half_open_calls``: calls let through at once while probing, and successes needed to close (1: Hystrix's,
      Finagle's and Linkerd's).
    * ``probe_timeout``: seconds after which a probe that was never closed gives its place back (10): a lost permit
      must not keep an endpoint out for ever, as it does in resilience4j (its issues 903, 935, 2172).

    Raises ConfigError naming the field.
    """

    consecutive_failures: int = 5
    open_time: float = 1.0
    max_open_time: float = 30.0
    jitter: float = 0.5
    half_open_calls: int = 1
    probe_timeout: float = 10.0

    def __post_init__(self) -> None:
        integer("Breaker.consecutive_failures", self.consecutive_failures, least=1)
        seconds("Breaker.open_time", self.open_time)
        seconds("Breaker.max_open_time", self.max_open_time)
        if self.max_open_time < self.open_time:
            raise ConfigError(
                f"Breaker.max_open_time: {self.max_open_time!r} is below Breaker.open_time ({self.open_time!r})"
            )
        number("Breaker.jitter", self.jitter, least=0, most=1)
        integer("Breaker.half_open_calls", self.half_open_calls, least=1)
        seconds("Breaker.probe_timeout", self.probe_timeout)


class BreakerState(Enum):
    """Closed lets calls through, open does not, half-open lets a counted few through to find out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """One endpoint's breaker. The owner serialises calls to it and passes the time in (seconds, monotonic).

    ``generation`` grows with every change of state. An attempt remembers the generation it began in and when it began;
    what it later reports is ignored if the state has changed since (an answer to a call from before the opening says
    nothing about the probe). Only a probe's own result moves a half-open breaker.
    """

    __slots__ = ("_options", "_permits", "_random", "_streak", "_successes", "failures", "generation", "reason",
                 "retry_at", "state")  # fmt: skip

    def __init__(self, options: Breaker, random: Random) -> None:
        self._options = options
        self._random = random
        self._streak = 0
        self._successes = 0
        self._permits: list[float] = []
        """Starting times of the probes under way."""
        self.failures = 0
        """Failures in a row while closed."""
        self.generation = 0
        self.reason = ""
        """Why it was last opened, in words."""
        self.retry_at = 0.0
        """When an open breaker may be probed."""
        self.state = BreakerState.CLOSED

    def acquire(self, now: float) -> bool:
        """Let one call through that starts now, taking a probe's place if half-open."""
        if self.state is not BreakerState.HALF_OPEN:
            return self.state is BreakerState.CLOSED
        lost = now - self._options.probe_timeout
        self._permits = [started for started in self._permits if started > lost]
        if len(self._permits) >= self._options.half_open_calls:
            return False
        self._permits.append(now)
        return True

    def succeeded(self, generation: int, started: float) -> bool:
        """Note a success. True if the state changed (half-open to closed)."""
        if generation != self.generation:
            return False
        if self.state is BreakerState.CLOSED:
            self.failures = 0
            return False
        if self.state is BreakerState.OPEN:
            return False
        self._return_permit(started)
        self._successes += 1
        if self._successes < self._options.half_open_calls:
            return False
        self._streak = 0
        self.failures = 0
        self.reason = ""
        self._enter(BreakerState.CLOSED)
        return True

    def failed(self, generation: int, started: float) -> bool:
        """Note a failure. True if the breaker should open now: the owner then calls ``open``, if it may."""
        if generation != self.generation:
            return False
        if self.state is BreakerState.CLOSED:
            self.failures += 1
            return self.failures >= self._options.consecutive_failures
        if self.state is BreakerState.HALF_OPEN:
            self._return_permit(started)
            return True
        return False

    def ignored(self, generation: int, started: float) -> None:
        """Note an attempt that proved nothing (cancelled, local trouble): its probe's place is free again."""
        if generation == self.generation and self.state is BreakerState.HALF_OPEN:
            self._return_permit(started)

    def open(self, now: float, reason: str) -> float:
        """Take the endpoint out; returns for how many seconds."""
        options = self._options
        base = min(options.open_time * _GROWTH**self._streak, options.max_open_time)
        duration = min(base * (1.0 + options.jitter * self._random.random()), options.max_open_time)
        self._streak = min(self._streak + 1, _LONGEST_STREAK)
        self.reason = reason
        self.retry_at = now + duration
        self._enter(BreakerState.OPEN)
        return duration

    def poll(self, now: float) -> bool:
        """Let time pass: True if an open breaker has just become half-open."""
        if self.state is BreakerState.OPEN and now >= self.retry_at:
            self._enter(BreakerState.HALF_OPEN)
            return True
        return False

    def probe_now(self, now: float) -> bool:
        """Skip the rest of the time out, because something else says that the endpoint is back. True if changed."""
        self.retry_at = min(self.retry_at, now)
        return self.poll(now)

    def forget_probes(self) -> None:
        """Free every probe's place: for the child of a fork, which has none of the parent's attempts."""
        self._permits = []

    def _return_permit(self, started: float) -> None:
        try:
            self._permits.remove(started)
        except ValueError:
            pass  # it had been given up for lost

    def _enter(self, state: BreakerState) -> None:
        self.state = state
        self.generation += 1
        self._successes = 0
        self._permits = []
