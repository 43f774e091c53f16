"""The watch of one service: discovery reports to a cluster, for as long as the program has that cluster. And of the
program's own service, for clusters that use a part of theirs only."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from meshlb.discovery.base import Sink

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.discovery.base import Discovery, ServiceQuery
    from meshlb.model import Endpoint

logger = logging.getLogger("meshlb.discovery")

_RESTART_PAUSE: Final = 1.0
"""Seconds before a watch that ended with an error is started again. A watch handles its registry's errors itself, so
this is for bugs in a Discovery: often enough to heal, seldom enough not to spin."""


class ClusterSink:
    """Passes reports on to a cluster without keeping it alive: a mesh that the program has dropped must be collected
    although its watches run."""

    __slots__ = ("_cluster",)

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = weakref.ref(cluster)

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        if (cluster := self._cluster()) is not None:
            cluster.update(endpoints)

    def failed(self, error: Exception) -> None:
        if (cluster := self._cluster()) is not None:
            cluster.failed(error)

    def ended(self) -> None:
        """The watch is over; nothing will ever be reported again."""
        if (cluster := self._cluster()) is not None:
            cluster.watch_ended()


class PeersSink:
    """Passes the instances of the program's own service on to the clusters whose subsets are reckoned from them."""

    __slots__ = ("_clusters", "_lock", "_peers")

    def __init__(self) -> None:
        self._clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._peers: tuple[Endpoint, ...] | None = None

    def add(self, cluster: Cluster) -> None:
        """Report to this cluster too, at once if something is known."""
        with self._lock:
            self._clusters.add(cluster)
            if self._peers is not None:
                cluster.peers_changed(self._peers)

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        with self._lock:
            if self._peers != tuple(endpoints):
                self._peers = tuple(endpoints)
                for cluster in self._clusters:
                    cluster.peers_changed(self._peers)

    def failed(self, error: Exception) -> None:
        """Nothing changes: the last known peers stay."""

    def ended(self) -> None:
        """Nothing changes any more."""


class WatchSink(Sink, Protocol):
    """Where a watch reports to, and that it is over."""

    def ended(self) -> None: ...


async def keep_watching(discovery: Discovery, query: ServiceQuery, sink: WatchSink) -> None:
    """Run ``discovery.watch`` until cancelled or until it returns; start it again if it fails."""
    while True:
        try:
            await discovery.watch(query, sink)
        except Exception as error:
            logger.exception("%s: the watch failed and is started again", query)
            sink.failed(error)
            await asyncio.sleep(_RESTART_PAUSE)
        else:
            sink.ended()
            return
