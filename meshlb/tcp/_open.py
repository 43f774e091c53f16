"""The open connections of a service: cut when their instance has left the registry, and its time to drain is over."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Protocol

from meshlb import control

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Lease, Node


class Connection(Protocol):
    """A connection that is open."""

    @property
    def lease(self) -> Lease | None: ...

    def cut(self) -> None:
        """End it both ways, from whatever thread: who reads from it gets the end of the stream."""
        ...


class OpenConnections:
    """Knows the open connections of one cluster, and keeps none of them alive."""

    def __init__(self) -> None:
        self._after_fork()
        control.on_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()

    def add(self, connection: Connection) -> None:
        """Remember a connection until it is closed or collected."""
        with self._lock:
            self._open.add(connection)

    def discard(self, connection: Connection) -> None:
        """Forget one that has been closed."""
        with self._lock:
            self._open.discard(connection)

    def endpoint_removed(self, node: Node) -> None:
        """Cut those to an endpoint that is gone (ClusterListener)."""
        with self._lock:
            connections = tuple(self._open)
        for connection in connections:
            lease = connection.lease
            if lease is not None and lease.node is node:
                connection.cut()

    def endpoint_unused(self, node: Node) -> None:
        """It has no connection any more (ClusterListener)."""

    def after_fork_in_child(self) -> None:
        """The connections are the parent's: to cut them here would cut them there."""
        self._after_fork()


_of_cluster: weakref.WeakKeyDictionary[Cluster, OpenConnections] = weakref.WeakKeyDictionary()


def opened(cluster: Cluster, connection: Connection) -> OpenConnections:
    """Remember a connection that has just been made; where to forget it again."""
    known = _of_cluster.get(cluster)
    if known is None:
        known = _of_cluster.setdefault(cluster, OpenConnections())  # one dict operation: no lock that a fork may find
        cluster.add_listener(known)
    known.add(connection)
    lease = connection.lease
    if cluster.closed or (lease is not None and lease.node.retired and cluster.config.drain_timeout == 0):
        connection.cut()  # what is told of its endpoint was told before it was made
    return known
