"""One request whose attempts may overlap, sans I/O: an exchange for each attempt, and one call for all of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from meshlb._http.exchange import Exchange
from meshlb._http.options import is_idempotent
from meshlb.balancing.orca import report_in
from meshlb.hedging import LOST, HedgedCall
from meshlb.model import CANCELLED, Outcome

if TYPE_CHECKING:
    from meshlb._http.stream import LeaseStream
    from meshlb.node import Lease
    from meshlb.resilience.hedge import HedgeTimer


class HedgedExchange(Exchange):
    """An exchange with a service whose calls are hedged, where they may be: ``hedged`` says of each.

    If it is, each attempt has an exchange of its own (``sibling``); ``hedge_failed`` and ``hedge_answered`` stand in
    the place of ``failed`` and of ``accept``, which is left with what they have judged.
    """

    __slots__ = ("_timer",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._timer: HedgeTimer | None = None
        """What learns how long the call takes while too little is known to hedge it."""

    def hedged(self, lease: Lease) -> HedgedCall | None:
        """The call whose attempts may overlap, if this is to be one: it may be sent twice, and its body be read by two
        attempts at once. ``lease``: the one of its first attempt."""
        cluster = self.route.cluster
        retry = cluster.config.retry
        if retry is None or retry.hedge is None:
            return None
        if self._body is not None or not self._options.retry:
            return None
        if not is_idempotent(self.request, self._options, retry):
            return None
        if self.context.session is not None:
            return None  # two instances at once would not be a session
        timer = cluster.hedge_timer("", retry.hedge)
        if timer.delay() is None:
            self._timer = timer
            return None
        started = lease.started if self._started is None else self._started
        call = HedgedCall(
            cluster, self.context, started, self.timeout, hedge=retry.hedge, timer=timer, served=self._served
        )
        self._call = call
        return call

    def accept(self, response: Any, stream_class: type[LeaseStream], *, judged: bool = False) -> Any:
        accepted = super().accept(response, stream_class, judged=judged)
        if not judged and self._timer is not None and self.lease is not None:
            self._timer.record(self.lease.latency)
        return accepted

    def sibling(self) -> HedgedExchange:
        """The same call's exchange for an attempt beside this one's."""
        return copy.copy(self)

    def hedge_failed(self, error: BaseException) -> bool:
        """The attempt raised. True: the caller gets this very error."""
        return self._hedge_ended(self._outcome_of(error), error, None)

    def hedge_answered(self, response: Any) -> bool:
        """The attempt was answered. True: the caller gets this response."""
        lease, cluster = self.lease, self.route.cluster
        assert lease is not None
        outcome = self._answer(response)
        over = not outcome.retryable or self._hedge_ended(outcome, None, response)
        if cluster.wants_reports:
            cluster.observe_report(lease.node, report_in(response.headers))
        return over

    def _hedge_ended(self, outcome: Outcome, error: BaseException | None, response: Any) -> bool:
        lease, call = self.lease, self._call
        assert lease is not None
        assert isinstance(call, HedgedCall)
        over = call.failed(lease, outcome, self._safety(), error, response)
        self._end_trace(outcome)
        return over

    def lost(self, *, to_another: bool) -> None:
        """Another attempt of the call has won, or the caller has gone. Idempotent."""
        self.finish(LOST if to_another else CANCELLED)
