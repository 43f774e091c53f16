"""What keeps a fault of one endpoint from reaching the caller, and a fault of all from being made worse by us."""

from __future__ import annotations

from meshlb.resilience.breaker import Breaker, BreakerState, CircuitBreaker
from meshlb.resilience.budget import RetryBudget, TokenBudget
from meshlb.resilience.ejection import EjectionCap
from meshlb.resilience.retry import Backoff, Retry

__all__ = [
    "Backoff",
    "Breaker",
    "BreakerState",
    "CircuitBreaker",
    "EjectionCap",
    "Retry",
    "RetryBudget",
    "TokenBudget",
]
