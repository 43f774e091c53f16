"""Streams for asyncio."""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from typing import TYPE_CHECKING, Any, Final

from meshlb.model import OK
from meshlb.tcp._connecting import Connecting, outcome_of_connection
from meshlb.tcp._open import OpenConnections, opened

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.model import HashKey
    from meshlb.node import Lease

_LIMIT: Final = 2**16
"""Bytes of a reader's buffer: asyncio's own default."""


class _LeasedProtocol(asyncio.StreamReaderProtocol):
    """Holds the lease until the transport has lost its connection, by whomever it was closed."""

    lease: Lease | None = None
    among: OpenConnections | None = None
    transport: asyncio.Transport | None = None
    loop: asyncio.AbstractEventLoop

    def hold(self, cluster: Cluster, lease: Lease, transport: asyncio.Transport) -> None:
        self.lease = lease
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.among = opened(cluster, self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.lease is not None:
            self.lease.close(outcome_of_connection(exc) or OK)
        if self.among is not None:
            self.among.discard(self)
        self.transport = None  # which refers to this protocol
        super().connection_lost(exc)

    def cut(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._abort)
        except RuntimeError:
            pass  # the loop is closed, and so is the connection

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


async def open_connection(
    cluster: Cluster,
    *,
    key: HashKey | None = None,
    timeout: float | None = None,
    limit: int = _LIMIT,
    ssl: ssl_module.SSLContext | None = None,
    server_hostname: str | None = None,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an instance of a service, as ``asyncio.open_connection`` does to a host.

    See ``connect`` for the arguments and what is raised; ``limit`` and ``options`` (those of
    ``loop.create_connection``) as asyncio has them. The connection counts as one request in flight until its transport
    is closed; one that ends with an error (reset by the endpoint, timed out) counts as a failure.
    """
    connecting = Connecting(cluster, key, timeout)
    lease = await connecting.start_async()
    while True:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        protocol = _LeasedProtocol(reader, loop=loop)
        try:
            if ssl is not None:
                options |= {"ssl": ssl, "server_hostname": server_hostname or cluster.service}
            async with asyncio.timeout(connecting.limit()):
                transport, _ = await loop.create_connection(
                    lambda protocol=protocol: protocol,  # type: ignore[misc]  # bound now: the loop makes another one
                    lease.endpoint.host,
                    lease.endpoint.port,
                    **options,
                )
        except BaseException as error:
            pause = connecting.failed(lease, error)
            if pause is None:
                raise
            await asyncio.sleep(pause)
            further = connecting.again()
            if further is None:
                raise
            lease = further
        else:
            lease.answered()
            protocol.hold(cluster, lease, transport)
            return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
