"""Hedged blocking calls with one request and one response: futures side by side, the first answer wins."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.grpc._attempts import Attempts, attempt_metadata, outcome_of, unreachable
from meshlb.grpc._errors import ChannelClosed, as_rpc_error
from meshlb.grpc._requests import serialized
from meshlb.grpc._status import classify
from meshlb.hedging import LOST, HedgedCall
from meshlb.model import CANCELLED, OK, Outcome
from meshlb.node import NOT_STARTED

if TYPE_CHECKING:
    from meshlb.grpc._blocking import BlockingMethod
    from meshlb.grpc._method import Invocation
    from meshlb.node import Lease
    from meshlb.telemetry import AttemptTrace


class _Flight:
    """One attempt under way. ``limited``: it has less time than the call."""

    __slots__ = ("future", "lease", "limited", "trace")

    def __init__(self, future: Any, lease: Lease, trace: AttemptTrace | None, *, limited: bool) -> None:
        self.future = future
        self.lease = lease
        self.trace = trace
        self.limited = limited

    def end(self, status: str, outcome: Outcome) -> None:
        if self.trace is not None:
            self.trace.finish(status, outcome, self.lease.latency)


class HedgedRace:
    """The attempts of one call. Run by the caller's thread, who alone makes decisions."""

    def __init__(self, method: BlockingMethod, invocation: Invocation, attempts: Attempts, call: HedgedCall) -> None:
        self._method = method
        self._channel = method.channel
        self._invocation = invocation
        self._request = serialized(method.serializer, invocation.request)
        self._attempts = attempts
        self._call = call
        self._landed: SimpleQueue[_Flight] = SimpleQueue()
        self._flying: list[_Flight] = []
        self._parent: Any = None
        self._final: Any = None
        self.lease: Lease
        """Of the attempt that the race has ended with."""
        self.error: BaseException
        """What it has ended with, if nobody could be reached."""

    def run(self, lease: Lease, trace: AttemptTrace | None) -> bool:
        """Make the call. False: nobody could be reached, and the call is one that waits for that. Raises what the
        caller gets if all attempts fail."""
        winner: _Flight | None = None
        try:
            self._launch(lease, trace)
            while True:
                flight = self._wait()
                if flight is None:
                    further = self._call.next()
                    if further is not None:
                        self._launch(further, None)
                    elif self._call.is_over:
                        break
                    continue
                self._flying.remove(flight)
                self.lease, self._final = flight.lease, flight.future
                if flight.future.code() is grpc.StatusCode.OK:
                    winner = flight
                    return True
                if self._failed(flight):
                    break
        finally:
            self._end(winner)
        self.error = error = _error_of(self._final)
        outcome = outcome_of(error, channel_closed=self._channel.closed)
        if self._attempts.patient and unreachable(outcome):
            return False
        self._attempts.explain(error, self.lease)
        try:
            raise error
        finally:
            del error, self.error, self._final  # or it would hold this frame, which holds it

    def result(self, *, with_call: bool) -> Any:
        """The response of the attempt that has won."""
        response = self._final.result()
        return (response, self._final) if with_call else response

    def _wait(self) -> _Flight | None:
        """The next attempt that has ended; None when it is time for another one."""
        try:
            return self._landed.get(timeout=self._call.due())
        except Empty:
            return None

    def _launch(self, lease: Lease, trace: AttemptTrace | None) -> None:
        method, invocation, attempts, channel = self._method, self._invocation, self._attempts, self._channel
        while True:
            resend = attempts.made - 1
            if trace is None:
                trace = channel.mesh.telemetry.rpc_attempt(
                    channel.cluster, lease, method=method.name, resend=resend, parent=self._parent
                )
            if trace is not None:
                self._parent = trace.parent
            timeout = attempts.next_timeout()
            try:
                future = method.raw_native(lease.node).future(
                    self._request,
                    timeout,
                    attempt_metadata(invocation.metadata, attempts.previous, trace),
                    invocation.credentials,
                    None,
                    invocation.compression,
                )
            except BaseException as error:
                outcome = outcome_of(error, channel_closed=channel.closed)
                lease.close(outcome)
                if trace is not None:
                    trace.finish(None, outcome)
                again = attempts.repick(lease) if outcome is NOT_STARTED and not channel.closed else None
                if again is not None:
                    lease, trace = again, None
                    continue
                if outcome is NOT_STARTED:
                    raise (
                        ValueError("Cannot invoke RPC on closed channel!")
                        if channel.closed
                        else as_rpc_error(channel.cluster.unavailable())
                    ) from None
                raise
            break
        flight = _Flight(future, lease, trace, limited=attempts.limited)
        self._flying.append(flight)
        self._call.begun(lease)
        landed = self._landed
        future.add_done_callback(lambda _: landed.put(flight))  # on gRPC's spin thread

    def _failed(self, flight: _Flight) -> bool:
        """Deal with an attempt that has failed. Whether that is the end of the call."""
        future, attempts = flight.future, self._attempts
        outcome = classify(
            future.code(), future.details(), future.trailing_metadata(), locally_cancelled=self._channel.closed
        )
        self._channel.note(flight.lease.node, outcome)
        error = _error_of(future)
        judged = attempts.judged(outcome, error)
        safety = attempts.safety_after(outcome, limited=flight.limited, replayable=True)
        over = self._call.failed(flight.lease, judged, safety, error)
        self._method.observe_report(flight.lease, future)
        flight.end(future.code().name, outcome)
        return over

    def _end(self, winner: _Flight | None) -> None:
        """Give the other attempts up."""
        if winner is not None:
            winner.lease.close(OK)
            winner.end("OK", OK)
        self._call.won(None if winner is None else winner.lease)
        lost = LOST if winner is not None else CANCELLED
        for flight in self._flying:
            flight.future.cancel()
            flight.end("CANCELLED", lost)
        if winner is not None:
            self._method.observe_report(winner.lease, winner.future)


def _error_of(future: Any) -> BaseException:
    """What a blocking call would raise in its place."""
    error: BaseException = ChannelClosed("Channel closed!") if future.cancelled() else future.exception()
    return error
