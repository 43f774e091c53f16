"""Prequal's probe pool and its hot-cold lexicographic rule (Wydrowski et al., NSDI 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from operator import attrgetter
from typing import Final, Generic, TypeVar

T = TypeVar("T")

DEFAULT_QUANTILE: Final = 2**-0.25
"""The paper's Q_RIF, about 0.84: one replica in six counts as hot."""


@dataclass(slots=True, eq=False)  # two are the same only if they are one: lists look for them by that
class Probe(Generic[T]):
    """What a replica said of itself: requests in flight, and the latency in seconds that it has at that load."""

    replica: T
    in_flight: float
    latency: float
    received: float
    uses: int
    """How many more calls may be sent on the strength of it."""


def hot_threshold(in_flight: Iterable[float], quantile: float) -> float:
    """The number of requests in flight above which a replica is hot: that quantile of the pool.

    Quantile 0 makes every replica hot (fewest in flight wins), 1 makes none hot (lowest latency wins).
    """
    ordered = sorted(in_flight)
    return ordered[ceil(quantile * len(ordered)) - 1] if quantile > 0 else -inf


def _cold_limit(probes: Sequence[Probe[T]], quantile: float) -> float:
    """What divides hot from cold: the threshold, or infinity where it is the highest number of all, which none exceeds:
    with the default quantile up to six probes need not be sorted."""
    n = len(probes)
    return inf if ceil(quantile * n) == n else hot_threshold([probe.in_flight for probe in probes], quantile)


def choose_probe(probes: Sequence[Probe[T]], quantile: float = DEFAULT_QUANTILE) -> Probe[T]:
    """The hot-cold lexicographic rule: of the cold ones that with the lowest latency; if all are hot, the one with the
    fewest requests in flight. The other signal breaks ties, then the order of the pool."""
    threshold = _cold_limit(probes, quantile)
    best: Probe[T] | None = None
    lowest = inf
    for probe in probes:  # written out, since every call pays for it
        latency = probe.latency
        if (
            latency <= lowest
            and probe.in_flight <= threshold
            and (best is None or latency < lowest or probe.in_flight < best.in_flight)
        ):
            best, lowest = probe, latency
    return min(probes, key=lambda probe: (probe.in_flight, probe.latency)) if best is None else best


def worst_probe(probes: Sequence[Probe[T]], quantile: float = DEFAULT_QUANTILE) -> Probe[T]:
    """The one to drop: the hot one with the most requests in flight; if none is hot, that with the highest latency."""
    threshold = _cold_limit(probes, quantile)
    hot = [probe for probe in probes if probe.in_flight > threshold]
    if hot:
        return max(hot, key=attrgetter("in_flight"))
    return max(probes, key=attrgetter("latency"))


def reuse_bound(
    pool_size: int, replicas: int, probe_rate: float, remove_rate: float, delta: float = 1.0, most: float = 16.0
) -> float:
    """How often a probe may be used: ``max(1, (1 + delta) / ((1 - m/n) * probe_rate - remove_rate))``, up to ``most``.

    Rates are per call. Where the pool could hold every replica, or more is removed than comes in, there is no such
    number and ``most`` is taken.
    """
    surplus = (1.0 - pool_size / replicas) * probe_rate - remove_rate
    return min(max(1.0, (1.0 + delta) / surplus), most) if surplus > 0 else most


class ProbePool(Generic[T]):
    """The last probes, at most ``size``, none older than ``max_age`` seconds. Not safe from several threads without a
    lock. ``uniform``: a source of numbers in [0, 1), for the rounding of fractional rates."""

    __slots__ = ("_drop_oldest", "_max_age", "_quantile", "_size", "_uniform", "probes")

    def __init__(
        self,
        uniform: Callable[[], float],
        *,
        size: int = 16,
        max_age: float = 1.0,
        quantile: float = DEFAULT_QUANTILE,
    ) -> None:
        self._uniform = uniform
        self._size = size
        self._max_age = max_age
        self._quantile = quantile
        self._drop_oldest = True
        self.probes: list[Probe[T]] = []
        """Oldest first."""

    def add(self, replica: T, in_flight: float, latency: float, now: float, reuse: float = 1.0) -> None:
        """Take in a probe; a full pool gives up its oldest. ``reuse`` is rounded up or down at random."""
        uses = int(reuse)
        if uses != reuse:
            uses += self._uniform() < reuse - uses
        probes = self.probes
        probes.append(Probe(replica, in_flight, latency, now, uses or 1))
        if len(probes) > self._size:
            del probes[0]

    def choose(self, now: float, allowed: Callable[[T], bool] | None = None) -> T | None:
        """The replica for the next call, which counts from now on; None with fewer than two fresh probes."""
        chosen = self.best(now, allowed)
        if chosen is None:
            return None
        self.use(chosen)
        return chosen.replica

    def best(self, now: float, allowed: Callable[[T], bool] | None = None) -> Probe[T] | None:
        """The probe for the next call to go by; None with fewer than two fresh ones, since one is no choice."""
        probes = self.probes
        if probes and now - probes[0].received > self._max_age:
            self.expire(now)
            probes = self.probes
        if allowed is not None:
            probes = [probe for probe in probes if allowed(probe.replica)]
        return choose_probe(probes, self._quantile) if len(probes) > 1 else None

    def use(self, chosen: Probe[T]) -> None:
        """Count a call that goes by this probe. Every probe of its replica counts one request more from now on, so a
        burst does not all go there."""
        probes = self.probes
        chosen.uses = uses = chosen.uses - 1
        if uses <= 0:
            probes.remove(chosen)
        replica = chosen.replica
        for probe in probes:
            if probe.replica is replica:
                probe.in_flight += 1

    def remove(self, rate: float) -> None:
        """Drop ``rate`` probes (a fraction at random), by turns the oldest and the worst, so that bad ones do not pile
        up while the good ones are used."""
        for _ in range(int(rate) + (self._uniform() < rate % 1)):
            probes = self.probes
            if not probes:
                return
            if self._drop_oldest:
                del probes[0]
            else:
                probes.remove(worst_probe(probes, self._quantile))
            self._drop_oldest = not self._drop_oldest

    def good_until(self) -> float:
        """When the oldest probe will be too old, and what was chosen has to be chosen anew."""
        return self.probes[0].received + self._max_age if self.probes else inf

    def usual_latency(self) -> float:
        """The (upper) median latency of the probes that are held; 0 without any."""
        return sorted(probe.latency for probe in self.probes)[len(self.probes) // 2] if self.probes else 0.0

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        self.probes = [probe for probe in self.probes if now - probe.received <= self._max_age]

    def forget(self, replica: T) -> None:
        """Drop all probes of a replica."""
        self.probes = [probe for probe in self.probes if probe.replica is not replica]
