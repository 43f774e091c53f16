"""What keeps a fault of one endpoint from reaching the caller, and a fault of all from being made worse by us."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlb._lazy import lazily
from meshlb.resilience.breaker import BreakerState, CircuitBreaker, Verdict
from meshlb.resilience.breaker_options import Breaker, StateChange, StateListener
from meshlb.resilience.budget import RetryBudget, TokenBudget
from meshlb.resilience.ejection import EjectionCap
from meshlb.resilience.hedge import Hedge
from meshlb.resilience.retry import Backoff, Retry
from meshlb.resilience.stall import Pulse, StallMonitor

if TYPE_CHECKING:
    from meshlb.resilience.gradient import Gradient2, GradientLimit
    from meshlb.resilience.limits import ConcurrencyLimiter, EndpointLimit, Limits
    from meshlb.resilience.outlier import OutlierDetection, OutlierDetector
    from meshlb.resilience.throttle import AdaptiveThrottle, AdaptiveThrottling, RetryThrottle, RetryThrottling

__all__ = [
    "AdaptiveThrottle",
    "AdaptiveThrottling",
    "Backoff",
    "Breaker",
    "BreakerState",
    "CircuitBreaker",
    "ConcurrencyLimiter",
    "EjectionCap",
    "EndpointLimit",
    "Gradient2",
    "GradientLimit",
    "Hedge",
    "Limits",
    "OutlierDetection",
    "OutlierDetector",
    "Pulse",
    "Retry",
    "RetryBudget",
    "RetryThrottle",
    "RetryThrottling",
    "StallMonitor",
    "StateChange",
    "StateListener",
    "TokenBudget",
    "Verdict",
]

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("Gradient2", "GradientLimit"), "meshlb.resilience.gradient"),
        **dict.fromkeys(("ConcurrencyLimiter", "EndpointLimit", "Limits"), "meshlb.resilience.limits"),
        **dict.fromkeys(("OutlierDetection", "OutlierDetector"), "meshlb.resilience.outlier"),
        **dict.fromkeys(
            ("AdaptiveThrottle", "AdaptiveThrottling", "RetryThrottle", "RetryThrottling"), "meshlb.resilience.throttle"
        ),
    },
)


def __dir__() -> list[str]:
    return __all__
