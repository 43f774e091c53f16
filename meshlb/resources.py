"""One resource an endpoint: a connection pool or a sub-channel, made lazily, closed when it is no longer wanted."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from meshlb import control
from meshlb.errors import MeshClosed

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Node

logger = logging.getLogger("meshlb.resources")

T = TypeVar("T")

_SWEEPS_PER_TIMEOUT: Final = 2.0
"""How often idle resources are looked for: an idle one lives at most one and a half times the timeout."""

_SHORTEST_PAUSE: Final = 0.05
"""Seconds between two looks at least, however short the timeout: looking is not for nothing."""


class EndpointResources(Generic[T]):
    """The resources that one adapter holds for the endpoints of one cluster.

    ``make(node)`` builds one, at the first call to that endpoint; ``close(resource)`` ends it, on the control loop's
    thread or on the thread that closes the adapter, and must not block for long. A resource is closed when its
    endpoint has left the set and has drained, when the endpoint has had no call for ``config.idle_timeout`` seconds,
    and by ``close``. In the child of a fork the parent's resources are dropped without being closed: their sockets
    belong to the parent's calls too.

    Begin a lease before ``get``: an endpoint with an attempt in flight is never swept. Who keeps a resource instead of
    asking each time gives ``withhold``, which is called with True before it is looked whether a call uses a resource,
    and with False if one does: who begins a lease and finds it withheld asks again.
    """

    def __init__(
        self,
        cluster: Cluster,
        make: Callable[[Node], T],
        close: Callable[[T], object],
        *,
        withhold: Callable[[T, bool], object] | None = None,
        keep_after_fork: bool = False,
    ) -> None:
        self._cluster = cluster
        self._make = make
        self._close = close
        self._withhold = withhold
        self._keep_after_fork = keep_after_fork
        self._inherited: list[dict[Node, T]] = []
        self._live: dict[Node, T] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._sweeping = False
        cluster.add_listener(self)
        if cluster.stalls is not None:
            cluster.stalls.watch_running_loop()  # on which these resources are used, if it is an async adapter's
        control.on_fork(self)

    def get(self, node: Node) -> T:
        """The endpoint's resource.

        Raises whatever ``make`` raises, RuntimeError after ``close``, and MeshClosed (which is one) after the mesh's.
        """
        resource = self._live.get(node)
        return self._build(node) if resource is None else resource

    def _build(self, node: Node) -> T:
        with self._lock:
            resource = self._live.get(node)
            if resource is not None:
                return resource
            if self._closed:
                raise RuntimeError("the transport or channel has been closed")
            if self._cluster.closed:  # or it would outlive the mesh that should close it
                raise MeshClosed(f"service '{self._cluster.query}': the mesh has been closed")
            resource = self._live[node] = self._make(node)
            if not self._sweeping:
                self._sweeping = True
                self._schedule_sweep()
            return resource

    def __len__(self) -> int:
        return len(self._live)

    def endpoint_removed(self, node: Node) -> None:
        """Close what is held for an endpoint that is gone (ClusterListener)."""
        with self._lock:
            resource = self._live.pop(node, None)
        if resource is not None:
            self._end(resource)

    def endpoint_unused(self, node: Node) -> None:
        """Close what is held for an endpoint that is not used any more, unless a call has just begun there
        (ClusterListener)."""
        with self._lock:
            resource = self._take_idle(node)
        if resource is not None:
            self._end(resource)

    def _take_idle(self, node: Node) -> T | None:
        resource = self._live.pop(node, None)
        if resource is None:
            return None
        if self._withhold is not None:
            self._withhold(resource, True)
        # A call that began before the pop may hold the resource already; one that begins after it makes a new one. So
        # only now does "nothing in flight" mean that nobody has it.
        if node.in_flight:
            if self._withhold is not None:
                self._withhold(resource, False)
            self._live[node] = resource
            return None
        return resource

    def close_idle(self) -> None:
        """Close what no call uses now; the next call makes it again."""
        with self._lock:
            idle = [resource for node in tuple(self._live) if (resource := self._take_idle(node)) is not None]
        for resource in idle:
            self._end(resource)

    def close(self) -> None:
        """Close everything. Idempotent."""
        with self._lock:
            self._closed = True
            resources, self._live = tuple(self._live.values()), {}
        self._cluster.remove_listener(self)
        for resource in resources:
            self._end(resource)

    def _end(self, resource: T) -> None:
        try:
            self._close(resource)
        except Exception:
            logger.exception("%s: closing a connection failed", self._cluster.service)

    def _schedule_sweep(self) -> None:
        pause = max(self._cluster.config.idle_timeout / _SWEEPS_PER_TIMEOUT, _SHORTEST_PAUSE)
        # The timer must not keep an adapter alive that its user has dropped.
        self._cluster.call_later(pause, control.weakly(EndpointResources._sweep, self))

    def _sweep(self) -> None:
        oldest = self._cluster.clock() - self._cluster.config.idle_timeout
        with self._lock:
            if self._closed:
                return
            unused = [node for node in self._live if node.in_flight == 0 and node.last_picked < oldest]
            idle = [resource for node in unused if (resource := self._take_idle(node)) is not None]
            self._sweeping = bool(self._live)
        for resource in idle:
            self._end(resource)
        if self._sweeping:
            self._schedule_sweep()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._sweeping = False
        inherited, self._live = self._live, {}
        if self._keep_after_fork:
            self._inherited.append(inherited)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # unclosed on purpose: see the class
            inherited.clear()
