"""Active health checks: is this endpoint alive? Asked by the control loop, whatever traffic there is.

The options are here; what makes the checks is imported by the control loop when a service has some.
"""

from __future__ import annotations

from meshlb.health.checks import FunctionCheck, GrpcCheck, HttpCheck, TcpCheck
from meshlb.health.options import CheckTLS, HealthCheck
from meshlb.health.state import CheckResult, Health, HealthState

__all__ = [
    "CheckResult",
    "CheckTLS",
    "FunctionCheck",
    "GrpcCheck",
    "Health",
    "HealthCheck",
    "HealthState",
    "HttpCheck",
    "TcpCheck",
]
