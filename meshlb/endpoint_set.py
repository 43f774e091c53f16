"""The control plane's half of a cluster: who is in the set, and the view that picks read."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final, Protocol

from meshlb import health, resilience  # what is off is not imported
from meshlb.balancing import Policy, PolicyEnvironment
from meshlb.balancing.ewma import PeakEwma
from meshlb.change_log import ChangeLog
from meshlb.control import weakly
from meshlb.discovery.base import ServiceQuery
from meshlb.limited_node import LimitedNode
from meshlb.membership import Departure, Membership
from meshlb.model import Endpoint
from meshlb.node import Lease, Node, abandon
from meshlb.resilience import CircuitBreaker, EjectionCap, StateListener
from meshlb.shares import Shares
from meshlb.state_changes import StateChanges, why
from meshlb.stickiness import Stickiness
from meshlb.view import EMPTY_VIEW, View, build_view
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.health.monitor import HealthMonitor
    from meshlb.place import Place
    from meshlb.resilience import ConcurrencyLimiter, OutlierDetector, StallMonitor
    from meshlb.tiering import Tiering

logger = logging.getLogger("meshlb.cluster")

_SHORTEST_DELAY: Final = 0.01
"""Seconds to the second look at a breaker whose timer came early."""


_CHECKS_PAUSE: Final = 50e-6
"""Seconds, for each endpoint, from a health check that changes the view to its rebuild, which takes 2 to 5 us of them.
In an outage the checks of thousands of endpoints fail one by one; this way they take a tenth of the loop's time."""


class Background(Protocol):
    """What a cluster needs of the control loop. Both are safe from any thread."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Call off the call path; False if there is no control loop (any more). Takes no lock."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> object:
        """Call off the call path after ``delay`` seconds; never, if there is no control loop."""
        ...


class ClusterListener(Protocol):
    """Something that holds resources for endpoints (an adapter's connections)."""

    def endpoint_removed(self, node: Node) -> None:
        """The endpoint is out of the set, and has no attempt any more, or none that may go on."""
        ...

    def endpoint_unused(self, node: Node) -> None:
        """The endpoint is out of this process's subset and has lost its last attempt; it may be used again later."""
        ...


class EndpointSet:
    """The endpoints of one service and their live state, kept up to date off the call path.

    What discovery, breakers and timers report ends up in a new ``view``, built under a lock that no pick takes and
    swapped in as a whole.
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
        self.query = query
        self.stalls = stalls
        """Knows when this process stood still; None: it never did (a simulation)."""
        self.limiter: ConcurrencyLimiter | None = None
        """What bounds the attempts under way; None: nothing does."""
        self.config = config
        self.clock = clock
        policy: Policy = config.policy  # type: ignore[assignment]  # a name was resolved by ServiceConfig
        self.policy = policy
        self._random = random
        self._environment = PolicyEnvironment(query.service, clock, random)
        self._background = background
        self._on_resume = on_resume
        self._listeners: weakref.WeakSet[ClusterListener] = weakref.WeakSet()
        tiered = config.failover  # another tier can take over, so its own limit counts
        percent = config.max_ejection_percent if tiered is None else tiered.max_ejection_percent
        self._members = Membership(self._make_node, percent, config.panic_threshold)
        self._shares: Shares | None = None
        if config.slow_start is not None or config.subset is not None:
            self._shares = Shares(config, random)
        self._state_changes = StateChanges(str(query), () if config.breaker is None else config.breaker.listeners)
        self._outliers: OutlierDetector[Node] | None = None
        if config.outlier is not None:
            self._outliers = resilience.OutlierDetector(config.outlier, random)
        self.tiering: Tiering | None = None
        """What moves the tiers and zones of a service that has them."""
        if config.failover is not None or config.zones is not None:
            from meshlb.tiering import Tiering  # with all its arithmetic, which few services need

            rebuild = weakly(EndpointSet._rebuild, self)
            self.tiering = Tiering(config, query.service, clock=clock, later=background.call_later, rebuild=rebuild)
        self.stickiness = None if config.sticky is None else Stickiness(config.sticky)
        """Where the calls of sticky sessions go; None for a service without."""
        self._abandoned: deque[Lease] = deque()
        self.view: View = EMPTY_VIEW
        """The endpoints that are eligible now. Replaced as a whole; to be read once for a decision."""
        self._version = 0
        self._answered_at: float | None = None
        self._last_error: Exception | None = None
        self._settled = False
        """Waiting for the registry is of no use: it has answered, or its watch has ended without an answer."""
        self._closed = False
        self._dormant = False
        """In the child of a fork, before the first use there."""
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.ejections = 0
        """How often a breaker has taken an endpoint out, failed probes included, or outlier detection."""
        self._sweeping = False
        """The timer of outlier detection runs."""
        if self.config.limits is not None:
            self.limiter = resilience.ConcurrencyLimiter(self.config.limits)
        self._lock = threading.RLock()
        self._changed = Signal()
        self._stale = False
        """A rebuild of the view is under way already, and will see what has changed until then."""
        self._rescaling = False
        """A timer runs that builds the view anew because of slow start."""
        self._log = ChangeLog(logger, self.clock)
        self.monitor: HealthMonitor | None = None
        """Makes the active checks, on the control loop."""

    def _make_node(self, endpoint: Endpoint, cap: EjectionCap) -> Node:
        options = self.config.breaker
        breaker = None if options is None else CircuitBreaker(options, self._random)
        state = None if self.config.health_check is None else health.HealthState(self.config.health_check)
        kind = Node if self.limiter is None else LimitedNode
        return kind(endpoint, self, clock=self.clock, latency=PeakEwma(), breaker=breaker, cap=cap, health=state)

    @property
    def random(self) -> Random:
        """The source of all that is left to chance for this service."""
        return self._random

    @property
    def service(self) -> str:
        """The service's name in the registry."""
        return self.query.service

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every endpoint's live state, eligible or not, without those that are draining."""
        return tuple(self._members.nodes.values())

    @property
    def age(self) -> float | None:
        """Seconds since the registry last answered; None before its first answer."""
        return None if self._answered_at is None else max(0.0, self.clock() - self._answered_at)

    @property
    def subset(self) -> dict[str, Any] | None:
        """Which part of the service this process uses, as plain data; None if all of it."""
        return None if self._shares is None else self._shares.describe_subset()

    @property
    def closed(self) -> bool:
        return self._closed

    # -- the sink of discovery ---------------------------------------------------------------------------------

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        """Take over the registry's current set. State is kept by identity. Safe from any thread."""
        with self._lock:
            if self._closed:
                return
            first = self._answered_at is None
            changed, gone = self._members.reconcile(endpoints)
            if changed or first:
                self._swap_view()
            self._answered_at = self.clock()
            self._last_error = None
            self._settled = not self._awaits_checks()
            if self.monitor is not None:
                self._background.call_soon(self.monitor.endpoints_changed)
            if changed or first:
                self._announce()
            for node in gone:
                self._retire(node)
            self._sweep_later()

    def peers_changed(self, peers: Sequence[Endpoint]) -> None:
        """Take over the instances of this process's own service, by which it finds its place in the subsets."""
        with self._lock:
            if self._shares is not None and self._shares.peers_changed(peers):
                self._rebuild_soon()
            if self.tiering is not None and self.tiering.peers_changed(peers):
                self._rebuild_soon()

    def place_changed(self, place: Place) -> None:
        """Take over where this process is, by which tiers and zones are near or far."""
        if self.tiering is not None:
            self.tiering.place_changed(place)

    def failed(self, error: Exception) -> None:
        """Note that the registry could not be asked; what is known stays in use."""
        with self._lock:
            self._last_error = error

    def watch_ended(self) -> None:
        """Note that the watch is over, since nothing can ever change: there is nothing to wait for any more."""
        with self._lock:
            self._settled = True
            self._announce()

    def _retire(self, node: Node) -> None:
        departure, drained = self._members.leave(node)
        if drained or self.config.drain_timeout == 0:
            self._soon(self._dismiss, departure)
        else:
            self._background.call_later(self.config.drain_timeout, weakly(EndpointSet._dismiss, self, departure))

    def _dismiss(self, departure: Departure) -> None:
        with self._lock:
            if not self._members.dismiss(departure):
                return
        self._tell_removed(departure.node)

    def _dismiss_drained(self, node: Node) -> None:
        with self._lock:
            departure = self._members.departure_of(node)
        if departure is not None and node.in_flight == 0:
            self._dismiss(departure)
        elif departure is None:
            self._tell_unused(node)

    def _tell_removed(self, node: Node) -> None:
        self._tell(node, lambda listener: listener.endpoint_removed(node))

    def _tell_unused(self, node: Node) -> None:
        if node.out_of_subset:  # and not in it again since
            self._tell(node, lambda listener: listener.endpoint_unused(node))

    def _tell(self, node: Node, tell: Callable[[ClusterListener], object]) -> None:
        with self._lock:  # a WeakSet must not grow while it is read
            listeners = tuple(self._listeners)
        for listener in listeners:
            try:
                tell(listener)
            except Exception:
                logger.exception("%s: %r could not let go of %s", self.query, listener, node.endpoint.address)

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

    def node_drained(self, node: Node) -> None:
        self._soon(self._dismiss_drained, node)

    def lease_abandoned(self, lease: Lease) -> None:
        self._abandoned.append(lease)
        self._background.call_soon(self._close_abandoned)

    def _close_abandoned(self) -> None:
        while True:
            try:
                lease = self._abandoned.popleft()
            except IndexError:  # rather than asked for first: another thread may be at it too
                return
            abandon(lease)

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
        if self._outliers is not None and self.config.outlier is not None and not self._sweeping:
            self._sweeping = True
            self._background.call_later(self.config.outlier.interval, weakly(EndpointSet._sweep, self))

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

    def _soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Off the call path; or here and now, where no control loop is (a simulation, the child of a fork)."""
        if not self._background.call_soon(callback, *args):
            callback(*args)

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
            if self._background.call_later(delay, weakly(EndpointSet._rebuild, self)) is None:
                self._rebuild()  # no control loop

    def _awaits_checks(self) -> bool:
        return any(node.is_unchecked for node in self.nodes)

    # -- the view ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Let time pass: move breakers on whose time is up, and rebuild the view. For tests and simulations with a
        clock of their own; with a control loop it happens by itself."""
        self._close_abandoned()
        for node in self.nodes:
            if node.poll_breaker():
                self._state_changes.note(node)
        self._rebuild()

    def _rebuild_soon(self) -> None:
        # A view is built in O(n), and an outage of n endpoints opens n breakers: once for all of them, not n times.
        if not self._stale:
            self._stale = True
            self._soon(self._rebuild)

    def _rebuild(self) -> None:
        with self._lock:
            self._stale = False
            if not self._closed:
                if not self._settled and self._answered_at is not None:
                    self._settled = not self._awaits_checks()
                self._swap_view()
                self._announce()

    def _swap_view(self) -> None:
        if self._dormant:
            return
        self._version += 1
        view = build_view(
            self.nodes,
            self.policy,
            self._environment,
            panic_threshold=self.config.panic_threshold,
            previous=self.view,
            version=self._version,
            shares=self._shares,
            topology=None if self.tiering is None else self.tiering.topology,
        )
        if self.stickiness is not None:
            view.hosts = self.stickiness.hosts(self.nodes, view.nodes)
        self.view = view
        if self.tiering is not None and view.layout is not None:
            self.tiering.built(view.layout)
        if self._shares is not None:
            self._follow_up(self._shares)

    def _follow_up(self, shares: Shares) -> None:
        for node in shares.take_left():
            self._soon(self._tell_unused, node)
        if not self._rescaling and (delay := shares.next_change(self.clock())) is not None:
            self._rescaling = True
            self._background.call_later(delay, weakly(EndpointSet._rescale, self))

    def _rescale(self) -> None:
        with self._lock:
            self._rescaling = False
            if not self._closed:
                self._swap_view()

    def _announce(self) -> None:
        changed, self._changed = self._changed, Signal()
        changed.set()
        if self.limiter is not None:
            self.limiter.nudge()

    # -- surroundings ------------------------------------------------------------------------------------------

    def call_later(self, delay: float, callback: Callable[[], object]) -> object:
        """Call on the control loop after ``delay`` seconds; never, if there is none."""
        return self._background.call_later(delay, callback)

    def add_listener(self, listener: ClusterListener) -> None:
        """Have ``listener`` told of every endpoint that has left the set for good, for as long as it lives."""
        with self._lock:
            self._listeners.add(listener)

    def remove_listener(self, listener: ClusterListener) -> None:
        """Undo ``add_listener``; unknown listeners are ignored."""
        with self._lock:
            self._listeners.discard(listener)

    def add_state_listener(self, listener: StateListener) -> None:
        """Call ``listener`` with a ``StateChange`` whenever an endpoint is taken out of rotation, probed, or put back.

        It is called on the control loop's thread, off every call's path, and must not block; what it raises is logged.
        """
        self._state_changes.add(listener)

    def remove_state_listener(self, listener: StateListener) -> None:
        """Undo ``add_state_listener``; an unknown listener is ignored."""
        self._state_changes.remove(listener)

    # -- the end, and the child of a fork ----------------------------------------------------------------------

    def close(self) -> None:
        """End it: waiting callers get MeshClosed, and so does every later call."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            gone = self._members.clear()
            self.view = EMPTY_VIEW
            self._announce()
        if self.limiter is not None:
            self.limiter.wake_all()
        self._close_abandoned()
        for node in gone:
            self._tell_removed(node)

    def after_fork_in_child(self) -> None:
        """Start over in the child of a fork: the parent's attempts, locks and timers do not exist here.

        What was learnt of the endpoints is kept, but nothing is picked before ``on_resume`` has brought the control
        loop back, which the first use in the child does: a child that never calls starts no thread.
        """
        self._start_afresh()
        self._abandoned.clear()
        self._state_changes.after_fork_in_child()
        former = self._members.nodes
        self._members.after_fork_in_child()
        if self._shares is not None:
            heirs = {node: self._members.nodes[identity] for identity, node in former.items()}
            self._shares.after_fork_in_child(self._random, heirs)
        if self.tiering is not None:
            self.tiering.after_fork_in_child()
        self.view = EMPTY_VIEW
        self._dormant = not self._closed

    def _resume(self) -> None:
        if self._on_resume is not None:
            self._on_resume()  # before our lock: it takes the mesh's own
        with self._lock:
            if not self._dormant or self._closed:
                return
            self._dormant = False
            for node in self.nodes:
                node.poll_breaker(now_at_once=True)  # its timer stayed in the parent
            self._swap_view()
            self._announce()
            self._sweep_later()
