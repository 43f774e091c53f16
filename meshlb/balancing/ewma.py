"""The latency estimate of one endpoint: an exponentially weighted average that jumps to peaks."""

from __future__ import annotations

from math import exp, inf
from typing import Final

DEFAULT_DECAY: Final = 10.0
"""Seconds in which an old observation loses 63 % of its say. Finagle's, tower's and Linkerd's value: long enough to
ride out noise, short enough that a recovered endpoint is used again within a minute."""

FAILURE_PENALTY: Final = 5.0
"""Seconds that a failed call is taken to have cost, whatever it really took: without it the endpoint that fails
fastest looks best. Linkerd's ``load-biaser`` value."""

MAX_PENALTY: Final = 300.0
"""Ceiling in seconds for a server's own Retry-After hint. Linkerd's value: a hint of a day must not retire it."""


class PeakEwma:
    """Peak EWMA with pure reads, plus a failure penalty beside it.

    * ``observe``: a sample above the decayed estimate replaces it (a stall is believed at once), a smaller one is
      averaged in by elapsed time: ``w = exp(-dt / decay); value = value * w + sample * (1 - w)`` (Finagle
      ``PeakEwma.scala``, Linkerd ``linkerd/ewma``). With ``peak=False`` every sample is averaged.
    * ``at`` does not change anything, unlike Finagle's read, so it can be tested, logged and drawn.
    * ``penalize``: a failure weighs as a call of 5 seconds, or of the server's own hint. The penalty is kept apart
      from the measured latency and ends with the next success; inside the average a single failure would keep an
      endpoint away for a minute after it had recovered.

    Times are seconds of one monotonic clock. Samples not newer than the last one count as simultaneous.
    """

    __slots__ = ("decay", "has_history", "peak", "penalty", "penalty_stamp", "stamp", "value")

    def __init__(self, decay: float = DEFAULT_DECAY, *, peak: bool = True) -> None:
        self.decay = decay
        self.peak = peak
        self.value = 0.0
        self.stamp = -inf  # not 0: a clock that starts near 0 would make the first sample look like a small update
        self.penalty = 0.0
        self.penalty_stamp = -inf
        self.has_history = False
        """False until the first observation or penalty: unknown must mean neither "free" nor "never"."""

    def observe(self, sample: float, now: float) -> None:
        """Take in the latency of a success (seconds) and end a penalty."""
        if sample < 0.0:
            sample = 0.0  # a clock that went back; a negative cost would attract every call
        stamp = self.stamp
        weight = 1.0
        if stamp < now:  # by hand, as it is on every call's path: min() and max() cost more than the arithmetic
            weight = exp((stamp - now) / self.decay)  # 0 for the first sample, which is so taken whole
            self.stamp = now
        value = self.value * weight
        self.value = sample if self.peak and sample > value else value + sample * (1.0 - weight)
        self.penalty = 0.0
        self.has_history = True  # last: who reads it without a lock finds the value in place

    def penalize(self, now: float, hint: float | None = None) -> None:
        """Take in a failure. ``hint``: the server's Retry-After in seconds, capped at 300 and never below 5."""
        seconds = FAILURE_PENALTY
        if hint is not None and hint > FAILURE_PENALTY:  # False for NaN, which must not get into a cost
            seconds = min(hint, MAX_PENALTY)
        self.penalty = max(seconds, self._decayed(self.penalty, self.penalty_stamp, now))
        self.penalty_stamp = now
        self.has_history = True

    def at(self, now: float) -> float:
        """The estimate at ``now`` in seconds. It fades while nothing is heard, so a slow endpoint is tried again."""
        estimate = self._decayed(self.value, self.stamp, now)
        if self.penalty:
            return max(estimate, self._decayed(self.penalty, self.penalty_stamp, now))
        return estimate

    def is_penalized(self, now: float) -> bool:
        """Whether the last call failed, less than the penalty's length ago: five seconds, or the server's own wait."""
        return self.penalty > 0.0 and now - self.penalty_stamp < self.penalty

    def _decayed(self, value: float, stamp: float, now: float) -> float:
        return value * exp(min(stamp - now, 0.0) / self.decay)
