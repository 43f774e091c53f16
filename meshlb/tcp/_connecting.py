"""The making of one connection, sans I/O: which endpoint, how long, what a failure means, and who is next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from meshlb._validate import seconds
from meshlb.affinity import call_context
from meshlb.call import Call, Safety
from meshlb.errors import DeadlineExceeded, MeshError
from meshlb.model import CANCELLED, LOCAL_ERRNOS, Outcome, OutcomeKind, Sent
from meshlb.serving import surroundings
from meshlb.tcp._errors import as_os_error

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.model import HashKey
    from meshlb.node import Lease

_LEAST_LIMIT: Final = 0.001
"""Seconds that an attempt gets at least: zero would mean "do not wait" to a socket, and less is an error."""


class Connecting:
    """The attempts to get one connection. The caller's I/O is between ``begun`` and ``failed``:

    a lease from ``start`` or ``start_async``; an attempt of ``limit()`` seconds; ``failed`` says how many seconds to
    wait before ``again`` gives the next lease, or None: that was the end, and its error is for the caller.
    """

    __slots__ = ("_call", "_deadline", "_started", "_timeout", "cluster", "context")

    def __init__(self, cluster: Cluster, key: HashKey | None, timeout: float | None) -> None:
        seconds("meshlb.tcp: timeout", timeout, optional=True)
        self.cluster = cluster
        self.context = call_context(cluster, key)
        self._timeout = cluster.config.timeout if timeout is None else timeout
        around = surroundings()
        if around is not None:
            self._timeout = cluster.limited(around, self._timeout)
            if self._timeout is not None and self._timeout <= 0:
                raise DeadlineExceeded(f"service '{cluster.query}': no time is left to connect (meshlb.deadline)")
        self._started = cluster.clock()
        self._deadline = None if self._timeout is None else self._started + self._timeout
        self._call: Call | None = None

    def start(self) -> Lease:
        """The lease of the first attempt. Raises this package's classes of what ``Cluster.start`` raises."""
        try:
            return self.cluster.start(self.context, timeout=self._timeout)
        except MeshError as error:
            raise as_os_error(error) from None

    async def start_async(self) -> Lease:
        """``start`` for asyncio and trio."""
        try:
            return await self.cluster.start_async(self.context, timeout=self._timeout)
        except MeshError as error:
            raise as_os_error(error) from None

    def limit(self) -> float:
        """Seconds that the attempt which begins now may take, TLS handshake included."""
        limit = self.cluster.config.connect_timeout
        if self._deadline is not None:
            limit = min(limit, self._deadline - self.cluster.clock())
        return max(_LEAST_LIMIT, limit)

    def failed(self, lease: Lease, error: BaseException) -> float | None:
        """The attempt raised. Seconds to wait before ``again``, or None if the caller is to get the error."""
        outcome = outcome_of_connecting(error)
        if not outcome.retryable:
            lease.close(outcome)
            return None
        if self._call is None:
            self._call = Call(self.cluster, self.context, self._started, self._timeout)
        pause = self._call.after(lease, outcome, Safety.UNSENT_ONLY, error)
        if pause is None and self._call.attempts > 1:
            error.add_note(
                f"meshlb: attempt {self._call.attempts} to connect service '{self.cluster.query}', to "
                f"{lease.endpoint.address}; the earlier ones failed too"
            )
        return pause

    def again(self) -> Lease | None:
        """The lease of the next attempt; None if there is nobody left."""
        return None if self._call is None else self._call.again()


def outcome_of_connecting(error: BaseException) -> Outcome:
    """Classify what came in place of a connection. Whatever it was, the client has not said anything yet, so that it
    can be said to another instance."""
    if not isinstance(error, Exception):
        return CANCELLED
    if isinstance(error, OSError) and isinstance(error.__cause__, OSError):
        error = error.__cause__  # anyio's own does not say which it was
    reason = type(error).__name__
    if isinstance(error, OSError) and error.errno not in LOCAL_ERRNOS:
        return Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason=reason)
    return Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason=reason)


def outcome_of_connection(error: BaseException | None) -> Outcome | None:
    """Classify what ended a connection that had been made; None: the connection was closed as it should be, or by
    something that is not about it."""
    if isinstance(error, ConnectionError | TimeoutError):
        return Outcome(OutcomeKind.FAILURE, Sent.MAYBE, reason=type(error).__name__)
    return None
