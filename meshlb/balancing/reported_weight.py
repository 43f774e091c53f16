"""From load reports to weights: gRFC A58's formula, blackout and expiry."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from meshlb.balancing.orca import LoadReport


def utilization_of(report: LoadReport, metric_names: Sequence[str] = ()) -> float:
    """How full the server is: the highest of the named metrics, else application, else CPU utilization (A58, A114).

    The names come first because somebody chose them (as Envoy does since #44196).
    """
    named = max((report.metric(name) for name in metric_names), default=0.0)
    if named > 0:
        return named
    return report.application_utilization if report.application_utilization > 0 else report.cpu_utilization


def reported_weight(
    report: LoadReport, error_utilization_penalty: float = 1.0, metric_names: Sequence[str] = ()
) -> float | None:
    """``qps / (utilization + eps / qps * penalty)``: calls per second that a full server would take (A58).

    None unless the report has both calls per second and a utilization above 0.
    """
    qps, utilization = report.rps_fractional, utilization_of(report, metric_names)
    if not (qps > 0 and utilization > 0):
        return None
    if report.eps > 0:
        utilization += report.eps / qps * error_utilization_penalty
    weight = qps / utilization
    return weight if 0.0 < weight < inf else None


class ReportedWeight:
    """One endpoint's weight over time. Times are seconds of one monotonic clock.

    Not used until reports have come for the ``blackout`` period: a server that has just started reports the load of its
    warm-up. Not used once the last is older than ``expiration``; then the blackout begins anew.
    """

    __slots__ = ("last_update", "non_empty_since", "weight")

    def __init__(self) -> None:
        self.weight = 0.0
        self.last_update = -inf
        self.non_empty_since = inf

    def update(self, weight: float, now: float) -> None:
        """Take in a new weight, above 0."""
        self.weight = weight
        self.last_update = now
        if self.non_empty_since == inf:
            self.non_empty_since = now

    def restart(self) -> None:
        """Begin the blackout anew: the endpoint was away and has come back."""
        self.non_empty_since = inf

    def at(self, now: float, blackout: float, expiration: float) -> float:
        """The weight if it may be used at ``now``, else 0."""
        if now - self.last_update >= expiration:
            self.non_empty_since = inf
            return 0.0
        return 0.0 if blackout and now - self.non_empty_since < blackout else self.weight
