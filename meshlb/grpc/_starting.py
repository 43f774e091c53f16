"""How the attempts of a driven call begin: the first on the caller's thread, without blocking it."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.errors import MeshError
from meshlb.grpc._attempts import attempt_metadata, outcome_of
from meshlb.grpc._ending import Ending
from meshlb.grpc._errors import CallCancelled, LocalRpcError, as_rpc_error
from meshlb.grpc._waiting import LeaseRequest, Pause
from meshlb.node import NOT_STARTED

if TYPE_CHECKING:
    from contextvars import Context as Variables

    from opentelemetry.context import Context

    from meshlb.grpc._channel import MeshChannel
    from meshlb.grpc._method import Invocation, Method
    from meshlb.node import Lease
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.grpc")

CLOSED: Final = "Cannot invoke RPC: Channel closed!"
"""What gRPC's own futures and streams say."""

CANCELLED_HERE: Final = "Locally cancelled by application!"
"""gRPC's own words."""


class Starting(Ending):
    """Gets the leases of a call, now or later, and makes the native calls on them."""

    __slots__ = ("_attempts", "_cancelling", "_channel", "_context", "_invocation", "_method", "_parent",
                 "_stream_deadline", "_waiting")  # fmt: skip

    def __init__(self, method: Method, invocation: Invocation, started: float, variables: Variables) -> None:
        super().__init__(method.name)
        channel = method.channel
        self._method = method
        self._channel = channel
        self._invocation = invocation
        self._attempts = method.attempts(invocation, started=started)
        # The configured timeouts are about when the response starts; a stream may then go on for as long as the
        # caller himself has given it.
        self._stream_deadline = None if invocation.timeout is None else started + invocation.timeout
        self._context = variables  # retries are made on another thread
        self._parent: Context | None = None
        self._waiting: LeaseRequest | Pause | None = None
        self._cancelling = False

    @property
    def channel(self) -> MeshChannel:
        """The channel that the call is made on."""
        return self._channel

    @abstractmethod
    def _started(self, inner: Any, lease: Lease, trace: AttemptTrace | None, limit: float | None) -> None:
        """The native call of an attempt has been made; ``limit`` as in ``_invoke``."""

    @abstractmethod
    def _finish(self, final: Any) -> None:
        """End the call, unless it has ended."""

    @abstractmethod
    def channel_closed(self) -> None:
        """The channel was closed while the call waited for an attempt."""

    def begin(self, lease: Lease | None, failure: BaseException | None) -> None:
        """Start the call, or go on where the fast path has left it: with a lease, or with the ``failure`` to start an
        attempt on that.

        Raises what gRPC raises for arguments that are no good, and ValueError if the channel is closed.
        """
        if lease is not None:
            self._start(lease, raising=True, failure=failure)
            return
        channel, attempts = self._channel, self._attempts
        cluster = channel.cluster
        if channel.closed:
            raise ValueError(CLOSED)
        if attempts.out_of_time():
            self._finish(attempts.too_late())
            return
        try:
            lease = cluster.try_start(attempts.context)
        except MeshError as error:
            self._finish(as_rpc_error(error))
            return
        if lease is not None:
            self._start(lease, raising=True)
        elif not cluster.may_wait and not attempts.patient:
            self._finish(as_rpc_error(cluster.unavailable(attempts.context)))
        else:
            channel.add_waiter(self)
            self._waiting = LeaseRequest(
                channel.mesh,
                cluster,
                attempts.context,
                timeout=attempts.remaining(),
                patient=attempts.patient,
                callback=self._lease_found,
            )

    def _lease_found(self, lease: Lease | None, error: LocalRpcError | None) -> None:
        self._waiting = None
        if lease is None:
            self._finish(error)
        else:
            self._context.run(self._start_guarded, lease)

    def _start_guarded(self, lease: Lease) -> None:
        """On the control loop, where nobody would see an exception."""
        try:
            self._start(lease, raising=False)
        except Exception as error:
            logger.exception("%s: an attempt could not be started", self._method.name)
            self._finish(as_rpc_error(error))

    def _start(self, lease: Lease, *, raising: bool, failure: BaseException | None = None) -> None:
        """Start an attempt, unless it has failed to already. ``raising``: on the caller's thread, who gets what gRPC
        raises."""
        while True:
            if self._cancelling or self.final is not None:
                lease.close(NOT_STARTED)
                self._finish(CallCancelled(CANCELLED_HERE))
                return
            trace = None
            if failure is None:
                resend = self._attempts.made - 1
                trace = self._channel.mesh.telemetry.rpc_attempt(
                    self._channel.cluster, lease, method=self._method.name, resend=resend, parent=self._parent
                )
                if trace is not None:
                    self._parent = trace.parent
                try:
                    inner, limit = self._invoke(lease, trace)
                except BaseException as error:
                    failure = error
                else:
                    self._started(inner, lease, trace, limit)
                    return
            outcome = outcome_of(failure, channel_closed=False)
            if trace is not None:
                trace.finish(None, outcome)
            if outcome is NOT_STARTED and not self._channel.closed:
                again = self._attempts.repick(lease)
                if again is not None:
                    lease, failure = again, None
                    continue
                failure = as_rpc_error(self._channel.cluster.unavailable(self._attempts.context))
            lease.close(outcome)
            if isinstance(failure, MeshError):
                failure = as_rpc_error(failure)
            elif self._channel.closed and not isinstance(failure, grpc.RpcError):
                failure = ValueError(CLOSED)
            try:
                if raising:
                    self._invocation.end()
                    raise failure
                self._finish(as_rpc_error(failure))
            finally:
                del failure  # or it would hold this frame, which holds it
            return

    def _invoke(self, lease: Lease, trace: AttemptTrace | None) -> tuple[Any, float | None]:
        """Make the native call; with the seconds that its response may take, if gRPC does not see to that itself."""
        invocation = self._invocation
        timeout = limit = self._attempts.next_timeout()
        if self._method.streams:
            now = self._channel.cluster.clock()
            timeout = None if self._stream_deadline is None else self._stream_deadline - now
            if limit is not None and timeout is not None and limit >= timeout:
                limit = None
        else:
            limit = None
        native = self._method.raw_native(lease.node)
        inner = (native if self._method.streams else native.future)(
            invocation.body(),
            timeout,
            attempt_metadata(invocation.metadata, self._attempts.previous, trace),
            invocation.credentials,
            None,
            invocation.compression,
        )
        return inner, limit
