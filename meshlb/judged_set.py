"""A cluster's judgement of its endpoints: what attempts, active checks and people show of them, and what follows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from meshlb import health, resilience  # what is off is not imported
from meshlb.balancing.ewma import PeakEwma
from meshlb.change_log import ChangeLog
from meshlb.control import weakly
from meshlb.endpoint_set import EndpointSet
from meshlb.errors import ConfigError
from meshlb.limited_node import LimitedNode
from meshlb.model import Endpoint
from meshlb.node import Lease, Node, abandon
from meshlb.resilience import CircuitBreaker, EjectionCap, StateListener
from meshlb.resilience.breaker import BreakerState
from meshlb.state_changes import StateChanges, why

if TYPE_CHECKING:
    from meshlb.resilience import OutlierDetector

logger = logging.getLogger("meshlb.cluster")

ABANDONED_FOR_EACH: Final = 2
"""How many abandoned leases a new call closes. With one, callers that drop every lease would keep a backlog as it is;
with more, it shrinks, however few turns the interpreter gives to the control loop among many busy threads."""

_TURN: Final = 100
"""How many abandoned leases the control loop closes before it sees to its other work; some 0.2 ms."""

_SHORTEST_DELAY: Final = 0.01
"""Seconds to the second look at a breaker whose timer came early."""

_CHECKS_PAUSE: Final = 50e-6
"""Seconds, for each endpoint, from a health check that changes the view to its rebuild, which takes 2 to 5 us of them.
In an outage the checks of thousands of endpoints fail one by one; this way they take a tenth of the loop's time."""


class JudgedSet(EndpointSet):
    """The endpoints of one service, with whatever takes them out of rotation and puts them back.

    Nodes report from any thread, and are heard on the control loop.
    """

    def _set_up(self) -> None:
        super()._set_up()
        breaker, outlier = self.config.breaker, self.config.outlier
        self._state_changes = StateChanges(str(self.query), () if breaker is None else breaker.listeners)
        self._outliers: OutlierDetector[Node] | None = None
        if outlier is not None:
            self._outliers = resilience.OutlierDetector(outlier, self._random)
        self._abandoned: deque[Lease] = deque()
        self._closing_abandoned = False
        """The control loop has been asked to close them."""

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self.ejections = 0
        """How often a breaker has taken an endpoint out, failed probes included, or outlier detection."""
        self._sweeping = False
        """The timer of outlier detection runs."""
        self._log = ChangeLog(logger, self.clock)

    def _make_node(self, endpoint: Endpoint, cap: EjectionCap) -> Node:
        options = self.config.breaker
        breaker = None if options is None else CircuitBreaker(options, self._random)
        state = None if self.config.health_check is None else health.HealthState(self.config.health_check)
        kind = Node if self.limiter is None else LimitedNode
        return kind(endpoint, self, clock=self.clock, latency=PeakEwma(), breaker=breaker, cap=cap, health=state)

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        super().update(endpoints)
        self._sweep_later()

    # -- what nodes report (NodeOwner) -------------------------------------------------------------------------

    def node_opened(self, node: Node, duration: float) -> None:
        self._soon(self._opened, node, duration)

    def _opened(self, node: Node, duration: float) -> None:
        breaker = node.breaker
        if breaker is None or self._closed:
            return
        with self._lock:
            self.ejections += 1
        address, reason = node.endpoint.address, breaker.reason
        self._log.write(logging.WARNING, self.query, "%s is out for %.1f s: %s", address, duration, reason)
        self._probe_later(node, breaker.retry_at, duration)
        self._state_changes.note(node)
        self._rebuild_soon()

    def node_closed(self, node: Node) -> None:
        self._soon(self._back, node)

    def _back(self, node: Node) -> None:
        if self._closed:
            return
        self._log.write(logging.INFO, self.query, "%s is back", node.endpoint.address)
        self._state_changes.note(node)
        self._rebuild_soon()

    def node_changed(self, node: Node) -> None:
        self._soon(self._judged_anew, node)

    def _judged_anew(self, node: Node) -> None:
        if self._closed:
            return
        words = why(node) or "is back"
        self._log.write(logging.WARNING, self.query, "%s: %s: %s", node.endpoint.address, node.judged.value, words)
        self._state_changes.note(node)
        self._rebuild_soon()

    def excuses(self, started: float, now: float) -> bool:
        return self.stalls is not None and self.stalls.excuses(started, now)

    def ejections_doubted(self) -> None:
        self._background.call_soon(self._probe_all)  # and nowhere else: nothing is timed without a control loop either

    def _probe_all(self) -> None:
        if self._closed:
            return
        message = "most of the endpoints in use fail, too: no more are taken out, and those that are, are probed"
        self._log.write(logging.WARNING, self.query, message)
        for node in self.nodes:
            if node.poll_breaker(now_at_once=True):
                self._state_changes.note(node)
        self._rebuild_soon()

    def lease_abandoned(self, lease: Lease) -> None:
        self._abandoned.append(lease)
        self._close_abandoned_soon()

    def _close_abandoned_soon(self) -> None:
        if not self._closing_abandoned:
            self._closing_abandoned = True  # whoever closes some takes it back first, and then looks for them
            if not self._background.call_soon(self._close_abandoned_by_turns):
                self._closing_abandoned = False

    def _close_abandoned_by_turns(self) -> None:
        self._close_abandoned(_TURN)
        if self._abandoned:
            self._close_abandoned_soon()

    def _close_abandoned(self, most: int | None = None) -> None:
        # Those that are there now at most: a program that drops them as fast as they are closed would keep this thread
        # here for ever.
        self._closing_abandoned = False
        count = len(self._abandoned)
        for _ in range(count if most is None else min(count, most)):
            try:
                lease = self._abandoned.popleft()
            except IndexError:  # rather than asked for first: another thread may be at it too
                return
            abandon(lease)

    # -- in time -----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Let time pass: move breakers on whose time is up, and rebuild the view. For tests and simulations with a
        clock of their own; with a control loop it happens by itself."""
        self._close_abandoned()
        for node in self.nodes:
            if node.poll_breaker():
                self._state_changes.note(node)
        self._rebuild()

    def _probe_later(self, node: Node, due: float, delay: float) -> None:
        self._background.call_later(delay, weakly(lambda endpoints, node: endpoints._probe(node, due), self, node))

    def _probe(self, node: Node, due: float) -> None:
        if node.poll_breaker():
            self._state_changes.note(node)
            self._rebuild_soon()
        elif node.is_open and node.breaker is not None and node.breaker.retry_at == due:
            # The timer was early, by its clock or by ours. Without another one the endpoint would be out for ever.
            self._probe_later(node, due, max(due - self.clock(), _SHORTEST_DELAY))

    def _sweep_later(self) -> None:
        if self._outliers is None or self.config.outlier is None:
            return
        with self._lock:
            if self._sweeping or self._closed or self._dormant:
                return
            self._sweeping = True
        self._background.call_later(self.config.outlier.interval, weakly(JudgedSet._sweep, self))

    def _sweep(self) -> None:
        with self._lock:
            self._sweeping = False
            if self._closed or self._outliers is None:
                return
            changed = self._outliers.sweep(self.clock(), self.nodes)
            self.ejections += sum(bool(node.outlier) for node in changed)
            self._sweep_later()
        for node in changed:
            self._judged_anew(node)

    # -- what active checks report (HealthOwner) ---------------------------------------------------------------

    def health_checked(self, node: Node, *, affected: bool) -> None:
        """Note a result that the node's health has taken in. ``affected``: the endpoint is out now, or is back."""
        health, options = node.health, self.config.health_check
        if self._closed or health is None or options is None:
            return
        if affected:
            level, news = (logging.WARNING, "out") if health.failed else (logging.INFO, "in")
            said = health.describe(self.clock())
            self._log.write(level, self.query, "%s is %s: %s", node.endpoint.address, news, said)
        # The breaker itself closes by real calls alone: a check may be too shallow to see what calls see.
        probed = options.probe_on_success and health.passes and node.is_open and node.poll_breaker(now_at_once=True)
        if (affected or probed) and not self._stale:
            self._stale = True
            delay = len(self.nodes) * _CHECKS_PAUSE
            if self._background.call_later(delay, weakly(JudgedSet._rebuild, self)) is None:
                self._rebuild()  # no control loop

    # -- by hand -----------------------------------------------------------------------------------------------

    def open_breaker(self, address: str, reason: str = "") -> None:
        """Take an endpoint (``host:port``) out of rotation until ``close_breaker`` or ``reset_breaker``, even in panic
        and whatever ``max_ejection_percent`` says. Calls that are under way there go on. ``reason``: for the snapshot.

        Raises ConfigError if the service has no such endpoint, or no breakers; so do the three below.
        """
        self._set_breaker(address, BreakerState.FORCED_OPEN, reason)

    def close_breaker(self, address: str) -> None:
        """Let all calls to an endpoint through again, at once. Its breaker goes on judging, from nothing."""
        self._set_breaker(address, BreakerState.CLOSED)

    def disable_breaker(self, address: str, reason: str = "") -> None:
        """Let all calls to an endpoint through, whatever becomes of them, until one of the other three is called."""
        self._set_breaker(address, BreakerState.DISABLED, reason)

    def reset_breaker(self, address: str) -> None:
        """``close_breaker``, and forget all that was held against the endpoint: how often it has opened lately, and
        whether it was ejected as an outlier."""
        self._set_breaker(address, BreakerState.CLOSED, afresh=True)

    def _set_breaker(self, address: str, state: BreakerState, reason: str = "", *, afresh: bool = False) -> None:
        if self.config.breaker is None:
            raise ConfigError(f"service '{self.query}': its ServiceConfig.breaker is None: there is no breaker to set")
        nodes = [node for node in self.nodes if node.endpoint.address == address]
        if not nodes:
            known = ", ".join(sorted(node.endpoint.address for node in self.nodes)) or "none"
            raise ConfigError(f"service '{self.query}': it has no endpoint {address!r}; its endpoints: {known}")
        for node in nodes:
            node.set_breaker(state, reason, afresh=afresh)

    # -- surroundings ------------------------------------------------------------------------------------------

    def add_state_listener(self, listener: StateListener) -> None:
        """Call ``listener`` with a ``StateChange`` whenever an endpoint is taken out of rotation, probed, or put back.

        It is called on the control loop's thread, off every call's path, and must not block; what it raises is logged.
        """
        self._state_changes.add(listener)

    def remove_state_listener(self, listener: StateListener) -> None:
        """Undo ``add_state_listener``; an unknown listener is ignored."""
        self._state_changes.remove(listener)

    def close(self) -> None:
        super().close()
        self._close_abandoned()

    def after_fork_in_child(self) -> None:
        self._abandoned.clear()
        self._closing_abandoned = False
        self._state_changes.after_fork_in_child()
        super().after_fork_in_child()

    def _resume(self) -> None:
        super()._resume()
        self._sweep_later()
