"""The attempts of one RPC under asyncio: native calls, one after the other until one of them is the answer.

The RPC starts when it is made, as in grpc.aio, and no task is needed for it: the native call is started at once, its
done-callback closes the lease, and if the attempt failed starts the next one there and then. A task is made only where
something must be waited for first: the registry's first answer, or an endpoint (wait_for_ready).
"""

from __future__ import annotations

import logging
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import grpc

from meshlb.balancing.orca import report_among
from meshlb.errors import MeshError
from meshlb.grpc import _status
from meshlb.grpc._sessions import context_and_metadata
from meshlb.grpc.aio._ended import ended_with
from meshlb.grpc.aio._errors import as_aio_error
from meshlb.grpc.aio._native import immediate
from meshlb.grpc.aio._retrying import Retrying
from meshlb.model import OK
from meshlb.node import NOT_STARTED, Lease
from meshlb.serving import ATTEMPT_METADATA, surroundings

if TYPE_CHECKING:
    from meshlb.grpc.aio._loops import LoopChannels
    from meshlb.grpc.aio._multicallable import MultiCallable
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.grpc.aio")


class Attempts(Retrying):
    """Starts native calls, and sees their ends.

    The caches are cold when an answer has been waited for, and each Python call costs a microsecond then. So what every
    call does stands in three methods (``__init__``, ``_attempt``, ``_attempt_done``), and what few do is called from
    there, if ``MultiCallable`` says that there is such a thing.
    """

    cancelled_when_dropped: ClassVar[bool] = False
    """Nothing of grpc's may hold the call then."""
    _parent: Any = None

    def __init__(
        self,
        method: MultiCallable,
        here: LoopChannels,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> None:
        self._method = method
        self._here = here
        self._request = request
        # A copy: an iterator could not be read again, and what its owner changes later is not for a later attempt.
        self._metadata = None if metadata is None else tuple(metadata)
        self._credentials = credentials
        self._wait_for_ready = method.patient if wait_for_ready is None else wait_for_ready
        self._compression = compression
        cluster = method.cluster
        if method.timeout is not None:
            timeout = method.policy.limited(timeout)
        around = surroundings()
        if around is not None:
            self._around = around
            timeout = cluster.limited(around, timeout)
        limit = method.limit
        if limit is not None and (timeout is None or timeout > limit):
            self._limit(timeout)
            timeout = limit
        if timeout is not None:
            self._deadline = cluster.clock() + timeout
            if timeout <= 0:
                self._end_out_of_time()
                return
        here.active[id(self)] = self._ref = weakref.ref(self)
        if method.reads_calls:
            self._context, self._metadata = context_and_metadata(cluster, method.path, self._metadata)
        try:
            lease = cluster.try_start(self._context)
        except MeshError as error:
            self._end(ended_with(error))
            return
        if lease is None:
            self._pending = here.loop.create_task(self._acquire())
            return
        try:
            self._attempt(lease, self._attempt_timeout() if method.times_attempts else timeout)
        except BaseException:
            self._done = True
            del here.active[id(self)]
            raise

    def _limit(self, timeout: float | None) -> None:
        """The service's configured timeout holds instead of the caller's."""

    # -- attempts ----------------------------------------------------------------------------------------------

    def _attempt(self, lease: Lease, timeout: float | None) -> None:
        method = self._method
        telemetry = method.telemetry
        while True:
            trace = None
            if lease.started >= telemetry.quiet_until or self._parent is not None or telemetry.current():
                trace = telemetry.rpc_attempt(
                    method.cluster, lease, method=method.path, resend=self._attempts, parent=self._parent
                )
            metadata = self._metadata
            if trace is not None or self._attempts or self._around is not None:
                metadata = self._attempt_metadata(trace)
            arguments = {
                "timeout": timeout,
                "metadata": metadata,
                "credentials": self._credentials,
                "wait_for_ready": False,  # an endpoint that is not ready is not waited for: there are others
                "compression": self._compression,
            }
            try:
                subchannel = self._here.find(lease.node)
                if subchannel.unreachable:
                    subchannel = self._here.reconsidered(subchannel)
                multicallable = subchannel.callables.get(method.key) or subchannel.callable(method)
                if trace is None:
                    native = multicallable(self._request, **arguments)
                else:
                    with trace.active():
                        native = multicallable(self._request, **arguments)
            except BaseException as error:
                another = self._not_started(lease, trace, error)
                if another is None:
                    raise
                lease = another
                continue
            self._attempts += 1
            self._lease = lease
            self._subchannel = subchannel
            self._native = native
            self._trace = trace
            if self.cancelled_when_dropped:
                native.add_done_callback(partial(_attempt_done, self._ref))
            else:
                native.add_done_callback(self._attempt_done)
            if method.times_attempts:
                self._limit_attempt()
            return

    def _not_started(self, lease: Lease, trace: AttemptTrace | None, error: BaseException) -> Lease | None:
        """After an error where the native call is made: another lease, if the sub-channel was closed between the pick
        and the call. None: the error is for the caller."""
        method = self._method
        outcome = _status.classify_local(error)
        lease.close(outcome)
        if trace is not None:
            trace.finish(None, outcome)
        if outcome is not NOT_STARTED or method.channel.closed:
            return None
        self._here.forget(lease.node)
        again = method.cluster.try_again(self._context)
        if again is None:
            raise as_aio_error(method.cluster.unavailable(self._context)) from error
        return again

    def _attempt_timeout(self) -> float | None:
        remaining = self._remaining()
        per_try = self._method.per_try_timeout
        if per_try is None:
            return remaining
        self._cut_short = remaining is None or per_try < remaining
        return per_try if self._cut_short else remaining

    def _limit_attempt(self) -> None:
        """See to what the native deadline does not express."""

    def _attempt_metadata(self, trace: AttemptTrace | None) -> tuple[tuple[str, Any], ...]:
        metadata = list(self._metadata or ())
        previous = 0 if self._around is None else self._around.previous_attempts
        if self._retry is not None:
            previous += self._retry.retried
        if previous:
            metadata.extend((name, str(previous)) for name in ATTEMPT_METADATA)
        if trace is not None:
            self._parent = trace.parent
            trace.inject(lambda key, value: metadata.append((key, value)))
        return tuple(metadata)

    def _attempt_done(self, native: Any) -> None:
        """The native call has its status (done-callback: on the loop, must not raise into grpc)."""
        if native is not self._native or self._done:
            return  # an attempt that was given up before it ended
        try:
            try:
                native.code().send(None)  # `immediate`, written out
                raise RuntimeError("a native call is done without a status")
            except StopIteration as answer:
                code = answer.value
            except Exception as error:  # out of an interceptor of the user's that runs per attempt: await raises it
                self._go_on(_status.classify_local(error), native, None, error)
                return
            method, lease = self._method, self._lease
            report = report_among(immediate(native.trailing_metadata())) if method.wants_reports else None
            if code is grpc.StatusCode.OK:
                if self._trace is None:
                    lease.node.finish(lease, OK)
                else:
                    self._settle(OK, code)
                if method.tells_successes:
                    self._succeeded()
                self._finish()
            else:
                self._attempt_failed(native, code)
            if report is not None:  # after the above: a policy must know that the one who reports has just failed
                method.cluster.observe_report(lease.node, report)
        except Exception:  # a retry strategy or a policy of the user's
            logger.exception("%s: what follows on an attempt could not be decided", self._method.path)
            if not self._done and self._pending is None and self._native in (native, None):
                self._native = native
                self._settle(NOT_STARTED, None)
                self._finish()

    def _succeeded(self) -> None:
        """Tell of a success what goes by it."""
        policy = self._method.policy
        if (throttle := policy.throttle) is not None:
            throttle.succeeded()
        if (timer := policy.timer) is not None:
            timer.record(self._lease.latency)

    def _answered(self, *, late: bool) -> None:
        """The response has begun to reach the caller. ``late``: it may have been there before he looked, so nothing
        is learnt of the endpoint's speed."""
        self._committed = True
        self._lease.answered(healthy=not late)


def _attempt_done(ref: weakref.ref[Attempts], native: Any) -> None:
    call = ref()
    if call is not None:
        call._attempt_done(native)
