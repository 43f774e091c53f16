"""``with cluster.lease() as lease``: one attempt of any protocol, classified by how its block ends."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Final

from meshlb.model import CANCELLED, OK, CallContext, Outcome, OutcomeKind, Sent
from meshlb.node import Lease

if TYPE_CHECKING:
    from meshlb.cluster import Cluster

LOCAL_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""This process or host ran out of something: no endpoint's fault."""


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
    return Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason=reason)


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
        self._lease = lease = self._cluster.start(self._context, timeout=self._timeout)
        return lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lease is not None:
            self._lease.close(outcome_of(error))

    async def __aenter__(self) -> Lease:
        self._require_fresh()
        self._lease = lease = await self._cluster.start_async(self._context, timeout=self._timeout)
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _require_fresh(self) -> None:
        if self._lease is not None:
            raise RuntimeError("a lease is for one attempt: call cluster.lease() again")
