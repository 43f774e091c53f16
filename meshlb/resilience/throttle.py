"""Throttles that look at how a service fails, beside the budget, which looks at how much is retried.

``RetryThrottle`` is gRFC A6's: it stops retries and hedges, never calls. ``AdaptiveThrottle`` is of Google's "Site
Reliability Engineering" (chapter 21, "Client-Side Throttling"): it refuses calls here, before they cost the overloaded
service anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Final

from meshlb._validate import number
from meshlb.errors import ConfigError

_MILLI: Final = 1000
"""Tokens are counted in thousandths, as in gRPC's core: A6 gives ``tokenRatio`` three decimals, and integers add up
exactly."""

_SLICES: Final = 12
"""The window moves in twelfths: 10 s of the 2 minutes."""


@dataclass(frozen=True, slots=True)
class RetryThrottling:
    """``retryThrottling`` of a gRPC service config (gRFC A6).

    ``max_tokens`` (above 0, at most 1000): what the bucket holds, and begins with. ``token_ratio`` (above 0; three
    decimals count): what a success puts back. A failure takes one; retries and hedges are made only while more than
    half of ``max_tokens`` is there. Raises ConfigError naming the field.
    """

    max_tokens: float
    token_ratio: float

    def __post_init__(self) -> None:
        number("RetryThrottling.max_tokens", self.max_tokens, above=0, most=1000)
        number("RetryThrottling.token_ratio", self.token_ratio, above=0, most=1000)
        if int(self.token_ratio * _MILLI + 1e-9) == 0:
            raise ConfigError(f"RetryThrottling.token_ratio: {self.token_ratio!r} is below 0.001, its last decimal")


class RetryThrottle:
    """The token bucket of one service, shared by all its methods. Safe from any thread."""

    __slots__ = ("_lock", "_max", "_ratio", "_tokens", "options")

    def __init__(self, options: RetryThrottling, previous: RetryThrottle | None = None) -> None:
        """``previous``: the bucket that this one replaces; it begins as full as that one is (gRPC's core)."""
        self.options = options
        self._max = round(options.max_tokens * _MILLI)
        self._ratio = int(options.token_ratio * _MILLI + 1e-9)
        self._tokens: int = self._max if previous is None else self._max * previous._tokens // previous._max
        self._lock = threading.Lock()

    def failed(self) -> bool:
        """Note a retryable failure, or a pushback that forbids a retry. Whether a retry may follow: asked after the
        token has been taken, and strictly more than half must be left."""
        with self._lock:
            self._tokens = max(0, self._tokens - _MILLI)
            return 2 * self._tokens > self._max

    def succeeded(self) -> None:
        """Note a success. Next to free while the bucket is full, which is what it is on a good day."""
        if self._tokens < self._max:
            with self._lock:
                self._tokens = min(self._max, self._tokens + self._ratio)

    @property
    def allows(self) -> bool:
        """Whether a hedge may be sent now."""
        return 2 * self._tokens > self._max

    @property
    def tokens(self) -> float:
        """What is in the bucket."""
        return self._tokens / _MILLI


@dataclass(frozen=True, slots=True)
class AdaptiveThrottling:
    """Refuse calls locally, in proportion to how many the service turns away.

    * ``k``: calls sent for each one that the service accepts, before any is refused here (2.0, the book's: half of what
      is sent still tells how the service does; nearer to 1 protects it more and notices its recovery later).
    * ``window``: seconds that count (120, the book's two minutes; it must exceed the latency of a call by far).
    * ``most``: share of the calls that is refused at most (0.9: one in ten always goes through, which is how the end of
      the overload is noticed; Envoy's admission control has 0.8).

    Raises ConfigError naming the field.
    """

    k: float = 2.0
    window: float = 120.0
    most: float = 0.9

    def __post_init__(self) -> None:
        number("AdaptiveThrottling.k", self.k, least=1, most=1000)
        number("AdaptiveThrottling.window", self.window, least=1, most=3600)
        number("AdaptiveThrottling.most", self.most, above=0, most=1)


def rejection_probability(requests: float, accepts: float, k: float) -> float:
    """``max(0, (requests - K * accepts) / (requests + 1))``: the share of calls to refuse locally."""
    return max(0.0, (requests - k * accepts) / (requests + 1))


class AdaptiveThrottle:
    """The running counts of one service. Safe from any thread.

    A request counts when it is made and as accepted until it was turned away: slow successes must not look like
    rejections (zeromicro/go-zero#5011). What is refused here counts as a request that was not accepted, as in the book.
    """

    __slots__ = ("_clock", "_history", "_lock", "_made", "_options", "_random", "_rejected", "_requests", "_span",
                 "_until", "_watching", "refused")  # fmt: skip

    def __init__(self, options: AdaptiveThrottling, clock: Callable[[], float], random: Random) -> None:
        self._options = options
        self._clock = clock
        self._random = random
        self._lock = threading.Lock()
        self._span = options.window / _SLICES
        self._until = clock() + self._span
        self._made = count(1).__next__
        # Calls made and turned away up to the end of each slice, the oldest first.
        self._history: list[tuple[int, int]] = [(0, 0)] * _SLICES
        self._requests = 0
        self._rejected = 0
        self.refused = 0
        """Calls refused here."""
        self._watching = False
        """Something was turned away within the window. Otherwise nothing can be refused, and no lock is taken."""

    def admit(self) -> bool:
        """Note a call that is about to be made; False if it is to be refused here instead."""
        now = self._clock()
        if not self._watching and now < self._until:
            self._requests = self._made()
            return True
        with self._lock:
            self._move(now)
            refused = self._watching and self._random.random() < self._probability()
            self._requests = self._made()
            self._rejected += refused
            self.refused += refused
            return not refused

    def made(self) -> None:
        """Note a retry, which nobody refuses here: it has been paid for."""
        self._requests = self._made()

    def rejected(self) -> None:
        """Note that the service turned an admitted call away."""
        now = self._clock()
        with self._lock:
            self._move(now)
            self._rejected += 1
            self._watching = True

    @property
    def probability(self) -> float:
        """The share of calls that would be refused now."""
        with self._lock:
            self._move(self._clock())
            return self._probability()

    def _probability(self) -> float:
        before, rejected_before = self._history[0]
        requests = self._requests - before
        accepts = requests - (self._rejected - rejected_before)
        return min(self._options.most, rejection_probability(requests, accepts, self._options.k))

    def _move(self, now: float) -> None:
        if now < self._until:
            return
        passed = min(_SLICES, 1 + int((now - self._until) / self._span))
        self._until = max(self._until + passed * self._span, now)
        state = (self._requests, self._rejected)
        self._history = [*self._history[passed:], *[state] * passed]
        self._watching = self._rejected > self._history[0][1]
