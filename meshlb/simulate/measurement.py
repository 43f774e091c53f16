"""What is written down during a run, and the figures made of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Final

TAIL: Final = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
"""The quantiles that a plot shows."""

_MOST_WINDOWS: Final = 30
"""Points of a curve over time."""


class Measurement:
    """Every call that arrived in the time of the measurement. Failed calls count with the time that they took."""

    __slots__ = ("_arrivals", "_attempts", "_errors", "_latencies", "_since", "_until", "begun", "finished")

    def __init__(self, since: float, until: float) -> None:
        self.begun = 0
        """Calls, the warm-up's included."""
        self.finished = 0
        self._since = since
        self._until = until
        self._arrivals = array("d")
        self._latencies = array("d")
        self._attempts = 0
        self._errors = 0

    def ended(self, arrived: float, latency: float, attempts: int, *, ok: bool) -> None:
        """Note what a call's caller saw."""
        self.finished += 1
        if self._since <= arrived < self._until:
            self._arrivals.append(arrived)
            self._latencies.append(latency)
            self._attempts += attempts
            self._errors += not ok

    def figures(self, loads: Sequence[float], suspects: SuspectShare | None) -> Figures:
        """The figures. ``loads``: attempts by capacity of each server that was sound all the time."""
        ordered = sorted(self._latencies)
        calls = len(ordered)
        mean = sum(loads) / len(loads) if loads else 0.0
        variance = sum((load - mean) ** 2 for load in loads) / len(loads) if loads else 0.0
        return Figures(
            calls=calls,
            p50=quantile(ordered, 0.5),
            p99=quantile(ordered, 0.99),
            p999=quantile(ordered, 0.999),
            mean=sum(ordered) / calls if calls else 0.0,
            error_rate=self._errors / calls if calls else 0.0,
            attempts_per_call=self._attempts / calls if calls else 0.0,
            load_max_to_mean=max(loads) / mean if mean else 0.0,
            load_variation=sqrt(variance) / mean if mean else 0.0,
            suspect_share=None if suspects is None else suspects.ratio,
            tail=tuple((q, quantile(ordered, q)) for q in TAIL if (1.0 - q) * calls >= 1.0),
            over_time=self._over_time(),
        )

    def _over_time(self) -> tuple[tuple[float, float], ...]:
        width = (self._until - self._since) / _MOST_WINDOWS
        windows: list[list[float]] = [[] for _ in range(_MOST_WINDOWS)]
        for arrived, latency in zip(self._arrivals, self._latencies, strict=True):
            windows[min(int((arrived - self._since) / width), _MOST_WINDOWS - 1)].append(latency)
        return tuple(((i + 0.5) * width, quantile(sorted(window), 0.99)) for i, window in enumerate(windows) if window)


@dataclass(frozen=True, slots=True)
class SuspectShare:
    """How much of the attempts a scenario's bad servers got, from the moment that they were bad."""

    attempts: int
    all_attempts: int
    capacity: float
    all_capacity: float

    @property
    def ratio(self) -> float | None:
        """Their share of the attempts by their share of the capacity: 1 is a fair share. None without an attempt."""
        if not self.all_attempts:
            return None
        return (self.attempts / self.all_attempts) / (self.capacity / self.all_capacity)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run showed. Times are seconds."""

    calls: int
    """Calls that arrived while it was measured."""
    p50: float
    p99: float
    p999: float
    mean: float
    error_rate: float
    """Share of the calls whose callers saw an error."""
    attempts_per_call: float
    load_max_to_mean: float
    """Attempts by capacity: the most loaded server against the mean of those that were sound all the time."""
    load_variation: float
    """The same loads' standard deviation by their mean."""
    suspect_share: float | None
    """Share of the attempts that the scenario's bad servers got while they were bad, by their share of the capacity."""
    tail: tuple[tuple[float, float], ...]
    """Quantiles: of the calls, and the latency."""
    over_time: tuple[tuple[float, float], ...]
    """The 99th percentile of the calls that arrived around a time since the measurement's beginning."""


def quantile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that a share ``q`` of the values does not exceed; 0 of none."""
    return ordered[max(ceil(q * len(ordered)) - 1, 0)] if ordered else 0.0
