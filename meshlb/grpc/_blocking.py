"""Calls that block their thread until the response is there: ``__call__`` and ``with_call`` of unary responses."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.balancing.orca import report_among
from meshlb.errors import MeshError
from meshlb.grpc._attempts import Attempts, attempt_metadata, outcome_of
from meshlb.grpc._errors import ChannelClosed, LocalRpcError, as_rpc_error
from meshlb.grpc._hedged import HedgedRace
from meshlb.grpc._method import Invocation, Method
from meshlb.grpc._sessions import AnsweredCall, set_cookie
from meshlb.grpc._waiting import LeaseRequest
from meshlb.node import NOT_STARTED

if TYPE_CHECKING:
    from meshlb.grpc._channel import MeshChannel
    from meshlb.node import Lease
    from meshlb.telemetry import AttemptTrace

CLOSED: str = "Cannot invoke RPC on closed channel!"
"""What gRPC's own blocking calls say."""


class BlockingMethod(Method):
    """The slow path of a blocking call: whatever is not one attempt, made at once, that goes well."""

    def run(
        self,
        invocation: Invocation,
        *,
        with_call: bool,
        lease: Lease | None = None,
        trace: AttemptTrace | None = None,
        error: BaseException | None = None,
    ) -> Any:
        """Make the call, or go on with it where the fast path has left it: with a lease whose attempt has not begun
        (``trace`` is its trace), or with the ``error`` that ended it."""
        channel = self._channel
        started = self._cluster.clock() if lease is None else lease.started
        attempts = self.attempts(invocation, started=started)
        if error is None and attempts.out_of_time():
            if lease is not None:
                lease.close(NOT_STARTED)
            raise attempts.too_late()
        parent = None if trace is None else trace.parent
        try:
            while True:
                if lease is None:
                    lease = wait_for_lease(channel, attempts)
                if error is None:
                    if self.policy.hedge is not None and invocation.source is None and attempts.made == 1:
                        hedged = attempts.hedged(lease.started)
                        if hedged is not None:
                            race = HedgedRace(self, invocation, attempts, hedged)
                            if race.run(lease, trace):
                                return race.result(with_call=with_call)
                            lease = self._wait_for_next(attempts.another_round(), attempts, race.lease, race.error)
                            trace = None
                            continue
                    if trace is None:
                        trace = self._rpc_attempt(
                            self._cluster, lease, method=self._method, resend=attempts.made - 1, parent=parent
                        )
                        parent = None if trace is None else trace.parent
                    try:
                        response = self._attempt(lease, trace, invocation, attempts, with_call=with_call)
                    except BaseException as failure:
                        error = failure
                    else:
                        lease.close()
                        attempts.succeeded(lease)
                        if trace is not None:
                            trace.finish("OK", latency=lease.latency)
                        if self._wants_reports:
                            self.observe_report(lease, response[1])
                            response = response if with_call else response[0]
                        if with_call and self._reads_calls:
                            return response[0], self._answered_call(invocation, response[1])
                        return response
                lease = self._next_lease(lease, trace, error, invocation, attempts)
                trace = error = None
        finally:
            error = None  # or it would hold this frame, which holds it
            invocation.end()

    def _attempt(
        self,
        lease: Lease,
        trace: AttemptTrace | None,
        invocation: Invocation,
        attempts: Attempts,
        *,
        with_call: bool,
    ) -> Any:
        node = lease.node
        native = self.native(node) if invocation.source is None else self.raw_native(node)
        call = native.with_call if with_call or self._wants_reports else native  # which gives the trailers too
        metadata = attempt_metadata(invocation.metadata, attempts.previous, trace)
        timeout = attempts.next_timeout()
        return call(invocation.body(), timeout, metadata, invocation.credentials, None, invocation.compression)

    def _next_lease(
        self,
        lease: Lease,
        trace: AttemptTrace | None,
        error: BaseException,
        invocation: Invocation,
        attempts: Attempts,
    ) -> Lease:
        """Close the lease of the failed attempt and begin the next one; raises what the caller gets if there is
        none."""
        channel = self._channel
        outcome = outcome_of(error, channel_closed=channel.closed)
        if outcome is NOT_STARTED and not channel.closed:
            again = attempts.repick(lease)
            if again is None:
                raise as_rpc_error(self._cluster.unavailable(attempts.context))
            return again
        channel.note(lease.node, outcome)
        pause = attempts.after(lease, outcome, error, replayable=invocation.rewind())
        self.observe_report(lease, error)
        if trace is not None:
            trace.finish(status_of(error), outcome, lease.latency)
        if isinstance(error, MeshError):
            raise as_rpc_error(error) from None
        if channel.closed and not isinstance(error, grpc.RpcError) and isinstance(error, Exception):
            raise ValueError(CLOSED) from None
        return self._wait_for_next(pause, attempts, lease, error)

    def _wait_for_next(self, pause: float | None, attempts: Attempts, lease: Lease, error: BaseException) -> Lease:
        """The lease of the next attempt, after a pause; None: there is none, so ``error`` is raised."""
        channel = self._channel
        while pause is not None:
            try:
                if pause > 0 and channel.closing.wait(pause):
                    raise ChannelClosed("Channel closed!")
            except BaseException:
                attempts.give_up()
                raise
            if attempts.out_of_time():
                attempts.give_up()
                raise attempts.too_late() from error
            again = attempts.again()
            if again is not None:
                return again
            pause = attempts.another_round()
        attempts.explain(error, lease)
        try:
            raise error
        finally:
            del error  # or it would hold this frame, which holds it

    def _answered_call(self, invocation: Invocation, call: Any) -> Any:
        """What ``with_call`` returns beside the response."""
        entry = set_cookie(self._cluster, invocation.context, secure=self._channel.secure)
        return call if entry is None else AnsweredCall(call, entry)

    def observe_report(self, lease: Lease, call: Any) -> None:
        """Take in what the endpoint said of its load at the end of an attempt."""
        if self._wants_reports and isinstance(call, grpc.Call):
            self._cluster.observe_report(lease.node, report_among(call.trailing_metadata()))


def status_of(error: BaseException) -> str | None:
    """The name of the gRPC code that an attempt ended with, None if it ended with something else."""
    return error.code().name if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call) else None


class _Wait:
    """What a thread waits for: a lease or an error."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.error: LocalRpcError | None = None
        self.over = threading.Event()

    def found(self, lease: Lease | None, error: LocalRpcError | None) -> None:
        self.lease = lease
        self.error = self.error or error
        self.over.set()

    def channel_closed(self) -> None:
        self.error = ChannelClosed("Channel closed!")
        self.over.set()


def wait_for_lease(channel: MeshChannel, attempts: Attempts) -> Lease:
    """Begin a call's first attempt, waiting for the registry's first answer or, if the call is patient, for somebody
    to call. Raises the error in both families, and ValueError if the channel is closed."""
    cluster = channel.cluster
    if channel.closed:
        raise ValueError(CLOSED)
    try:
        lease = cluster.try_start(attempts.context)
    except MeshError as error:
        raise as_rpc_error(error) from None
    if lease is not None:
        return lease
    if not cluster.may_wait and not attempts.patient:
        raise as_rpc_error(cluster.unavailable(attempts.context))
    wait = _Wait()
    with channel.waiting(wait):
        request = LeaseRequest(
            channel.mesh,
            cluster,
            attempts.context,
            timeout=attempts.remaining(),
            patient=attempts.patient,
            callback=wait.found,
        )
        try:
            wait.over.wait()
        finally:
            request.cancel()
    lease = wait.lease
    if wait.error is not None:
        if lease is not None:
            lease.close(NOT_STARTED)
        raise wait.error
    assert lease is not None
    return lease
