"""Active-passive: one tier carries everything, the next one takes over at once, and the first comes back slowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_STEPS: Final = 10
"""Steps in which a tier's share is brought back: 10 % at a time."""

_SHORTEST_STEP: Final = 0.05
"""Seconds between two steps, at least: a view is built for each."""


@dataclass(frozen=True, slots=True)
class TierHealth:
    """What the choice goes by. ``usable``: it can carry the load if need be; ``good``: it is well enough that the load
    may go back to it."""

    name: str
    usable: bool
    good: bool


class ActivePassive:
    """Which tier is active. Keeps what it must remember by the tiers' names; the clock's readings are handed in.

    Failing over is immediate: to the first tier in order that is usable. Failing back is not: a tier before the active
    one has to be good without a break for ``failback_delay`` seconds, and then gets its load over ``ramp`` seconds. So
    a primary that flaps moves nothing, and one that comes back cold is not run over. (Of the systems compared, gRPC A56
    and Envoy switch back at once; HAProxy has the ramp.)
    """

    __slots__ = ("_active", "_delay", "_from", "_good_since", "_ramp", "_started")

    def __init__(self, failback_delay: float, ramp: float) -> None:
        self._delay = failback_delay
        self._ramp = ramp
        self._active: str | None = None
        self._from: str | None = None
        """The tier that still has a part of the load while it goes back to the active one."""
        self._started = 0.0
        self._good_since: dict[str, float] = {}

    @property
    def active(self) -> str | None:
        """The tier in use; None before the first choice."""
        return self._active

    def shares(self, tiers: Sequence[TierHealth], now: float) -> dict[str, float]:
        """The tiers that get traffic, and how much of it (together 1); empty if none is usable. ``tiers``: in order of
        preference."""
        self._good_since = {tier.name: self._good_since.get(tier.name, now) for tier in tiers if tier.good}
        usable = [tier.name for tier in tiers if tier.usable]
        if not usable:
            return {}
        if self._active not in usable:
            self._active = self._from if self._from in usable else usable[0]
            self._from = None
        for tier in tiers:
            if tier.name == self._active:
                break
            if tier.usable and tier.good and now - self._good_since[tier.name] >= self._delay:
                self._active, self._from, self._started = tier.name, self._active, now
                break
        elapsed = now - self._started
        if self._from is None or self._from not in usable or elapsed >= self._ramp:
            self._from = None
            return {self._active: 1.0}
        share = max(1 / _STEPS, elapsed / self._ramp)
        return {self._active: share, self._from: 1.0 - share}

    def next_change(self, tiers: Sequence[TierHealth], now: float) -> float | None:
        """Seconds until the shares change by themselves; None if nothing is under way."""
        due = []
        for tier in tiers:
            if tier.name == self._active:
                break
            if tier.usable and tier.good:
                due.append(max(0.0, self._good_since[tier.name] + self._delay - now))
        if self._from is not None:
            due.append(max(self._ramp / _STEPS, _SHORTEST_STEP))
        return min(due, default=None)

    def waits(self, name: str, now: float) -> float | None:
        """Seconds that a tier which is good again still has to stay so before the load goes back to it."""
        since = self._good_since.get(name)
        return None if since is None else max(0.0, since + self._delay - now)
