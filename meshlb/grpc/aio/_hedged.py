"""Hedged calls with one request and one response: native calls side by side, the first answer wins.

The one that is the call's current attempt may change hands at any time; whoever awaits an attempt that has lost goes
on with the one that took its place, as with any further attempt.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from meshlb.grpc.aio._kinds import UnaryUnaryCall
from meshlb.hedging import LOST, HedgedCall
from meshlb.model import CANCELLED, Outcome, OutcomeKind, Sent

if TYPE_CHECKING:
    from meshlb.grpc.aio._loops import SubChannel
    from meshlb.node import Lease
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.grpc.aio")


class _Flight(NamedTuple):
    """What belongs to one attempt under way."""

    lease: Lease
    subchannel: SubChannel
    trace: AttemptTrace | None
    cut_short: bool


class HedgedUnaryCall(UnaryUnaryCall):
    """One request, one response, and several attempts at once."""

    _flights: dict[Any, _Flight] | None = None
    """The attempts under way, by native call."""
    _hedge: HedgedCall | None = None
    _winner: Lease | None = None

    def _attempt(self, lease: Lease, timeout: float | None) -> None:
        super()._attempt(lease, timeout)
        if self._context.session is not None:
            return  # two instances at once would not be a session
        lease = self._lease  # another one, if the first had no sub-channel any more
        hedge = self._hedge
        if hedge is None:
            policy = self._method.policy
            timer = policy.timer
            assert policy.hedge is not None
            assert timer is not None
            hedge = self._hedge = self._retry = HedgedCall(
                self._method.cluster,
                self._context,
                lease.started,
                None if self._deadline is None else self._deadline - lease.started,
                hedge=policy.hedge,
                timer=timer,
                retry=policy.retry,
                throttle=policy.throttle,
                served=self._served,
            )
            self._flights = {}
        assert self._flights is not None
        self._flights[self._native] = _Flight(lease, self._subchannel, self._trace, self._cut_short)
        hedge.begun(lease)
        self._schedule()

    def _attempt_done(self, native: Any) -> None:
        if self._flights is None:  # not hedged, or over
            super()._attempt_done(native)
            return
        flight = self._flights.pop(native, None)
        if flight is None or self._done:
            return
        self._native = native
        self._lease, self._subchannel, self._trace, self._cut_short = flight
        super()._attempt_done(native)

    def _succeeded(self) -> None:
        if self._hedge is None:
            super()._succeeded()
        else:
            self._winner = self._lease  # of which HedgedCall.won tells

    def _go_on(self, outcome: Outcome, fallback: Any, code: grpc.StatusCode | None, error: BaseException) -> None:
        hedge = self._hedge
        if hedge is None:
            super()._go_on(outcome, fallback, code, error)
            return
        judged = self._judged(outcome, error)
        over = hedge.failed(self._lease, judged, self._safety_after(outcome), error)
        self._settle(outcome, code)
        unconnected = outcome.sent is Sent.NOT_SENT and outcome.kind is OutcomeKind.FAILURE
        self._subchannel.unreachable = unconnected
        self._fallback = fallback
        if not over:
            self._native = next(iter(self._flights or ()), None)
            self._schedule()
        elif unconnected and self._wait_for_ready and not self._flights:
            self._native = self._retry = self._hedge = None
            self._wait_ready()
        else:
            self._give_up()

    def _schedule(self) -> None:
        """Have the next attempt made when it is due."""
        self._stop_timer()
        due = None if self._hedge is None else self._hedge.due()
        if due is not None and not self._done:
            self._timer = self._here.loop.call_later(due, self._make_due)

    def _make_due(self) -> None:
        self._timer = None
        hedge = self._hedge
        if self._done or hedge is None:
            return
        try:
            lease = hedge.next()
        except Exception:  # a policy of the user's
            logger.exception("%s: no further attempt could be made", self._method.path)
            lease = None
        if lease is not None:
            self._attempt_late(lease)
        elif hedge.is_over:
            self._give_up()
        else:
            self._schedule()  # the timer was early, or this hedge was not to be

    def _attempt_late(self, lease: Lease) -> None:
        if not self._flights:
            super()._attempt_late(lease)
            return
        try:
            self._attempt(lease, self._attempt_timeout())
        except Exception:  # the others go on
            logger.exception("%s: a hedge could not be started", self._method.path)

    def _finish(self) -> None:
        flights, self._flights = self._flights, None
        if self._hedge is not None:
            self._hedge.won(self._winner)
        lost = CANCELLED if self._winner is None else LOST
        super()._finish()
        for native, flight in (flights or {}).items():
            if flight.trace is not None:
                flight.trace.finish("CANCELLED", lost)
            native.cancel()
