"""``with cluster.lease() as lease``: one attempt of any protocol, classified by how its block ends."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final

from meshlb.errors import DeadlineExceeded
from meshlb.model import CANCELLED, LOCAL_ERRNOS, OK, CallContext, Outcome, OutcomeKind, Sent
from meshlb.node import Lease
from meshlb.serving import surroundings

if TYPE_CHECKING:
    from meshlb.cluster import Cluster


def outcome_of(error: BaseException | None) -> Outcome:
    """Classify the end of a block of arbitrary client code.

    Cancellation and exit (whatever is not an ``Exception``) and exhausted local resources are IGNORED; a refused
    connection or an unresolvable name was NOT_SENT; any other exception is a FAILURE of which nothing more is known.
    """
    if error is None:
        return OK
    if not isinstance(error, Exception):
        return CANCELLED
    import socket  # not at the top: `import meshlb` must stay cheap

    reason = type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in LOCAL_ERRNOS):
        return Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason=reason)
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
        return Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason=reason)
    timed_out = isinstance(error, TimeoutError)
    return Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason=reason, timed_out=timed_out)


_NOT_ACCEPTED: Final = frozenset({"502", "503", "504", "UNAVAILABLE"})
"""Answers that speak for the service, or for what stands before it, rather than for its application."""


def turned_away(outcome: Outcome) -> bool:
    """Whether the service did not accept the request: overloaded, unavailable or out of reach. An error that its
    application answers with is an answer."""
    if outcome.kind is OutcomeKind.FAILURE:
        return outcome.sent is not Sent.ANSWERED or outcome.reason in _NOT_ACCEPTED
    return outcome.kind is OutcomeKind.OVERLOAD


class LeaseScope:
    """See ``Cluster.lease``. Usable once, as a sync or an async context manager."""

    __slots__ = ("_cluster", "_context", "_lease", "_timeout")

    def __init__(self, cluster: Cluster, context: CallContext, timeout: float | None) -> None:
        self._cluster = cluster
        self._context = context
        self._timeout = timeout
        self._lease: Lease | None = None

    def __enter__(self) -> Lease:
        self._require_fresh()
        self._lease = lease = self._cluster.start(self._context, timeout=self._limit())
        return lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lease is not None:
            outcome = outcome_of(error)
            self._lease.close(outcome)
            if self._cluster.throttling is not None and turned_away(outcome):
                self._cluster.throttling.rejected()

    async def __aenter__(self) -> Lease:
        self._require_fresh()
        if self._cluster.stalls is not None:
            self._cluster.stalls.watch_running_loop()
        self._lease = lease = await self._cluster.start_async(self._context, timeout=self._limit())
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _limit(self) -> float | None:
        around = surroundings()
        if around is None:
            return self._timeout
        timeout = self._cluster.limited(around, self._timeout)
        if timeout is not None and timeout <= 0:
            raise DeadlineExceeded(
                f"service '{self._cluster.query}': no time is left for another call (meshlb.deadline)"
            )
        return timeout

    def _require_fresh(self) -> None:
        if self._lease is not None:
            raise RuntimeError("a lease is for one attempt: call cluster.lease() again")
