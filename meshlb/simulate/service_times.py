"""How much work a request is: seconds on a server of speed 1."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt
from random import Random
from typing import Final

DISTRIBUTIONS: Final = ("lognormal", "exponential", "constant")

_VARIATION: Final = 1.0
"""Standard deviation by mean of the lognormal work: that of Prequal's testbed (Wydrowski et al., NSDI 2024, 5), and of
the exponential distribution, with a longer tail."""


def service_times(distribution: str, mean: float, random: Random) -> Callable[[], float]:
    """A source of service times with that mean, in seconds."""
    if distribution == "exponential":
        return lambda: random.expovariate(1.0 / mean)
    if distribution == "lognormal":
        spread = log(1.0 + _VARIATION**2)
        middle = log(mean) - spread / 2.0
        return lambda: random.lognormvariate(middle, sqrt(spread))
    return lambda: mean
