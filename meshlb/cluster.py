"""One service: its endpoints, the view that picks read, and the leases on them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final, Protocol

from meshlb.balancing import Picker, Policy, PolicyEnvironment
from meshlb.balancing.ewma import PeakEwma
from meshlb.discovery.base import ServiceQuery
from meshlb.errors import CircuitOpen, DiscoveryError, DiscoveryTimeout, MeshClosed, MeshError, NoEndpoints
from meshlb.model import NO_CONTEXT, CallContext, Endpoint, HashKey, Identity
from meshlb.node import Lease, Node, abandon
from meshlb.resilience import EjectionCap, TokenBudget
from meshlb.scope import LeaseScope
from meshlb.topology import judge
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig

logger = logging.getLogger("meshlb.cluster")


class Background(Protocol):
    """What a cluster needs of the control loop. Both are safe from any thread."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Call off the call path; False if there is no control loop (any more)."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> object:
        """Call off the call path after ``delay`` seconds."""
        ...


class ClusterListener(Protocol):
    """Something that holds resources for endpoints (an adapter's connections)."""

    def endpoint_removed(self, node: Node) -> None:
        """The endpoint is out of the set, and has no attempt any more, or none that may go on."""
        ...


class View:
    """What a pick reads: immutable, swapped as a whole."""

    __slots__ = ("nodes", "panic", "picker", "version")

    def __init__(self, nodes: tuple[Node, ...], picker: Picker[Node], *, panic: bool, version: int) -> None:
        self.nodes = nodes
        self.picker = picker
        self.panic = panic
        self.version = version


class _NoPicker:
    """The picker of a view without endpoints."""

    __slots__ = ()

    def pick(self, call: CallContext) -> None:
        return None


_EMPTY: Final = View((), _NoPicker(), panic=False, version=0)


class Cluster:
    """The instances of one service and their live state. Made by ``Mesh.cluster``; safe from any thread and loop.

    Calls read ``view`` and touch only the node they got. ``update`` and ``failed`` (the Sink of discovery), breaker
    changes and timers build a new view off the call path, under a lock that no pick takes.
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
    ) -> None:
        self.query = query
        self.config = config
        self.clock = clock
        policy: Policy = config.policy  # type: ignore[assignment]  # a name was resolved by ServiceConfig
        self.policy = policy
        retry = config.retry
        self.budget = TokenBudget(retry.budget, clock) if retry is not None and retry.budget is not None else None
        self._random = random
        self._environment = PolicyEnvironment(query.service, clock, random)
        self._background = background
        self._on_resume = on_resume
        self._listeners: list[ClusterListener] = []
        self._nodes: dict[Identity, Node] = {}
        self._draining: dict[Identity, Node] = {}
        self._abandoned: deque[Lease] = deque()
        self._view = _EMPTY
        self._version = 0
        self._answered_at: float | None = None
        self._last_error: Exception | None = None
        self._closed = False
        self._dormant = False
        self.retries = 0
        """Attempts beyond the first of their call."""
        self._make_locks()

    def _make_locks(self) -> None:
        self._lock = threading.RLock()
        self._changed = Signal()
        self._cap = EjectionCap(self.config.max_ejection_percent)

    # -- calls -------------------------------------------------------------------------------------------------

    @property
    def service(self) -> str:
        """The service's name in the registry."""
        return self.query.service

    @property
    def view(self) -> View:
        """The endpoints that are eligible now."""
        return self._view

    def try_start(self, context: CallContext = NO_CONTEXT) -> Lease | None:
        """Begin a call's first attempt without waiting; None if no endpoint can be had at once."""
        node = self._view.picker.pick(context)
        lease = node.begin() if node is not None else None
        if lease is None:
            if self._dormant:
                self._resume()
            lease = self.try_again(context)
        if lease is not None and self.budget is not None:
            self.budget.deposit()
        return lease

    def try_again(self, context: CallContext) -> Lease | None:
        """Begin a further attempt, outside ``context.excluded`` and past blocked endpoints; None if there is none."""
        view = self._view
        refused: set[object] = set()
        excluded = context.excluded
        if excluded:
            refused.update(node for node in view.nodes if node in excluded)
        narrowed = CallContext(context.key, context.method, refused)
        for _ in range(len(view.nodes)):
            node = view.picker.pick(narrowed)
            if node is None:
                return None
            if (lease := node.begin(force=view.panic)) is not None:
                return lease
            refused.add(node)
        return None

    def count_retry(self) -> None:
        """Note an attempt beyond the first of its call."""
        with self._lock:
            self.retries += 1

    def start(self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False) -> Lease:
        """Begin a call's first attempt, blocking this thread for the registry's first answer if need be.

        ``timeout``: seconds left of the call's own deadline. ``patient`` (gRPC's wait_for_ready): wait until an
        endpoint can be had, not only for the first answer.

        Raises NoEndpoints or CircuitOpen if there is nobody to call, DiscoveryTimeout if the registry's first answer
        takes longer than ``config.discovery_timeout`` or ``timeout``, MeshClosed after close.
        """
        lease = self.try_start(context)
        if lease is not None:
            return lease
        deadline = self._patience(timeout, patient=patient)
        while True:
            changed = self._changed
            lease = self.try_start(context)
            if lease is not None:
                return lease
            remaining = self._remaining(deadline, patient=patient)
            changed.wait(remaining)

    async def start_async(
        self, context: CallContext = NO_CONTEXT, *, timeout: float | None = None, patient: bool = False
    ) -> Lease:
        """``start`` for a task of an asyncio or trio loop."""
        lease = self.try_start(context)
        if lease is not None:
            return lease
        deadline = self._patience(timeout, patient=patient)
        while True:
            changed = self._changed
            lease = self.try_start(context)
            if lease is not None:
                return lease
            remaining = self._remaining(deadline, patient=patient)
            await changed.wait_async(remaining)

    def lease(self, key: HashKey | None = None, *, timeout: float | None = None) -> LeaseScope:
        """A context manager, sync and async, that picks an endpoint for one attempt of any protocol.

        The block's exception, or its absence, is the outcome; its duration is the latency, unless
        ``lease.answered()`` says when the answer came. A ``lease.close(outcome)`` within the block wins. ``key`` is
        what a hash policy hashes. Entering raises what ``start`` raises.
        """
        return LeaseScope(self, CallContext(key) if key is not None else NO_CONTEXT, timeout)

    def _patience(self, timeout: float | None, *, patient: bool) -> float | None:
        limit = None if patient else self.config.discovery_timeout
        if timeout is not None:
            limit = timeout if limit is None else min(limit, timeout)
        return None if limit is None else self.clock() + limit

    def _remaining(self, deadline: float | None, *, patient: bool) -> float | None:
        if self._closed or (self._answered_at is not None and not patient):
            raise self.unavailable()
        if deadline is None:
            return None
        remaining = deadline - self.clock()
        if remaining <= 0:
            raise self.unavailable()
        return remaining

    def unavailable(self) -> MeshError:
        """The error that says why no endpoint can be had now, and what to do."""
        name = f"service '{self.query}'"
        if self._closed:
            return MeshClosed(f"{name}: the mesh is closed; make the call before Mesh.close(), or make a new Mesh")
        if self._answered_at is None:
            if self._last_error is not None:
                return DiscoveryError(f"{name}: no instances are known: {self._last_error}")
            return DiscoveryTimeout(
                f"{name}: the registry has not answered within {self.config.discovery_timeout:g} s; is it reachable? "
                "(ServiceConfig.discovery_timeout sets how long a first call waits)"
            )
        nodes = tuple(self._nodes.values())
        if not nodes:
            return NoEndpoints(
                f"{name}: the registry knows no instance of it; check the name, and whether an instance is registered"
            )
        counts: dict[str, int] = {}
        for node in nodes:
            counts[node.standing] = counts.get(node.standing, 0) + 1
        states = ", ".join(f"{count} {standing}" for standing, count in sorted(counts.items()))
        kind = CircuitOpen if any(node.ejected for node in nodes) else NoEndpoints
        return kind(f"{name}: none of its {len(nodes)} endpoints can be called ({states}); see Cluster.snapshot()")

    # -- readiness ---------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until an endpoint can be called, for at most ``timeout`` seconds (None: no limit).

        Raises what a call would get if the time runs out: DiscoveryTimeout, DiscoveryError, NoEndpoints, CircuitOpen;
        MeshClosed after close.
        """
        deadline = None if timeout is None else self.clock() + timeout
        while not self._ready():
            changed = self._changed
            if self._ready():
                return
            changed.wait(self._remaining(deadline, patient=True))

    async def wait_ready_async(self, timeout: float | None = None) -> None:
        """``wait_ready`` for a task of an asyncio or trio loop."""
        deadline = None if timeout is None else self.clock() + timeout
        while not self._ready():
            changed = self._changed
            if self._ready():
                return
            await changed.wait_async(self._remaining(deadline, patient=True))

    def _ready(self) -> bool:
        if self._dormant:
            self._resume()
        return bool(self._view.nodes) and not self._closed

    # -- the sink of discovery ---------------------------------------------------------------------------------

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        """Take over the registry's current set. State is kept by identity. Safe from any thread."""
        with self._lock:
            if self._closed:
                return
            first = self._answered_at is None
            self._answered_at = self.clock()
            self._last_error = None
            if self._reconcile(endpoints) or first:
                self._rebuild()

    def failed(self, error: Exception) -> None:
        """Note that the registry could not be asked; what is known stays in use."""
        with self._lock:
            self._last_error = error
            if self._answered_at is None:
                self._announce()

    def _reconcile(self, endpoints: Sequence[Endpoint]) -> bool:
        changed = False
        nodes: dict[Identity, Node] = {}
        for endpoint in endpoints:
            identity = endpoint.identity
            node = self._nodes.get(identity)
            if node is None:
                node = self._draining.pop(identity, None) or self._make_node(endpoint)
                changed = True
            if node.endpoint != endpoint or node.retired:
                recovered = not _is_up(node.endpoint) and _is_up(endpoint)
                node.restore(endpoint)
                if recovered:
                    node.poll_breaker(now_at_once=True)
                changed = True
            nodes[identity] = node
        gone = [node for identity, node in self._nodes.items() if identity not in nodes]
        self._nodes = nodes
        self._cap.resize(len(nodes))
        for node in gone:
            changed = True
            self._retire(node)
        return changed

    def _make_node(self, endpoint: Endpoint) -> Node:
        decay = getattr(self.policy, "decay", None)
        peak = getattr(self.policy, "peak", True)
        latency = PeakEwma(peak=peak) if decay is None else PeakEwma(decay, peak=peak)
        return Node(
            endpoint, self, clock=self.clock, random=self._random, latency=latency, breaker=self.config.breaker
        )

    def _retire(self, node: Node) -> None:
        if node.release_ejection():
            self._cap.give_back()
        self._draining[node.endpoint.identity] = node
        if node.retire() or self.config.drain_timeout == 0:
            self._background.call_soon(self._dismiss, node)
        else:
            self._background.call_later(self.config.drain_timeout, lambda: self._dismiss(node))

    def _dismiss(self, node: Node) -> None:
        with self._lock:
            if not node.retired or self._draining.pop(node.endpoint.identity, None) is None:
                return
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener.endpoint_removed(node)

    # -- what nodes report (NodeOwner) -------------------------------------------------------------------------

    def may_eject(self) -> bool:
        return self._cap.try_take()

    def node_opened(self, node: Node, duration: float) -> None:
        reason = node.breaker.reason if node.breaker is not None else ""
        logger.warning("%s: %s is out for %.1f s: %s", self.query, node.endpoint.address, duration, reason)
        self._background.call_soon(self._rebuild)
        self._background.call_later(duration, lambda: self._probe(node))

    def node_closed(self, node: Node) -> None:
        logger.info("%s: %s is back", self.query, node.endpoint.address)
        if node.release_ejection():
            self._cap.give_back()
        self._background.call_soon(self._rebuild)

    def node_drained(self, node: Node) -> None:
        self._background.call_soon(self._dismiss, node)

    def lease_abandoned(self, lease: Lease) -> None:
        self._abandoned.append(lease)
        self._background.call_soon(self._close_abandoned)

    def _close_abandoned(self) -> None:
        while self._abandoned:
            abandon(self._abandoned.popleft())

    def _probe(self, node: Node) -> None:
        if node.poll_breaker():
            self._rebuild()

    # -- the view ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Let time pass: move breakers on whose time is up, and rebuild the view. For tests and simulations with a
        clock of their own; with a control loop it happens by itself."""
        with self._lock:
            for node in self._nodes.values():
                node.poll_breaker()
            self._close_abandoned()
            self._rebuild()

    def _rebuild(self) -> None:
        with self._lock:
            if self._closed or self._dormant:
                return
            judged = judge(tuple(self._nodes.values()), self.config.panic_threshold)
            previous = self._view.picker if self._version else None
            if isinstance(previous, _NoPicker):
                previous = None
            self._version += 1
            picker: Picker[Node] = (
                self.policy.build(judged.eligible, self._environment, previous) if judged.eligible else _NoPicker()
            )
            self._view = View(judged.eligible, picker, panic=judged.panic, version=self._version)
            self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, Signal()
        changed.set()

    # -- surroundings ------------------------------------------------------------------------------------------

    def call_later(self, delay: float, callback: Callable[[], object]) -> object:
        """Call on the control loop after ``delay`` seconds; never, if there is none."""
        return self._background.call_later(delay, callback)

    def add_listener(self, listener: ClusterListener) -> None:
        """Have ``listener`` told of every endpoint that has left the set for good."""
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: ClusterListener) -> None:
        """Undo ``add_listener``; unknown listeners are ignored."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every endpoint's live state, eligible or not, without those that are draining."""
        return tuple(self._nodes.values())

    @property
    def age(self) -> float | None:
        """Seconds since the registry last answered; None before its first answer."""
        return None if self._answered_at is None else max(0.0, self.clock() - self._answered_at)

    def snapshot(self) -> dict[str, Any]:
        """The state of the service as plain data (JSON types), for people and for exporters."""
        from meshlb.snapshot import cluster_snapshot

        self._close_abandoned()
        with self._lock:
            return cluster_snapshot(self, (*self._nodes.values(), *self._draining.values()), self._last_error)

    def close(self) -> None:
        """End it: waiting callers get MeshClosed, and so does every later call."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            gone = (*self._nodes.values(), *self._draining.values())
            self._nodes, self._draining = {}, {}
            self._view = _EMPTY
            listeners = tuple(self._listeners)
            self._announce()
        for node in gone:
            for listener in listeners:
                listener.endpoint_removed(node)

    @property
    def closed(self) -> bool:
        return self._closed

    def after_fork_in_child(self) -> None:
        """Start over in the child of a fork: the parent's attempts, locks and timers do not exist here.

        What was learnt of the endpoints is kept, but nothing is picked before ``on_resume`` has brought the control
        loop back, which the first use in the child does: a child that never calls starts no thread.
        """
        self._make_locks()
        self._abandoned.clear()
        self._draining.clear()
        self._cap.resize(len(self._nodes))
        for node in self._nodes.values():
            node.reset()
            if node.ejected:
                self._cap.take()
        if self.budget is not None and self.config.retry is not None and self.config.retry.budget is not None:
            self.budget = TokenBudget(self.config.retry.budget, self.clock)
        self._view = _EMPTY
        self._dormant = not self._closed

    def _resume(self) -> None:
        with self._lock:
            if not self._dormant:
                return
            self._dormant = False
            if self._on_resume is not None:
                self._on_resume()
            for node in self._nodes.values():
                node.poll_breaker(now_at_once=True)
            self._rebuild()


def _is_up(endpoint: Endpoint) -> bool:
    return endpoint.status.value in ("passing", "warning")
