"""Slow start: a new endpoint's share grows over a window instead of starting in full."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
