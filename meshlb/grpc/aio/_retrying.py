"""What follows on an attempt that has failed: another one, the same once more, or the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.call import Call, Safety
from meshlb.grpc import _status
from meshlb.grpc.aio._completion import Completion
from meshlb.grpc.aio._ended import CANCELLED, Ended, closed_under_call, ended_with, out_of_time
from meshlb.grpc.aio._native import AioRpcError, immediate
from meshlb.model import CANCELLED as CANCELLED_OUTCOME
from meshlb.model import NO_CONTEXT, Outcome, OutcomeKind, Sent

if TYPE_CHECKING:
    from meshlb.grpc.aio._loops import SubChannel
    from meshlb.grpc.aio._multicallable import MultiCallable
    from meshlb.node import Lease
    from meshlb.serving import ServedRequest, Surroundings
    from meshlb.telemetry import AttemptTrace

_CONNECTION_CLOSED: Final = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, retryable=True, reason="connection closed")
"""We closed the sub-channel under the call, as its endpoint had left the set and did not drain in time."""

_WRITE_FAILED: Final = "Internal error from Core"
"""INTERNAL: grpc.aio's own words when a message could not be written because the connection had gone."""

_READY_PAUSE: Final = 0.05
_LONGEST_READY_PAUSE: Final = 1.0
"""Seconds between two tries of a call that waits for a connection (wait_for_ready), doubling. A try without a
connection costs microseconds; a second is what a caller notices after the service is back."""


class Retrying(Completion):
    """The way of an RPC from endpoint to endpoint, as its attempts fail. A call that goes well has no use for it."""

    _method: MultiCallable
    _lease: Lease
    _subchannel: SubChannel
    _wait_for_ready: bool
    _around: Surroundings | None = None
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

    def _attempt(self, lease: Lease, timeout: float | None) -> None:
        """Start an attempt. Raises what grpc raises for arguments that it does not take."""
        raise NotImplementedError

    def _attempt_timeout(self) -> float | None:
        """The time that an attempt may have, as far as a native deadline can express it."""
        raise NotImplementedError

    def _begun(self) -> None:
        """A further attempt has begun, or the first one late."""
        self._wake()

    def _safety(self) -> Safety:
        """Whether the request may be sent again."""
        return Safety.IDEMPOTENT if self._method.idempotent else Safety.UNSENT_ONLY

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
            self._attempt(lease, self._attempt_timeout())
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
