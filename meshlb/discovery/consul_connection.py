"""What all discoveries with equal settings share on one event loop: the client, and one watch per query."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from meshlb.discovery.base import ServiceQuery, Sink
from meshlb.discovery.consul_rules import first_delay
from meshlb.discovery.consul_settings import ConsulSettings
from meshlb.discovery.consul_watch import ConsulWatch
from meshlb.discovery.known_good import KnownGoodFile

if TYPE_CHECKING:
    from meshlb.discovery.consul_client import AsyncConsul


class _Shared(NamedTuple):
    watch: ConsulWatch
    task: asyncio.Task[None]


_open: dict[tuple[asyncio.AbstractEventLoop, ConsulSettings], ConsulConnection] = {}
"""Used from the loop in the key only, so that no lock is needed, and none can be held while the process forks. What a
child inherits stays in here untouched: closing it would disturb the parent, whose sockets they are."""


class ConsulConnection:
    """Open for as long as somebody holds it. Belongs to the event loop it was made on."""

    def __init__(self, settings: ConsulSettings) -> None:
        from meshlb.discovery.consul_client import AsyncConsul  # not before Consul is needed: it costs 0.1 s

        self._settings = settings
        self._holders = 0
        self._watches: dict[ServiceQuery, _Shared] = {}
        self._started: deque[float] = deque()
        self._known_good = (
            KnownGoodFile(settings.last_known_good, str(settings.address)) if settings.last_known_good else None
        )
        self.client: AsyncConsul = AsyncConsul(settings)

    def hold(self) -> None:
        """Keep it open until one more ``release``."""
        self._holders += 1

    async def release(self) -> None:
        """Let go; the last one closes the client and writes what is to be remembered."""
        self._holders -= 1
        if self._holders:
            return
        _open.pop((asyncio.get_running_loop(), self._settings), None)
        if self._known_good is not None:
            self._known_good.flush()
        await self.client.aclose()

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        """Listen to the watch of a query, which is started for the first listener and stopped with the last."""
        shared = self._watches.get(query)
        if shared is None:
            shared = self._watches[query] = self._start(query)
        shared.watch.add(sink)
        try:
            await asyncio.wait({shared.task})
            shared.task.result()  # it only ends by a bug: then every listener is to know
        finally:
            last = shared.watch.remove(sink)
            if (last or shared.task.done()) and self._watches.get(query) is shared:
                del self._watches[query]
            if last and not shared.task.done():
                shared.task.cancel()
                await asyncio.wait({shared.task})

    def describe(self, query: ServiceQuery) -> dict[str, object]:
        """The state of a query's watch as plain data; empty if there is none."""
        shared = self._watches.get(query)
        return {} if shared is None else shared.watch.describe()

    def _start(self, query: ServiceQuery) -> _Shared:
        now = asyncio.get_running_loop().time()
        while self._started and now - self._started[0] > 1.0:
            self._started.popleft()
        delay = first_delay(len(self._started), random.random)
        self._started.append(now)
        watch = ConsulWatch(self._settings, query, self.client, self._known_good, random=random.random)
        return _Shared(watch, asyncio.create_task(watch.run(delay), name=f"meshlb: Consul watch of {query}"))


def open_connection(settings: ConsulSettings) -> ConsulConnection:
    """The running loop's connection for these settings, made if need be, and held once for the caller."""
    key = (asyncio.get_running_loop(), settings)
    connection = _open.get(key)
    if connection is None:
        for stale in [other for other in _open if other[0].is_closed()]:
            del _open[stale]
        connection = _open[key] = ConsulConnection(settings)
    connection.hold()
    return connection
