"""Priorities: how load spills from one level of endpoints to the next, and when a level panics.

Envoy's arithmetic (``common/load_balancer_impl.cc``), in its own whole percents, over plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

OVERPROVISIONING: Final = 140
"""Percent. A level keeps all its load while at least 1 / 1.4 = 71.4 % of its endpoints are healthy (Envoy's default):
services are run with that much to spare, so that losing an endpoint or two moves nothing."""

PANIC_THRESHOLD: Final = 50
"""Percent of healthy endpoints (Envoy's default)."""


@dataclass(frozen=True, slots=True)
class PriorityLevel:
    """The endpoints of one priority: how many there are, and how many of them are healthy, degraded, or not to be
    counted at all (``excluded``: not warmed up yet)."""

    hosts: int
    healthy: int
    degraded: int = 0
    excluded: int = 0

    @property
    def counted(self) -> int:
        return self.hosts - self.excluded


@dataclass(frozen=True, slots=True)
class PriorityLoad:
    """The percent of the load that each level's healthy and degraded endpoints get (together 100), and whether a level
    is in panic: then its share goes to all of its endpoints."""

    healthy: tuple[int, ...]
    degraded: tuple[int, ...]
    panic: tuple[bool, ...]


def availability(healthy: int, counted: int, overprovisioning: int = OVERPROVISIONING) -> int:
    """Percent of its full load that a level with so many healthy endpoints can carry: at most 100; 0 if it is empty."""
    return min(100, overprovisioning * healthy // counted) if counted > 0 else 0


def priority_load(
    levels: Sequence[PriorityLevel],
    *,
    overprovisioning: int = OVERPROVISIONING,
    panic_threshold: int = PANIC_THRESHOLD,
    limits: Sequence[float] | None = None,
) -> PriorityLoad:
    """Split the load over the levels, the first one first.

    A level takes what it can carry, the next ones what is left; degraded endpoints come after all healthy ones. What
    rounding leaves over goes to the first level that has healthy (else degraded) endpoints. While the levels together
    cannot carry everything, one with less than ``panic_threshold`` percent healthy endpoints is in panic; once all are,
    the load is split by the number of endpoints, whatever their state. A threshold of 0 never panics; then, with
    nothing healthy at all, the load is assigned to the first level, which has nobody to give it to.

    ``limits``: the share (0 to 1) of its full load that each level may get for reasons other than health.
    """
    levels = list(levels)
    if not levels:
        return PriorityLoad((), (), ())
    able = [availability(level.healthy, level.counted, overprovisioning) for level in levels]
    degraded_able = [availability(level.degraded, level.counted, overprovisioning) for level in levels]
    together = min(100, sum(able) + sum(degraded_able))
    nothing = [0] * len(levels)
    if together == 0 and panic_threshold == 0:
        return PriorityLoad((100, *nothing[1:]), tuple(nothing), (False,) * len(levels))
    panic = tuple(together < 100 and _healthy_percent(level) < panic_threshold for level in levels)
    if all(panic):
        return PriorityLoad(_by_hosts(levels), tuple(nothing), panic)
    if limits is not None:  # only now: a level without headroom is no less healthy, and no reason to panic
        able = [max(1, int(percent * limit)) if percent else 0 for percent, limit in zip(able, limits, strict=True)]
        together = min(100, sum(able) + sum(degraded_able))
    healthy_load, left = _distribute(able, 100, together)
    degraded_load, left = _distribute(degraded_able, left, together)
    for percents, load in ((able, healthy_load), (degraded_able, degraded_load)):
        first = next((i for i, percent in enumerate(percents) if percent), None)
        if first is not None:
            load[first] += left
            break
    return PriorityLoad(tuple(healthy_load), tuple(degraded_load), panic)


def _distribute(able: list[int], left: int, together: int) -> tuple[list[int], int]:
    load = []
    for percent in able:
        share = min(left, percent * 100 // together) if together else 0
        load.append(share)
        left -= share
    return load, left


def _healthy_percent(level: PriorityLevel) -> float:
    return 100.0 * (level.healthy + level.degraded) / level.counted if level.counted > 0 else 0.0


def _by_hosts(levels: list[PriorityLevel]) -> tuple[int, ...]:
    hosts = [level.hosts for level in levels]
    total = sum(hosts)
    if not total:
        return (100, *[0] * (len(levels) - 1))
    load = [100 * count // total for count in hosts]
    load[next(i for i, count in enumerate(hosts) if count)] += 100 - sum(load)
    return tuple(load)
