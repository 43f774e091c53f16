"""Slow start: a new endpoint's share grows over a window instead of starting in full."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from meshlb._validate import number, seconds

KeyT = TypeVar("KeyT", bound=Hashable)

_STEPS: Final = 10
"""Times per window that weights are made anew: steps of a tenth, no more than a server that warms up would notice."""

_SHORTEST_STEP: Final = 1.0
"""Seconds between two such times at least: a view costs milliseconds at thousands of endpoints."""


@dataclass(frozen=True, slots=True)
class SlowStart:
    """How the share of an endpoint grows that has just come, or come back.

    Its factor is ``(age / window) ** (1 / aggression)``, at least ``min_weight_percent``, and 1 from the end of the
    window on (Envoy's ``slow_start_config``, with its names and defaults).

    ``window``: seconds (60: what a runtime takes to fill its caches and compile its hot paths). ``aggression``: 1.0
    grows linearly, more grows faster at first, less more slowly. ``min_weight_percent``: what it begins with (10: with
    1, endpoints were seen to starve, envoyproxy/envoy#29259, so that is the least).

    Raises ConfigError naming the field.
    """

    window: float = 60.0
    aggression: float = 1.0
    min_weight_percent: float = 10.0

    def __post_init__(self) -> None:
        seconds("SlowStart.window", self.window)
        number("SlowStart.aggression", self.aggression, least=0.01, most=100)
        number("SlowStart.min_weight_percent", self.min_weight_percent, least=1, most=100)


def slow_start_factor(
    age: float, window: float, *, aggression: float = 1.0, minimum: float = 0.1, floor: float = 0.001
) -> float:
    """What an endpoint's weight is multiplied by, ``age`` seconds after it was added or became healthy.

    ``max(minimum, (max(age, floor) / window) ** (1 / aggression))``, 1 from the end of the window on (Envoy
    ``load_balancer_impl.cc``, whose floor is a millisecond although its documentation says a second).
    """
    if age >= window:
        return 1.0
    return max(minimum, math.pow(max(age, floor) / window, 1.0 / aggression))


def slow_start_factors(
    ages: Sequence[float], window: float, *, aggression: float = 1.0, minimum: float = 0.1, floor: float = 0.001
) -> list[float]:
    """The factors of a whole set. All 1 while everybody is new: then it is the caller that has just started, and a
    ramp would slow nobody's cold cache and only skew the load (HAProxy and Dubbo leave it out then too)."""
    if all(age < window for age in ages):
        return [1.0] * len(ages)
    return [slow_start_factor(age, window, aggression=aggression, minimum=minimum, floor=floor) for age in ages]


class Ramp:
    """One endpoint's slow start: its factor as a function of time."""

    __slots__ = ("_options", "started")

    def __init__(self, options: SlowStart, started: float) -> None:
        self._options = options
        self.started = started

    def at(self, now: float) -> float:
        """The factor at a clock reading, above 0 and up to 1."""
        options = self._options
        return slow_start_factor(
            now - self.started,
            options.window,
            aggression=options.aggression,
            minimum=options.min_weight_percent / 100.0,
        )


class Ramps(Generic[KeyT]):
    """Who of a changing set of endpoints is in slow start. Not safe by itself: its cluster serialises changes.

    An endpoint starts slowly if it was not among those of before, whatever the reason, and others are established that
    can carry the load meanwhile. Established are those of the registry's first answer (it is this process that is new
    then), and whoever has been in for a window. So nobody is slowed where everybody is new: at the start of the
    process, at the first deployment of a service, and after a total outage, when endpoints come back one after the
    other and the first of them must not be left alone with all of the load.
    """

    __slots__ = ("_options", "_ramps", "_since")

    def __init__(self, options: SlowStart) -> None:
        self._options = options
        self._since: dict[KeyT, float] | None = None
        self._ramps: dict[KeyT, Ramp] = {}

    def update(self, present: Iterable[KeyT], now: float, *, panic: bool = False) -> dict[KeyT, Ramp]:
        """Take note of who can be called now; the ramps of those in slow start.

        ``panic``: everybody is used since too few are healthy. Nobody is spared then, and who has borne that needs no
        slow start afterwards.
        """
        window = self._options.window
        before = self._since
        since: dict[KeyT, float]
        if before is None:
            since = dict.fromkeys(present, -math.inf)
        else:
            since = {key: before.get(key, now) for key in present}
        self._since = since
        ramps = {key: ramp for key, ramp in self._ramps.items() if key in since and now - ramp.started < window}
        established = any(now - entered >= window for entered in since.values())
        if panic or not established:
            ramps = {}
        elif before is not None:
            ramps |= {key: Ramp(self._options, now) for key in since.keys() - before.keys()}
        self._ramps = ramps
        return ramps

    def rename(self, names: Mapping[KeyT, KeyT]) -> None:
        """Go on with others in the place of these: the child of a fork has endpoints of its own."""
        if self._since is not None:
            self._since = {names[key]: entered for key, entered in self._since.items() if key in names}
        self._ramps = {names[key]: ramp for key, ramp in self._ramps.items() if key in names}

    def next_change(self, now: float, *, steps: bool = True) -> float | None:
        """Seconds until the weights should be made anew; None while nobody is in slow start.

        ``steps``: also in between, not only when somebody has come to the end of it.
        """
        window = self._options.window
        if not self._ramps:
            return None
        soonest_end = min(ramp.started for ramp in self._ramps.values()) + window
        delay = min(window / _STEPS, soonest_end - now) if steps else soonest_end - now
        return max(delay, _SHORTEST_STEP)
