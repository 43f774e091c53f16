"""One service: what calls use of it. The leases on its endpoints, and the waiting for them."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from meshlb import resilience  # what is off is not imported
from meshlb.affinity import call_context
from meshlb.discovery.base import ServiceQuery
from meshlb.endpoint_set import Background, ClusterListener
from meshlb.errors import LimitExceeded, MeshClosed, MeshError, SessionLost, Throttled
from meshlb.judged_set import ABANDONED_FOR_EACH, JudgedSet
from meshlb.model import NO_CONTEXT, CallContext, HashKey
from meshlb.node import Lease
from meshlb.probing import Probing
from meshlb.resilience import TokenBudget
from meshlb.resilience.hedge import HedgeTimer
from meshlb.resilience.queueing import Queueing
from meshlb.scope import LeaseScope
from meshlb.serving import note_in_vain
from meshlb.unavailable import describe_limits, why_unavailable

if TYPE_CHECKING:
    from meshlb.affinity import KeySource
    from meshlb.balancing.orca import LoadReport
    from meshlb.config import ServiceConfig
    from meshlb.node import Node
    from meshlb.resilience import (
        AdaptiveThrottle,
        ConcurrencyLimiter,
        Hedge,
        RetryThrottle,
        RetryThrottling,
        StallMonitor,
    )
    from meshlb.serving import Surroundings
    from meshlb.sessions import CookieSessions, SessionTable
    from meshlb.view import View

__all__ = ["Background", "Cluster", "ClusterListener"]

logger = logging.getLogger("meshlb.cluster")


class Cluster(JudgedSet):
    """The instances of one service and their live state. Made by ``Mesh.cluster``; safe from any thread and loop.

    Calls read ``view`` and touch only the node they got. Whatever changes the view is in the base class, under a lock
    that no pick takes.
    """

    def __init__(
        self,
        query: ServiceQuery,
        config: ServiceConfig,
        *,
        clock: Callable[[], float],
        random: Random,
        background: Background,
        on_resume: Callable[[], None] | None = None,
        stalls: StallMonitor | None = None,
    ) -> None:
        self.budget: TokenBudget | None = None
        self.throttling: AdaptiveThrottle | None = None
        """What refuses calls here while the service turns most of them away."""
        self.retries = 0
        """Attempts beyond the first of their call."""
        self.probing: Probing | None = None
        """Where adapters enter what makes explicit probes; None if the policy wants none."""
        super().__init__(
            query, config, clock=clock, random=random, background=background, on_resume=on_resume, stalls=stalls
        )

        self.sessions: SessionTable | None = None
        """Where the sessions of keys are kept, if there are such."""
        self.cookies: CookieSessions | None = None
        """What reads and writes the cookies of sessions, if there are such."""
        if config.sticky is not None:
            from meshlb.sessions import CookieSessions, SessionTable, StickyKey

            if isinstance(config.sticky, StickyKey):
                self.sessions = SessionTable(config.sticky, clock)
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
        if (probes := getattr(self.policy, "probes", None)) is not None:
            self.probing = Probing(self, probes)

    def _start_afresh(self) -> None:
        super()._start_afresh()
        if self.probing is not None:
            self.probing.after_fork_in_child()
        self.retries = 0
        self._retries_lock = threading.Lock()
        retry = self.config.retry
        if retry is not None and retry.budget is not None:
            self.budget = TokenBudget(retry.budget, self.clock)
        if self.config.throttling is not None:
            self.throttling = resilience.AdaptiveThrottle(self.config.throttling, self.clock, self._random)
        self._retry_throttles: dict[RetryThrottling, RetryThrottle] = {}
        self._hedge_timers: dict[tuple[str, Hedge], HedgeTimer] = {}

    # -- calls -------------------------------------------------------------------------------------------------

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

    def start(self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False) -> Lease:
        """Begin a call's first attempt, blocking this thread for the registry's first answer if need be.

        ``timeout``: seconds left of the call's own deadline. ``patient`` (gRPC's wait_for_ready): wait until an
        endpoint can be had, not only for the first answer.

        Raises NoEndpoints or CircuitOpen if there is nobody to call, DiscoveryTimeout if the registry's first answer
        takes longer than ``config.discovery_timeout`` or ``timeout``, DiscoveryError if it failed until then,
        Throttled or LimitExceeded if it is refused here, MeshClosed after close.
        """
        deadline: float | None = None
        waited = False
        began = 0.0 if timeout is None else self.clock()
        while True:
            # In this order: what changes after these two reads wakes the wait below, or is seen by the pick.
            changed, settled = self._changed, self._settled
            refusals = self._refusals()
            lease = self.try_start(context)
            if lease is not None:
                return lease
            if (lost := self.lost_session(context)) is not None:
                raise lost
            if refusals != self._refusals():
                lease = self._queued(self._queueing(context, began, timeout).run())
                if lease is not None:
                    return lease
            if not waited:
                deadline, waited = self._patience(timeout, patient=patient), True
            changed.wait(self._remaining(deadline, hopeless=settled and not patient))

    async def start_async(
        self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False
    ) -> Lease:
        """``start`` for a task of an asyncio or trio loop."""
        deadline: float | None = None
        waited = False
        began = 0.0 if timeout is None else self.clock()
        while True:
            changed, settled = self._changed, self._settled
            refusals = self._refusals()
            lease = self.try_start(context)
            if lease is not None:
                return lease
            if (lost := self.lost_session(context)) is not None:
                raise lost
            if refusals != self._refusals():
                lease = self._queued(await self._queueing(context, began, timeout).run_async())
                if lease is not None:
                    return lease
            if not waited:
                deadline, waited = self._patience(timeout, patient=patient), True
            await changed.wait_async(self._remaining(deadline, hopeless=settled and not patient))

    def lease(self, key: HashKey | None = None, *, timeout: float | None = None) -> LeaseScope:
        """A context manager, sync and async, that picks an endpoint for one attempt of any protocol.

        The block's exception, or its absence, is the outcome; its duration is the latency, unless
        ``lease.answered()`` says when the answer came. A ``lease.close(outcome)`` within the block wins. ``key`` is
        what a hash policy hashes. Entering raises what ``start`` raises.
        """
        return LeaseScope(self, call_context(self, key), timeout)

    @property
    def may_wait(self) -> bool:
        """Whether a call that could not be started may be, impatient as it is, if it waits: for the registry's first
        answer, or for a place within the limits."""
        return self._answered_at is None or (self.limiter is not None and self.limiter.may_wait)

    def _refusals(self) -> int:
        return 0 if self.limiter is None else self.limiter.refusals

    def _queueing(self, context: CallContext, began: float, timeout: float | None) -> Queueing[Lease]:
        limiter = self.limiter
        assert limiter is not None  # it has just refused an attempt
        until = self.clock() + limiter.options.queue_timeout
        if timeout is not None:
            until = min(until, began + timeout)
        return Queueing(
            limiter,
            lambda: self.try_again(context, granted=True),
            lambda: until - self.clock(),
            lambda why: LimitExceeded(f"{describe_limits(self.query, limiter)}, and {why}"),
        )

    def _queued(self, lease: Lease | None) -> Lease | None:
        if lease is not None and self.budget is not None:
            self.budget.deposit(lease.started)
        return lease

    def lost_session(self, context: CallContext) -> SessionLost | None:
        """The error of a call whose session may not move and whose instance is gone, if this is one."""
        if self.stickiness is None or not self._settled or not self.stickiness.lost(self.view, context):
            return None
        return SessionLost(
            f"service '{self.query}': the instance of this session is gone, and ServiceConfig.sticky has "
            'when_gone="fail"; begin a new session'
        )

    def _patience(self, timeout: float | None, *, patient: bool) -> float | None:
        limit = None if patient else self.config.discovery_timeout
        if timeout is not None:
            limit = timeout if limit is None else min(timeout, limit)
        return None if limit is None else self.clock() + limit

    def _remaining(self, deadline: float | None, *, hopeless: bool = False) -> float | None:
        if self._closed or hopeless:
            raise self.unavailable()
        if deadline is None:
            return None
        remaining = deadline - self.clock()
        if not remaining > 0:
            raise self.unavailable()
        return remaining

    def unavailable(self, context: CallContext = NO_CONTEXT) -> MeshError:
        """The error that says why no endpoint can be had now, by the call with this context, and what to do."""
        if self._closed:
            return MeshClosed(
                f"service '{self.query}': the mesh is closed; make the call before Mesh.close(), or make a new Mesh"
            )
        if (lost := self.lost_session(context)) is not None:
            return lost
        return why_unavailable(
            self.query,
            self.nodes,
            answered=self._answered_at is not None,
            error=self._last_error,
            patience=self.config.discovery_timeout,
            limiter=self.limiter,
        )

    # -- readiness ---------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until an endpoint can be called, for at most ``timeout`` seconds (None: no limit).

        Raises what a call would get if the time runs out: DiscoveryTimeout, DiscoveryError, NoEndpoints, CircuitOpen;
        MeshClosed after close.
        """
        deadline = None if timeout is None else self.clock() + timeout
        while True:
            changed = self._changed
            if self._ready():
                return
            changed.wait(self._remaining(deadline))

    async def wait_ready_async(self, timeout: float | None = None) -> None:
        """``wait_ready`` for a task of an asyncio or trio loop."""
        deadline = None if timeout is None else self.clock() + timeout
        while True:
            changed = self._changed
            if self._ready():
                return
            await changed.wait_async(self._remaining(deadline))

    def _ready(self) -> bool:
        if self._dormant:
            self._resume()
        return bool(self.view.nodes) and not self._closed

    def close(self) -> None:
        super().close()
        if self.probing is not None:
            self.probing.close()

    def _resume(self) -> None:
        super()._resume()
        if self.probing is not None:
            self.probing.resume()

    def snapshot(self) -> dict[str, Any]:
        """The state of the service as plain data (JSON types), for people and for exporters."""
        from meshlb.snapshot import cluster_snapshot

        self._close_abandoned()
        with self._lock:
            return cluster_snapshot(self, (*self.nodes, *self._members.draining), self._last_error)
