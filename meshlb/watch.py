"""The watch of one service: discovery reports to a cluster, for as long as the program has that cluster."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

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


async def keep_watching(discovery: Discovery, query: ServiceQuery, sink: ClusterSink) -> None:
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
