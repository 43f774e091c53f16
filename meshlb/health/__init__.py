"""Active health checks: is this endpoint alive? Asked by the control loop, whatever traffic there is.

The options are here; what makes the checks is imported by the control loop when a service has some.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlb._lazy import lazily

if TYPE_CHECKING:
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

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("FunctionCheck", "GrpcCheck", "HttpCheck", "TcpCheck"), "meshlb.health.checks"),
        **dict.fromkeys(("CheckTLS", "HealthCheck"), "meshlb.health.options"),
        **dict.fromkeys(("CheckResult", "Health", "HealthState"), "meshlb.health.state"),
    },
)


def __dir__() -> list[str]:
    return __all__
