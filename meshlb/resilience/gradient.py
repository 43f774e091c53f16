"""Adaptive concurrency: a limit that follows from how latency answers to load. Pure, with time as a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshlb._validate import integer, number, seconds
from meshlb.errors import ConfigError

_WARM_UP: Final = 10
"""Samples that the long-term latency starts with as a plain average (Netflix ``ExpAvgMeasurement``)."""

_DRIFT: Final = 0.95
"""What the long-term latency is multiplied by while it is more than twice the current one: after a long overload it
must not take as long again to come down."""

_LEAST_GRADIENT: Final = 0.5
"""A limit is at most halved (before smoothing) by one window, however slow it was: one outlier must not shed load."""


@dataclass(frozen=True, slots=True)
class Gradient2:
    """Netflix's adaptive limit (``concurrency-limits``: ``Gradient2Limit``, within its ``WindowedLimit``).

    While the latency of the last window is near the long-term one, the limit grows by ``queue_size`` a window; when
    calls begin to queue at the endpoint, latency rises and the limit falls in proportion.

    * ``initial_limit`` (20), ``min_limit`` (20), ``max_limit`` (200): attempts at once.
    * ``queue_size``: how many waiting calls are tolerated at the endpoint (4).
    * ``smoothing``: how much of a new estimate is taken over at once (0.2).
    * ``tolerance``: how much slower than usual counts as usual (1.5).
    * ``long_window``: windows that the long-term latency is averaged over (600: ten minutes of traffic).
    * ``window``: seconds of a window (1), with ``window_calls`` (10) calls at least.

    Raises ConfigError naming the field.
    """

    initial_limit: int = 20
    min_limit: int = 20
    max_limit: int = 200
    queue_size: int = 4
    smoothing: float = 0.2
    tolerance: float = 1.5
    long_window: int = 600
    window: float = 1.0
    window_calls: int = 10

    def __post_init__(self) -> None:
        integer("Gradient2.min_limit", self.min_limit, least=1)
        integer("Gradient2.max_limit", self.max_limit, least=1)
        if self.max_limit < self.min_limit:
            raise ConfigError(f"Gradient2.max_limit: {self.max_limit!r} is below Gradient2.min_limit")
        integer("Gradient2.initial_limit", self.initial_limit, least=self.min_limit, most=self.max_limit)
        integer("Gradient2.queue_size", self.queue_size, least=1)
        number("Gradient2.smoothing", self.smoothing, above=0, most=1)
        number("Gradient2.tolerance", self.tolerance, least=1)
        integer("Gradient2.long_window", self.long_window, least=1)
        seconds("Gradient2.window", self.window)
        integer("Gradient2.window_calls", self.window_calls, least=1)


class GradientLimit:
    """One endpoint's adaptive limit. Not safe by itself: its owner serialises calls to it."""

    __slots__ = ("_estimate", "_long", "_options", "_peak", "_samples", "_sum", "_updates", "_window_ends", "limit")

    def __init__(self, options: Gradient2) -> None:
        self._options = options
        self._estimate = float(options.initial_limit)
        self.limit = options.initial_limit
        """Attempts that may be under way at once."""
        self._long = 0.0
        self._updates = 0
        self._window_ends: float | None = None
        self._sum = 0.0
        self._samples = 0
        self._peak = 0

    def observe(self, latency: float, in_flight: int, now: float) -> None:
        """Take in a good answer that took ``latency`` seconds, with ``in_flight`` attempts under way, its own
        included. The limit is computed anew once a window's time is up and it has enough of them."""
        if self._window_ends is None:
            self._window_ends = now + self._options.window
        self._sum += latency
        self._samples += 1
        if in_flight > self._peak:
            self._peak = in_flight
        if now >= self._window_ends and self._samples >= self._options.window_calls:
            self.update(self._sum / self._samples, self._peak)
            self._window_ends = now + self._options.window
            self._sum, self._samples, self._peak = 0.0, 0, 0

    def update(self, latency: float, in_flight: int) -> int:
        """The step of the algorithm: the average latency of a window and its most attempts at once; the new limit."""
        options = self._options
        long_term = self._average(latency)
        if latency <= 0.0:  # below the clock's resolution: nothing to learn from
            return self.limit
        if long_term / latency > 2.0:
            self._long *= _DRIFT
        if in_flight < self._estimate / 2:  # the load is not what limits it
            return self.limit
        gradient = max(_LEAST_GRADIENT, min(1.0, options.tolerance * long_term / latency))
        target = self._estimate * gradient + options.queue_size
        smoothed = self._estimate * (1.0 - options.smoothing) + target * options.smoothing
        self._estimate = max(float(options.min_limit), min(float(options.max_limit), smoothed))
        self.limit = int(self._estimate)
        return self.limit

    def _average(self, latency: float) -> float:
        if self._updates < _WARM_UP:
            self._updates += 1
            self._long += (latency - self._long) / self._updates
        else:
            weight = 2.0 / (self._options.long_window + 1)
            self._long += (latency - self._long) * weight
        return self._long
