"""Headroom: how much of its full load a tier gets when its endpoints are busier than they should be."""

from __future__ import annotations

import math
from typing import Final

INTERVAL: Final = 1.0
"""Seconds between two measurements."""

_DECAY: Final = 5.0
"""Seconds over which the utilization is averaged (Envoy's load-aware locality policy)."""

_LEAST: Final = 0.05
"""A tier always keeps so much of its load: without any, it could never show that it has headroom again."""


class Headroom:
    """One tier's limit, moved so that its endpoints are as busy as they may be and no busier.

    ``utilization``: calls in flight over those that there may be, averaged over about 5 s. ``limit``: the share of its
    full load that the tier may get, 1 as long as it is not fully used.
    """

    __slots__ = ("_measured_at", "limit", "utilization")

    def __init__(self) -> None:
        self._measured_at: float | None = None
        self.utilization = 0.0
        self.limit = 1.0

    def measure(self, used: float, now: float) -> bool:
        """Take a measurement; calls within ``INTERVAL`` of the last one do nothing. True if the limit has moved by
        more than a percent."""
        elapsed = INTERVAL if self._measured_at is None else now - self._measured_at
        if elapsed < INTERVAL:
            return False
        self._measured_at = now
        self.utilization += (1.0 - math.exp(-elapsed / _DECAY)) * (used - self.utilization)
        former = self.limit
        self.limit = next_limit(former, self.utilization)
        return abs(self.limit - former) > 0.01


def next_limit(limit: float, utilization: float) -> float:
    """The limit after a measurement. The load in flight grows with the share, so ``limit / utilization`` is the share
    at which it would be just full; the square root goes half of the way, since the measurement lags behind."""
    if utilization <= 0.0:
        return 1.0
    return min(1.0, max(_LEAST, limit / math.sqrt(utilization)))
