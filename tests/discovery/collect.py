"""What the tests of discovery listen with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from meshlb.discovery import Discovery, ServiceQuery
from meshlb.model import Endpoint
from tests.support.wait import eventually_async


class CollectingSink:
    """Keeps everything that it is told, in order."""

    def __init__(self) -> None:
        self.updates: list[Sequence[Endpoint]] = []
        self.failures: list[Exception] = []
        self.events: list[Sequence[Endpoint] | Exception] = []

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        self.updates.append(endpoints)
        self.events.append(endpoints)

    def failed(self, error: Exception) -> None:
        self.failures.append(error)
        self.events.append(error)

    @property
    def endpoints(self) -> Sequence[Endpoint] | None:
        return self.updates[-1] if self.updates else None

    @property
    def addresses(self) -> list[str] | None:
        return None if self.endpoints is None else [endpoint.address for endpoint in self.endpoints]

    @property
    def changes(self) -> list[Sequence[Endpoint]]:
        """The updates that say something new."""
        return [new for old, new in zip([None, *self.updates], self.updates, strict=False) if new != old]

    def one(self) -> Endpoint | None:
        """The only endpoint, if there is exactly one."""
        return self.endpoints[0] if self.endpoints is not None and len(self.endpoints) == 1 else None

    async def until(self, condition: Callable[[CollectingSink], object], timeout: float = 15.0) -> None:
        await eventually_async(lambda: condition(self), timeout, 0.005, lambda: f"told so far: {self.events[-5:]}")


@contextlib.asynccontextmanager
async def watching(
    discovery: Discovery, query: ServiceQuery | str, *, close: bool = True
) -> AsyncIterator[CollectingSink]:
    """Watch a service for the length of the block."""
    sink = CollectingSink()
    query = ServiceQuery(query) if isinstance(query, str) else query
    task = asyncio.create_task(discovery.watch(query, sink))
    try:
        yield sink
        assert not task.done(), "the watch has ended by itself"
    finally:
        task.cancel()
        await asyncio.wait({task})
        if close:
            await discovery.aclose()
