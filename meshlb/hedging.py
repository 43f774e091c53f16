"""Hedged calls, sans I/O: several attempts of one call side by side, the first answer wins.

gRFC A6: another attempt is begun at each delay; one that fails in a way that another endpoint might not brings the
next one forward at once; a pushback moves it, a negative one ends the sending; the first answer, or error that another
attempt would not change, is the call's, and the others are cancelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from meshlb.call import Call, Safety
from meshlb.model import CANCELLED, Outcome, OutcomeKind, Sent

if TYPE_CHECKING:
    from types import EllipsisType

    from meshlb.cluster import Cluster
    from meshlb.model import CallContext
    from meshlb.node import Lease
    from meshlb.resilience import Hedge, Retry, RetryThrottle
    from meshlb.resilience.hedge import HedgeTimer
    from meshlb.serving import ServedRequest

LOST: Final = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, reason="hedge lost")
"""The outcome of an attempt that another one of its call outran: no failure."""


class HedgedCall(Call):
    """The attempts of a call that may overlap. One caller's, as ``Call``; the adapter has its attempts report to him.

    Use::

        call = HedgedCall(cluster, context, lease.started, timeout, hedge=hedge, timer=timer)
        call.begun(lease)                                   # for each attempt that is sent
        while True:
            wait for an attempt's end, for call.due() seconds at most (None: without limit)
            nothing ended:        lease = call.next()       # not None: send another attempt
            one failed:           if call.failed(lease, outcome, safety, error): it is the end
            one was answered:     it is the end
        call.won(lease)                                     # closes the others' leases; cancel them
    """

    __slots__ = ("_delay", "_due", "_flying", "_hedge", "_is_retry_due", "_timer")

    def __init__(
        self,
        cluster: Cluster,
        context: CallContext,
        started: float,
        timeout: float | None,
        *,
        hedge: Hedge,
        timer: HedgeTimer,
        retry: Retry | EllipsisType | None = ...,
        throttle: RetryThrottle | None = None,
        served: ServedRequest | None = None,
    ) -> None:
        super().__init__(cluster, context, started, timeout, retry=retry, throttle=throttle, served=served)
        self._hedge = hedge
        self._timer = timer
        self._delay = timer.delay()
        self._flying: list[Lease] = []
        self._due: float | None = None
        """When the next attempt is to be begun, by the clock."""
        self._is_retry_due = False
        """It is one that ``after`` has announced, and that is paid for."""

    def begun(self, lease: Lease) -> None:
        """An attempt is being sent."""
        self._flying.append(lease)
        self._tried.add(lease.node)
        self._schedule()

    def due(self) -> float | None:
        """Seconds until ``next`` should be asked; None: only when an attempt has ended."""
        return None if self._due is None else max(0.0, self._due - self.cluster.clock())

    @property
    def is_over(self) -> bool:
        """No attempt is under way, and none is to come."""
        return not self._flying and self._due is None

    def next(self) -> Lease | None:
        """Begin the attempt that is due; None if there is none to be made, now or (see ``due``) at all."""
        if self._due is None or self._due > self.cluster.clock():
            return None
        self._due = None
        if self._is_retry_due:
            self._is_retry_due = False
            lease = self.again()
        else:
            lease = self._further()
        return lease

    def failed(
        self, lease: Lease, outcome: Outcome, safety: Safety, error: BaseException | None = None, result: Any = None
    ) -> bool:
        """An attempt has failed: closes its lease. True if that is the end of the call."""
        self._flying.remove(lease)
        if not outcome.retryable:
            self._close(lease, outcome)
            return True
        if self._is_retry_due:  # one is coming, and is paid for
            self._close(lease, outcome)
            self._failure_allowed(outcome)
            return False
        pause = self.after(lease, outcome, safety, error, result)
        if pause is None:
            self._due = None
            return not self._flying
        self._is_retry_due = True
        self._due = self.cluster.clock() + pause
        return False

    def won(self, winner: Lease | None) -> None:
        """The call has ended with this attempt, or (None) without any: the others are given up. Idempotent."""
        self._due = None
        self._is_retry_due = False
        self.give_up()
        now = self.cluster.clock()
        for lease in self._flying:
            waited = now - lease.started
            if lease is winner:
                self._timer.record(waited)
                continue
            if winner is not None:
                self._learn(lease, waited, now)
            lease.close(CANCELLED if winner is None else LOST)
        self._flying.clear()
        if winner is not None and self._throttle is not None:
            self._throttle.succeeded()

    def _learn(self, lease: Lease, waited: float, now: float) -> None:
        """A loser would have taken longer than this. Without it an endpoint that always loses would never look slow,
        and hedging would hide it from balancing for ever."""
        self._timer.record(waited)
        node = lease.node
        with node.lock:
            if not lease.closed and lease.latency is None and waited > node.latency.at(now):
                node.latency.observe(waited, now)

    def _schedule(self) -> None:
        """When the next hedge is due, if there is to be one."""
        retry = self.retry
        if retry is None or self._is_retry_due or self._delay is None:
            return
        if len(self._flying) < self._hedge.max_attempts and self._paid_attempts < retry.max_attempts:
            self._due = self.cluster.clock() + self._delay

    def _further(self) -> Lease | None:
        """Begin a hedge: elsewhere, or not at all."""
        if self._throttle is not None and not self._throttle.allows:
            return None
        if not self._has_time(0.0) or all(node in self._tried for node in self.cluster.view.nodes):
            return None
        if not self._pay():
            return None
        lease = self.cluster.try_again(self._context)
        if lease is None:
            self.give_up()
            return None
        self._begun()
        return lease
