"""Where a mesh's instances come from: its own discovery, and others that targets name by themselves."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from meshlb.discovery.base import Discovery, ServiceQuery

logger = logging.getLogger("meshlb.discovery")


class Source(NamedTuple):
    """A discovery beside the mesh's own. ``name`` says what it is (``"http://agent:8500"``): sources of one mesh with
    the same name are one and the same."""

    name: str
    discovery: Discovery


class Sources:
    """The discoveries of one mesh. It closes them all, and must not lead back to the mesh."""

    def __init__(self, own: Discovery) -> None:
        self._own = own
        self._others: dict[str, Discovery] = {}
        self._lock = threading.Lock()

    def add(self, source: Source) -> None:
        """Remember a source, unless one of that name is known already."""
        with self._lock:
            self._others.setdefault(source.name, source.discovery)

    def of(self, query: ServiceQuery) -> Discovery:
        """The discovery that a query is for."""
        return self._own if query.source is None else self._others[query.source]

    async def aclose(self) -> None:
        """Close all, side by side."""
        import asyncio  # not at the top: `import meshlb` must stay cheap

        discoveries = (self._own, *self._others.values())
        ended = await asyncio.gather(*(discovery.aclose() for discovery in discoveries), return_exceptions=True)
        for discovery, error in zip(discoveries, ended, strict=True):
            if isinstance(error, Exception):
                logger.error("closing %r failed", discovery, exc_info=error)

    def after_fork_in_child(self) -> None:
        """Another thread may have held the lock, and does not exist here."""
        self._lock = threading.Lock()
