"""The calls of simulated clients: what an adapter does, with the real cluster, leases and retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from meshlb.call import Call, Safety
from meshlb.errors import MeshError
from meshlb.model import NO_CONTEXT, OK, CallContext, Outcome, OutcomeKind, Sent
from meshlb.simulate.server import Attempt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshlb.balancing.orca import LoadReport
    from meshlb.cluster import Cluster
    from meshlb.lease import Lease
    from meshlb.simulate.measurement import Measurement
    from meshlb.simulate.server import SimulatedServer
    from meshlb.simulate.timeline import Timeline

TIMED_OUT: Final = Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason="ReadTimeout")
"""An attempt without an answer in time, in the adapters' own words (``meshlb._http.classify``)."""


class Callers:
    """What all calls of a run share."""

    __slots__ = ("measurement", "patience", "servers", "timeline", "timeout")

    def __init__(
        self,
        timeline: Timeline,
        servers: Mapping[str, SimulatedServer],
        measurement: Measurement,
        *,
        timeout: float,
        per_try_timeout: float | None,
    ) -> None:
        self.timeline = timeline
        self.servers = servers
        """By host: making an ``Identity`` for each attempt would cost more than the pick."""
        self.measurement = measurement
        self.timeout = timeout
        self.patience = timeout if per_try_timeout is None else min(timeout, per_try_timeout)
        """Seconds that a call's first attempt may take."""


class SimulatedCall:
    """One call of a client, from its arrival to what its caller sees."""

    __slots__ = ("arrived", "attempt", "attempts", "callers", "cluster", "context", "retrying", "work")

    def __init__(self, callers: Callers, cluster: Cluster, context: CallContext, work: float) -> None:
        self.callers = callers
        self.cluster = cluster
        self.context = context
        self.work = work
        """Seconds on a server of speed 1: the same wherever it goes, and with every policy."""
        self.arrived = callers.timeline.now
        self.attempts = 0
        self.attempt: Attempt | None = None
        """The one under way. What comes of any other is of no interest any more."""
        self.retrying: Call | None = None

    def begin(self) -> None:
        """Make the first attempt."""
        callers = self.callers
        callers.measurement.begun += 1
        try:
            lease = self.cluster.try_start(self.context)
        except MeshError:  # refused by the client's own throttle
            lease = None
        if lease is None:
            self._end(ok=False)
            return
        attempt = self._send(lease)
        callers.timeline.deadline(self.arrived + callers.patience, self._time_out, attempt)

    def _send(self, lease: Lease) -> Attempt:
        server = self.callers.servers[lease.node.endpoint.host]
        attempt = self.attempt = Attempt(self, lease, server)
        self.attempts += 1
        server.receive(attempt)
        return attempt

    def answered(self, attempt: Attempt, outcome: Outcome, report: LoadReport | None) -> None:
        """Take in an attempt's answer, with the load report that it carries."""
        if self.attempt is not attempt:
            return  # too late
        if report is not None:
            self.cluster.observe_report(attempt.lease.node, report)
        if outcome is OK:
            self.attempt = None
            attempt.lease.close()
            self._end(ok=True)
        else:
            self._failed(attempt, outcome)

    def _time_out(self, attempt: Attempt) -> None:
        if self.attempt is attempt:
            self._failed(attempt, TIMED_OUT)

    def _failed(self, attempt: Attempt, outcome: Outcome) -> None:
        self.attempt = None
        lease = attempt.lease
        if self.retrying is None:
            self.retrying = Call(self.cluster, self.context, self.arrived, self.callers.timeout)
        pause = self.retrying.after(lease, outcome, Safety.IDEMPOTENT)
        if pause is None:
            self._end(ok=False)
        elif pause == 0.0:
            self._retry(self.retrying)
        else:
            timeline = self.callers.timeline
            timeline.at(timeline.now + pause, self._retry, self.retrying)

    def _retry(self, retrying: Call) -> None:
        lease = retrying.again()
        if lease is None:
            self._end(ok=False)
            return
        attempt = self._send(lease)
        callers = self.callers
        limit = min(callers.timeline.now + callers.patience, self.arrived + callers.timeout)
        callers.timeline.at(limit, self._time_out, attempt)

    def _end(self, *, ok: bool) -> None:
        now = self.callers.timeline.now
        self.callers.measurement.ended(self.arrived, now - self.arrived, self.attempts, ok=ok)


def context_of(cluster: Cluster, key: int) -> CallContext:
    """The context of a call: with a key where the policy goes by one."""
    return CallContext(key) if cluster.hashes or cluster.hashes_callers else NO_CONTEXT
