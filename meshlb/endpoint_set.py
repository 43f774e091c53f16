"""The control plane's half of a cluster: who is in the set, and the view that picks read."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from meshlb import resilience  # what is off is not imported
from meshlb.balancing import Policy, PolicyEnvironment
from meshlb.control import weakly
from meshlb.discovery.base import ServiceQuery
from meshlb.membership import Departure, Membership
from meshlb.model import Endpoint
from meshlb.node import Node
from meshlb.resilience import EjectionCap
from meshlb.shares import Shares
from meshlb.stickiness import Stickiness
from meshlb.view import EMPTY_VIEW, View, build_view
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.health.monitor import HealthMonitor
    from meshlb.place import Place
    from meshlb.resilience import ConcurrencyLimiter, StallMonitor
    from meshlb.tiering import Tiering

logger = logging.getLogger("meshlb.cluster")


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
        self.stalls = stalls
        """Knows when this process stood still; None: it never did (a simulation)."""
        self._listeners: weakref.WeakSet[ClusterListener] = weakref.WeakSet()
        tiered = config.failover  # another tier can take over, so its own limit counts
        percent = config.max_ejection_percent if tiered is None else tiered.max_ejection_percent
        self._members = Membership(self._make_node, percent, config.panic_threshold)
        self._shares: Shares | None = None
        if config.slow_start is not None or config.subset is not None:
            self._shares = Shares(config, random)
        self.tiering: Tiering | None = None
        """What moves the tiers and zones of a service that has them."""
        if config.failover is not None or config.zones is not None:
            from meshlb.tiering import Tiering  # with all its arithmetic, which few services need

            rebuild = weakly(EndpointSet._rebuild, self)
            self.tiering = Tiering(config, query.service, clock=clock, later=background.call_later, rebuild=rebuild)
        self.stickiness = None if config.sticky is None else Stickiness(config.sticky)
        """Where the calls of sticky sessions go; None for a service without."""
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
        self._set_up()
        self._start_afresh()

    def _set_up(self) -> None:
        """Make what this object has from its beginning, in the child of a fork too."""

    def _make_node(self, endpoint: Endpoint, cap: EjectionCap) -> Node:
        """The live state of an endpoint that is new in the set."""
        raise NotImplementedError

    def _start_afresh(self) -> None:
        """Make what a process has for itself."""
        if self.config.limits is not None:
            self.limiter = resilience.ConcurrencyLimiter(self.config.limits)
        self._lock = threading.RLock()
        self._changed = Signal()
        self._stale = False
        """A rebuild of the view is under way already, and will see what has changed until then."""
        self._rescaling = False
        """A timer runs that builds the view anew because of slow start."""
        self.monitor: HealthMonitor | None = None
        """Makes the active checks, on the control loop."""

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

    def node_drained(self, node: Node) -> None:
        self._soon(self._dismiss_drained, node)

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

    # -- the view ----------------------------------------------------------------------------------------------

    def _soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Off the call path; or here and now, where no control loop is (a simulation, the child of a fork)."""
        if not self._background.call_soon(callback, *args):
            callback(*args)

    def _awaits_checks(self) -> bool:
        return any(node.is_unchecked for node in self.nodes)

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
        for node in gone:
            self._tell_removed(node)

    def after_fork_in_child(self) -> None:
        """Start over in the child of a fork: the parent's attempts, locks and timers do not exist here.

        What was learnt of the endpoints is kept, but nothing is picked before ``on_resume`` has brought the control
        loop back, which the first use in the child does: a child that never calls starts no thread.
        """
        self._start_afresh()
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
