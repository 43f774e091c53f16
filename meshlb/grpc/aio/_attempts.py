"""The attempts of one RPC under asyncio: native calls, one after the other until one of them is the answer.

The RPC starts when it is made, as in grpc.aio, and no task is needed for it: the native call is started at once, its
done-callback closes the lease, and if the attempt failed starts the next one there and then. A task is made only where
something must be waited for first: the registry's first answer, or an endpoint (wait_for_ready).
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from meshlb.balancing.orca import report_among
from meshlb.call import Call, Safety
from meshlb.errors import MeshError
from meshlb.grpc import _status
from meshlb.grpc._sessions import context_and_metadata
from meshlb.grpc.aio._completion import Completion
from meshlb.grpc.aio._ended import CANCELLED, Ended, closed_under_call, ended_with, out_of_time
from meshlb.grpc.aio._errors import as_aio_error
from meshlb.grpc.aio._native import AioRpcError, immediate
from meshlb.model import CANCELLED as CANCELLED_OUTCOME
from meshlb.model import NO_CONTEXT, OK, Outcome, OutcomeKind, Sent
from meshlb.node import NOT_STARTED, Lease
from meshlb.serving import ATTEMPT_METADATA, surroundings

if TYPE_CHECKING:
    from meshlb.grpc.aio._loops import LoopChannels, SubChannel
    from meshlb.grpc.aio._multicallable import MultiCallable
    from meshlb.serving import ServedRequest
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.grpc.aio")

_CONNECTION_CLOSED: Final = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, retryable=True, reason="connection closed")
"""We closed the sub-channel under the call, as its endpoint had left the set and did not drain in time."""

_WRITE_FAILED: Final = "Internal error from Core"
"""INTERNAL: grpc.aio's own words when a message could not be written because the connection had gone."""

_READY_PAUSE: Final = 0.05
_LONGEST_READY_PAUSE: Final = 1.0
"""Seconds between two tries of a call that waits for a connection (wait_for_ready), doubling. A try without a
connection costs microseconds; a second is what a caller notices after the service is back."""


class Attempts(Completion):
    """The way of an RPC from endpoint to endpoint. The subclasses start native calls, and hand out messages."""

    _lease: Lease
    _subchannel: SubChannel
    _cancel_asked = False
    _committed = False
    """Something of a response has reached the caller: no further attempt may follow."""
    _cut_short = False
    """The current attempt's timeout is per_try_timeout, shorter than what the call has left."""
    _fallback: Any = None
    """What the call ends with if no further attempt can be made: the failed attempt, or an Ended."""
    _context = NO_CONTEXT
    """What a policy looks at."""
    _deadline: float | None = None
    _retry: Call | None = None
    _attempts = 0
    _ready_rounds = 0
    _pending: asyncio.Task[None] | asyncio.TimerHandle | None = None
    """What will start the next attempt."""
    _trace: AttemptTrace | None = None
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
        policy = method.policy
        self._wait_for_ready = policy.patient if wait_for_ready is None else wait_for_ready
        self._compression = compression
        cluster = method.cluster
        timeout = policy.limited(timeout)
        self._around = around = surroundings()
        if around is not None:
            timeout = cluster.limited(around, timeout)
        limit = cluster.config.timeout
        if limit is not None and (timeout is None or timeout > limit):
            self._limit(timeout)
            timeout = limit
        if timeout is not None:
            self._deadline = cluster.clock() + timeout
            if timeout <= 0:
                self._end_out_of_time()
                return
        here.active[id(self)] = self._ref = weakref.ref(self)
        if cluster.reads_calls:
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
            self._attempt(lease)
        except BaseException:
            self._done = True
            del here.active[id(self)]
            raise

    def _limit(self, timeout: float | None) -> None:
        """The service's configured timeout holds instead of the caller's."""

    # -- attempts ----------------------------------------------------------------------------------------------

    def _open(self, multicallable: Any, timeout: float | None, metadata: Any) -> Any:
        """Start a native call."""
        raise NotImplementedError

    def _begun(self) -> None:
        """A further attempt has begun, or the first one late."""
        self._wake()

    def _safety(self) -> Safety:
        """Whether the request may be sent again."""
        return Safety.IDEMPOTENT if self._method.idempotent else Safety.UNSENT_ONLY

    def _per_try(self) -> float | None:
        """The time that an attempt may have, as far as a native deadline can express it."""
        return self._method.per_try_timeout

    def _on_done(self) -> Callable[[Any], None]:
        """The done-callback for a native call."""
        return self._attempt_done

    def _attempt(self, lease: Lease) -> None:
        """Start an attempt. Raises what grpc raises for arguments that it does not take."""
        method = self._method
        while True:
            trace = method.telemetry.rpc_attempt(
                method.cluster, lease, method=method.path, resend=self._attempts, parent=self._parent
            )
            metadata = self._metadata
            if trace is not None or self._attempts or self._around is not None:
                metadata = self._attempt_metadata(trace)
            timeout = self._attempt_timeout()
            try:
                subchannel = self._here.get(lease.node)
                multicallable = subchannel.callable(method)
                if trace is None:
                    native = self._open(multicallable, timeout, metadata)
                else:
                    with trace.active():
                        native = self._open(multicallable, timeout, metadata)
            except BaseException as error:
                outcome = _status.classify_local(error)
                lease.close(outcome)
                if trace is not None:
                    trace.finish(None, outcome)
                if outcome is not NOT_STARTED or method.channel.closed:
                    raise
                # The sub-channel was closed between the pick and the call.
                self._here.forget(lease.node)
                again = method.cluster.try_again(self._context)
                if again is None:
                    raise as_aio_error(method.cluster.unavailable(self._context)) from error
                lease = again
                continue
            self._attempts += 1
            self._lease = lease
            self._subchannel = subchannel
            self._native = native
            self._trace = trace
            native.add_done_callback(self._on_done())
            return

    def _attempt_timeout(self) -> float | None:
        remaining = self._remaining()
        per_try = self._per_try()
        if per_try is None:
            return remaining
        self._cut_short = remaining is None or per_try < remaining
        return per_try if self._cut_short else remaining

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
                code = immediate(native.code())
            except Exception as error:  # out of an interceptor of the user's that runs per attempt: await raises it
                self._go_on(_status.classify_local(error), native, None, error)
                return
            node, report = self._lease.node, None
            if self._method.cluster.wants_reports:
                report = report_among(immediate(native.trailing_metadata()))
            if code is grpc.StatusCode.OK:
                self._settle(OK, code)
                self._succeeded()
                self._finish()
            else:
                self._attempt_failed(native, code)
            if report is not None:  # after the above: a policy must know that the one who reports has just failed
                self._method.cluster.observe_report(node, report)
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

    def _settle(self, outcome: Outcome, code: grpc.StatusCode | None) -> None:
        """Close the attempt's lease and trace."""
        self._lease.close(outcome)
        if self._trace is not None:
            self._trace.finish(None if code is None else code.name, outcome, self._lease.latency)

    def _attempt_failed(self, native: Any, code: grpc.StatusCode) -> None:
        details: str | None = immediate(native.details())
        initial = immediate(native.initial_metadata())
        trailing = immediate(native.trailing_metadata())
        known = code
        if code is grpc.StatusCode.INTERNAL and details == _WRITE_FAILED:
            known = grpc.StatusCode.UNAVAILABLE
        outcome = _status.classify(known, details, trailing, initial_metadata=initial)
        fallback = native
        if outcome is CANCELLED_OUTCOME and self._subchannel.closing and not self._cancel_asked:
            outcome = _CONNECTION_CLOSED
            fallback = closed_under_call(self._lease.endpoint.address)
        error = AioRpcError(code, initial, trailing, details, immediate(native.debug_error_string()))
        self._go_on(outcome, fallback, code, error)

    def _go_on(self, outcome: Outcome, fallback: Any, code: grpc.StatusCode | None, error: BaseException) -> None:
        """An attempt has failed: make another one, or end."""
        retry = self._retry
        if retry is None:
            started = self._lease.started
            left = None if self._deadline is None else self._deadline - started
            policy = self._method.policy
            retry = self._retry = Call(
                self._method.cluster,
                self._context,
                started,
                left,
                retry=policy.retry,
                throttle=policy.throttle,
                served=self._served,
            )
        safety = self._safety_after(outcome)
        lease = self._lease
        pause = retry.after(lease, self._judged(outcome, error), safety, error)
        self._settle(outcome, code)
        unconnected = outcome.sent is Sent.NOT_SENT and outcome.kind is OutcomeKind.FAILURE
        self._subchannel.unreachable = unconnected
        self._fallback = fallback
        if pause is not None:
            self._native = None
            if pause > 0:
                self._pending = self._here.loop.call_later(pause, self._again)
            else:
                self._again()
        elif unconnected and self._wait_for_ready and safety is not Safety.NEVER:
            self._native = None
            self._retry = None
            self._wait_ready()
        else:
            self._give_up()

    @property
    def _served(self) -> ServedRequest | None:
        """The request that the call is made for, if that is known."""
        return None if self._around is None else self._around.request

    def _safety_after(self, outcome: Outcome) -> Safety:
        if self._committed or (outcome is _status.TIMED_OUT and not self._cut_short):
            return Safety.NEVER  # where the time of the whole call is up, a timer's inaccuracy must not retry it
        return self._safety()

    def _judged(self, outcome: Outcome, error: BaseException) -> Outcome:
        """The outcome as ``Retry.retry_on``, or the codes of the method's retryPolicy, have it."""
        policy, lease = self._method.policy, self._lease
        if policy.retry_on is None:
            return outcome
        return policy.judged(outcome, error, self._attempts, self._method.cluster.clock() - lease.started)

    def _again(self) -> None:
        """Make the next attempt."""
        self._pending = None
        if self._done:
            return
        lease = self._retry.again() if self._retry is not None else None
        if lease is None:
            self._give_up()
        else:
            self._attempt_late(lease)

    def _attempt_late(self, lease: Lease) -> None:
        """Start an attempt where nobody is there to be told of an error."""
        try:
            self._attempt(lease)
        except Exception as error:
            if self._fallback is None:
                self._fallback = ended_with(error)
            self._give_up()
        else:
            self._begun()

    def _give_up(self) -> None:
        fallback = self._fallback
        if isinstance(fallback, Ended):
            self._end(fallback)
        else:
            self._native = fallback
            self._finish()

    # -- waiting for an endpoint -------------------------------------------------------------------------------

    async def _acquire(self) -> None:
        """Wait for the registry's first answer; with wait_for_ready until an endpoint can be had."""
        cluster = self._method.cluster
        try:
            lease = await cluster.start_async(
                self._context, timeout=self._remaining(), patient=bool(self._wait_for_ready)
            )
        except asyncio.CancelledError:
            self._end(CANCELLED)
            raise
        except Exception as error:
            remaining = self._remaining()
            if remaining is not None and remaining <= 0:
                self._end_out_of_time(error)
            else:
                self._end(ended_with(error))
            return
        self._pending = None
        if self._done:
            lease.close(CANCELLED_OUTCOME)
        else:
            self._attempt_late(lease)

    def _wait_ready(self) -> None:
        """Let some time pass before the next try to find a connection (wait_for_ready)."""
        pause = min(_LONGEST_READY_PAUSE, _READY_PAUSE * 2**self._ready_rounds)
        self._ready_rounds += 1
        remaining = self._remaining()
        if remaining is not None and remaining <= pause:
            self._pending = self._here.loop.call_later(remaining, self._end_out_of_time)
        else:
            self._pending = self._here.loop.call_later(pause, self._try_ready)

    def _try_ready(self) -> None:
        self._pending = None
        if self._done:
            return
        lease = self._method.cluster.try_again(self._context)
        if lease is None:
            self._pending = self._here.loop.create_task(self._acquire())
        else:
            self._attempt_late(lease)

    def _end_out_of_time(self, cause: BaseException | None = None) -> None:
        self._end(out_of_time(str(self._method.cluster.query), cause))

    def _remaining(self) -> float | None:
        """Seconds that attempts may still take, not negative; None without a limit."""
        if self._deadline is None:
            return None
        remaining = self._deadline - self._method.cluster.clock()
        return remaining if remaining > 0 else 0.0
