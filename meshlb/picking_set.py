"""One service: how attempts on its endpoints begin, when one can be had at once."""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING

from meshlb import resilience  # what is off is not imported
from meshlb.errors import SessionLost, Throttled
from meshlb.judged_set import ABANDONED_FOR_EACH, JudgedSet
from meshlb.model import NO_CONTEXT, CallContext
from meshlb.probing import Probing
from meshlb.resilience import TokenBudget
from meshlb.resilience.hedge import HedgeTimer
from meshlb.serving import note_in_vain

if TYPE_CHECKING:
    from meshlb.affinity import KeySource
    from meshlb.balancing.orca import LoadReport
    from meshlb.node import Lease, Node
    from meshlb.resilience import (
        AdaptiveThrottle,
        ConcurrencyLimiter,
        Hedge,
        RetryThrottle,
        RetryThrottling,
    )
    from meshlb.serving import Surroundings
    from meshlb.sessions import CookieSessions, SessionTable
    from meshlb.view import View

logger = logging.getLogger("meshlb.cluster")


class PickingSet(JudgedSet):
    """The endpoints of one service, with what chooses one of them for a call and what a call may cost.

    Calls read ``view`` and touch only the node they got. Whatever changes the view is in the base classes, under a lock
    that no pick takes.
    """

    def _set_up(self) -> None:
        super()._set_up()
        config = self.config
        self.sessions: SessionTable | None = None
        """Where the sessions of keys are kept, if there are such."""
        self.cookies: CookieSessions | None = None
        """What reads and writes the cookies of sessions, if there are such."""
        if config.sticky is not None:
            from meshlb.sessions import CookieSessions, SessionTable, StickyKey

            if isinstance(config.sticky, StickyKey):
                self.sessions = SessionTable(config.sticky, self.clock)
            else:
                self.cookies = CookieSessions(config.sticky)
        self.hashes: bool = getattr(self.policy, "uses_key", False) or self.sessions is not None
        """Whether a call's key is looked at, by the policy or for its session, so that looking for one is worth it."""
        self.reads_calls: bool = self.hashes or self.cookies is not None
        """Whether what a call carries, a key or a cookie, says where it goes."""
        self.hashes_callers: bool = getattr(self.policy, "hashes_callers", False)
        self.key_sources: tuple[KeySource, ...] = config.hash_on  # type: ignore[assignment]  # ServiceConfig made it one
        self.wants_reports: bool = getattr(self.policy, "wants_reports", False)
        """Whether the policy goes by what endpoints report of their load, so that looking for it is worth it."""
        probes = getattr(self.policy, "probes", None)
        self.probing: Probing | None = None if probes is None else Probing(self, probes)
        """Where adapters enter what makes explicit probes; None if the policy wants none."""

    def _start_afresh(self) -> None:
        super()._start_afresh()
        if self.probing is not None:
            self.probing.after_fork_in_child()
        self.retries = 0
        """Attempts beyond the first of their call."""
        self._retries_lock = threading.Lock()
        retry, throttling = self.config.retry, self.config.throttling
        self.budget: TokenBudget | None = None
        if retry is not None and retry.budget is not None:
            self.budget = TokenBudget(retry.budget, self.clock)
        self.throttling: AdaptiveThrottle | None = None
        """What refuses calls here while the service turns most of them away."""
        if throttling is not None:
            self.throttling = resilience.AdaptiveThrottle(throttling, self.clock, self._random)
        self._retry_throttles: dict[RetryThrottling, RetryThrottle] = {}
        self._hedge_timers: dict[tuple[str, Hedge], HedgeTimer] = {}

    def try_start(self, context: CallContext = NO_CONTEXT) -> Lease | None:
        """Begin a call's first attempt without waiting; None if no endpoint can be had at once.

        Raises Throttled if the call is refused (only with ``config.throttling``).
        """
        if self._abandoned:
            self._close_abandoned(ABANDONED_FOR_EACH)
        if self.throttling is not None and not self.throttling.admit():
            note_in_vain()
            raise Throttled(
                f"service '{self.query}': refused here, without an attempt: the service turns most calls away "
                "(ServiceConfig.throttling)"
            )
        view = self.view
        sticky = self.stickiness
        if sticky is not None or self.limiter is not None:
            node = view.picker.pick(context) if sticky is None else sticky.choose(view, context)
            return self.try_start_on(node, view, context)
        node = view.picker.pick(context)
        if node is None or (lease := node.begin()) is None:
            return self.try_start_on(node, view, context)
        budget = self.budget  # as below: what hardly ever happens is not to cost every call a call
        if budget is not None:
            if lease.started < budget.until:
                budget.note()
            else:
                budget.deposit(lease.started)
        return lease

    def try_start_on(self, node: Node | None, view: View, context: CallContext = NO_CONTEXT) -> Lease | None:
        """``try_start`` on the endpoint that a view's picker has chosen, or on another one if that cannot be."""
        sticky = self.stickiness
        if node is None or (lease := node.begin(view.panic and view.forces(node))) is None:
            if self._dormant:
                self._resume()
            lease = self.try_again(context)
            if lease is None:
                return None
        elif sticky is not None:
            sticky.settle(context, node)
        if self.budget is not None:
            self.budget.deposit(lease.started)
        return lease

    def try_again(self, context: CallContext, *, granted: bool = False) -> Lease | None:
        """Begin a further attempt, outside ``context.excluded`` and past blocked endpoints; None if there is none.
        ``granted``: it is the call's turn in the queue of the limits."""
        limiter, sticky = self.limiter, self.stickiness
        rebuilt = False
        while True:
            view = self.view
            pick = view.picker.pick if sticky is None else functools.partial(sticky.choose, view)
            if limiter is not None and (self._closed or self._barred(limiter, view, granted=granted)):
                return None
            refused: set[object] = set(context.excluded)
            narrowed = context.excluding(refused)
            while (node := pick(narrowed)) is not None and node not in refused:
                if (lease := node.begin(view.panic and view.forces(node), granted=granted)) is not None:
                    if sticky is not None:
                        sticky.settle(context, node)
                    return lease
                if limiter is not None and limiter.bars(granted=granted):
                    return None
                refused.add(node)
            if view is not self.view:
                continue
            if rebuilt or view.panic or not any(node.is_open for node in view.nodes):
                return None
            # Breakers have opened that the control loop has not come to yet. Without them the view may be one of panic,
            # in which there is somebody to call after all.
            rebuilt = True
            self._rebuild()

    def _barred(self, limiter: ConcurrencyLimiter, view: View, *, granted: bool) -> bool:
        if limiter.bars(granted=granted):
            return True
        if limiter.limits_endpoints and view.nodes and all(node.is_full for node in view.nodes):
            limiter.refuse()  # without asking each of them, one pick after the other
            return True
        return False

    def observe_report(self, node: Node, report: LoadReport | None) -> None:
        """Hand on what an endpoint reported of its load with a response; None if that made no sense."""
        observe = getattr(self.view.picker, "observe_report", None)  # not that of a view without endpoints
        if observe is not None and report is not None:
            try:
                observe(node, report)
            except Exception:  # a policy of the program's own; the call whose response it was is well
                logger.exception("%s: policy %r failed on a load report", self.query, self.policy.name)

    def count_retry(self) -> None:
        """Note an attempt beyond the first of its call."""
        with self._retries_lock:
            self.retries += 1

    def limited(self, around: Surroundings, timeout: float | None) -> float | None:
        """Seconds that a call may take which would have ``timeout`` by itself, given what surrounds it; 0 or less: it
        must not begin. To be asked once for each call: one that is made for a retry counts as one here, too."""
        if self.budget is not None and around.previous_attempts:
            self.budget.charge()
        return around.limited(timeout)

    def retry_throttle(self, options: RetryThrottling) -> RetryThrottle:
        """The token bucket of gRFC A6 with these options, one for the whole service. A new one begins as full as the
        one before it."""
        throttle = self._retry_throttles.get(options)
        if throttle is None:
            with self._retries_lock:
                previous = next(reversed(self._retry_throttles.values()), None)
                throttle = self._retry_throttles.setdefault(options, resilience.RetryThrottle(options, previous))
        return throttle

    def hedge_timer(self, method: str, options: Hedge) -> HedgeTimer:
        """How long calls of a method wait before they are hedged; ``method`` may be any name of a kind of calls."""
        timer = self._hedge_timers.get((method, options))
        if timer is None:
            timer = self._hedge_timers.setdefault((method, options), HedgeTimer(options, self.clock))
        return timer

    def lost_session(self, context: CallContext) -> SessionLost | None:
        """The error of a call whose session may not move and whose instance is gone, if this is one."""
        if self.stickiness is None or not self._settled or not self.stickiness.lost(self.view, context):
            return None
        return SessionLost(
            f"service '{self.query}': the instance of this session is gone, and ServiceConfig.sticky has "
            'when_gone="fail"; begin a new session'
        )

    def close(self) -> None:
        super().close()
        if self.probing is not None:
            self.probing.close()

    def _resume(self) -> None:
        super()._resume()
        if self.probing is not None:
            self.probing.resume()
