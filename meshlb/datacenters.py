"""One service in several datacenters: a watch for each of them, begun when it is needed, and one set of endpoints."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from meshlb.model import Status
from meshlb.watch import ClusterSink, keep_watching
from meshlb.whereabouts import FIRST_WAIT

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.discovery.base import Discovery, ServiceQuery
    from meshlb.model import Endpoint
    from meshlb.tiering import Tiering
    from meshlb.topology.failover import Failover
    from meshlb.whereabouts import Whereabouts

logger = logging.getLogger("meshlb.discovery")

KEEP_STANDBY: Final = 900.0
"""Seconds without need after which the last datacenter's watch is ended; what it knew stays (gRPC A56 keeps the
priorities that it does not use for as long)."""

Watching = Callable[["Discovery", "ServiceQuery", ClusterSink], Coroutine[Any, Any, None]]

PATIENCE: Final = 2.0
"""Seconds that the first datacenters have for their first answer before the next one is asked too: a Consul that works
answers in milliseconds, also for another datacenter, and a program that starts should not wait for one that hangs."""

_TICKS: Final = 4
"""Parts in which that time is counted. While this process itself stands still, as it does while it first imports what
it asks Consul with, no more than one of them passes."""

_UP: Final = (Status.PASSING, Status.WARNING)


class DatacenterWatch:
    """Watches the first datacenters of ``failover.datacenters``: one, and one more whenever those watched cannot carry
    the full load. All of them with ``prefetch``, and where all share the load. Belongs to one event loop.

    Each datacenter's last known endpoints stay in the set whatever becomes of its registry. The first report waits
    until it is known of every datacenter before the first one with healthy endpoints that it has none; or, after
    ``PATIENCE``, for any healthy endpoint.
    """

    def __init__(
        self, discovery: Discovery, query: ServiceQuery, sink: ClusterSink, failover: Failover, tiering: Tiering
    ) -> None:
        self._discovery = discovery
        self._query = query
        self._sink = sink
        self._tiering = weakref.ref(tiering)
        self._order = tuple(failover.datacenters)
        self._least = len(self._order) if failover.prefetch or failover.mode == "active_active" else 1
        self._wanted = self._least
        self._known: dict[str, tuple[Endpoint, ...]] = {}
        self._errors: dict[str, Exception] = {}
        self._reported = False
        self._late = False
        self._ticks = 0
        self._impatience: asyncio.TimerHandle
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Watch until cancelled, or until nothing can ever change."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            if not loop.is_closed():  # only while the process ends
                loop.call_soon_threadsafe(self._changed)

        tiering = self._tiering()
        if tiering is not None:
            tiering.when_needed(told)
            del tiering  # it leads to the mesh, which must be collected when the program drops it
        self._impatience = loop.call_later(PATIENCE / _TICKS, self._tick)
        try:
            while True:
                self._news.clear()
                for datacenter in self._order[: self._wanted]:
                    if datacenter not in self._tasks:
                        self._tasks[datacenter] = loop.create_task(self._watch(datacenter))
                for datacenter in self._order[self._wanted :]:
                    if (task := self._tasks.pop(datacenter, None)) is not None:
                        task.cancel()
                if len(self._tasks) == len(self._order) and all(task.done() for task in self._tasks.values()):
                    self._sink.ended()
                    return
                try:
                    async with asyncio.timeout(KEEP_STANDBY if self._wanted > self._least else None):
                        await self._news.wait()
                except TimeoutError:
                    if self._needed < self._wanted:
                        self._wanted -= 1
        finally:
            self._impatience.cancel()
            for task in self._tasks.values():
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks.values())

    async def _watch(self, datacenter: str) -> None:
        sink = _DatacenterSink(self, datacenter)
        await keep_watching(self._discovery, replace(self._query, datacenter=datacenter), sink)

    def update(self, datacenter: str, endpoints: Sequence[Endpoint]) -> None:
        """What one datacenter's registry says."""
        self._errors.pop(datacenter, None)
        self._known[datacenter] = tuple(endpoints)
        if self._reported or self._may_report():
            self._report()
        self._widen()

    def failed(self, datacenter: str, error: Exception) -> None:
        """One datacenter's registry could not be asked."""
        self._errors[datacenter] = error
        if not self._reported and self._known and self._may_report():
            self._report()
        else:
            self._sink.failed(error)
        self._widen()

    def ended(self, datacenter: str) -> None:
        """One datacenter's watch is over."""
        self._known.setdefault(datacenter, ())
        self._news.set()
        if not self._reported and self._may_report():
            self._report()
        self._widen()

    def _may_report(self) -> bool:
        for datacenter in self._order:
            if any(endpoint.status in _UP for endpoint in self._known.get(datacenter, ())):
                return True
            if not self._answered(datacenter) and not self._late:
                return False
        return bool(self._known) and all(map(self._answered, self._order))

    def _answered(self, datacenter: str) -> bool:
        return datacenter in self._known or datacenter in self._errors

    def _report(self) -> None:
        self._reported = True
        if (tiering := self._tiering()) is not None:
            tiering.topology.silent = frozenset(self._order).difference(self._known)
        found = [endpoint for datacenter in self._order for endpoint in self._known.get(datacenter, ())]
        self._sink.update(tuple({endpoint.identity: endpoint for endpoint in found}.values()))
        for error in self._errors.values():
            self._sink.failed(error)

    @property
    def _needed(self) -> int:
        tiering = self._tiering()
        return 1 if tiering is None else tiering.needed

    def _changed(self) -> None:
        self._news.set()  # the time without need begins anew
        self._widen()

    def _tick(self) -> None:
        """The registry of a first datacenter may hang, while another one is well."""
        if self._reported:
            return
        self._ticks += 1
        self._impatience = asyncio.get_running_loop().call_later(PATIENCE / _TICKS, self._tick)
        if self._ticks % _TICKS == 0:
            self._late = True
            if self._may_report():
                self._report()
            self._widen()

    def _widen(self) -> None:
        """Ask one datacenter more if those that are asked have answered and cannot carry everything."""
        if self._wanted >= len(self._order) or (self._reported and self._needed <= self._wanted):
            return
        if all(map(self._answered, self._order[: self._wanted])) or (self._late and not self._reported):
            self._wanted += 1
            self._news.set()
            logger.info("%s: datacenter %s is asked too", self._query, self._order[self._wanted - 1])


def watching(cluster: Cluster, whereabouts: Whereabouts) -> Watching:
    """How a cluster with tiers or zones is watched: from the moment that its place is known, and in all the
    datacenters that it names. What is returned does not keep the cluster alive."""
    failover, tiering = cluster.config.failover, cluster.tiering
    needs_place = tiering is not None and tiering.needs_place
    reference = None if tiering is None else weakref.ref(tiering)

    async def watch(discovery: Discovery, query: ServiceQuery, sink: ClusterSink) -> None:
        if needs_place:
            await whereabouts.known.wait_async(FIRST_WAIT)
        tiering = None if reference is None else reference()
        if failover is None or not failover.datacenters or query.datacenter is not None or tiering is None:
            await keep_watching(discovery, query, sink)
        else:
            whole = DatacenterWatch(discovery, query, sink, failover, tiering)
            del tiering
            await whole.run()

    return watch


class _DatacenterSink:
    """Where one datacenter's watch reports to."""

    __slots__ = ("_datacenter", "_whole")

    def __init__(self, whole: DatacenterWatch, datacenter: str) -> None:
        self._whole = whole
        self._datacenter = datacenter

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        self._whole.update(self._datacenter, endpoints)

    def failed(self, error: Exception) -> None:
        self._whole.failed(self._datacenter, error)

    def ended(self) -> None:
        self._whole.ended(self._datacenter)
