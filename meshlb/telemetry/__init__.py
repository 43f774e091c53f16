"""OpenTelemetry spans and metrics of what the data plane did.

Reads what balancing has measured and never feeds back. Stands on opentelemetry-api alone, which is imported with the
first service that is used, not with this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlb.telemetry.telemetry import Telemetry

if TYPE_CHECKING:
    from meshlb.telemetry.attempts import AttemptTrace

__all__ = ["AttemptTrace", "Telemetry"]
