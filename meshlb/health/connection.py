"""The connection that a check is made over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshlb.health.options import CheckTLS
from meshlb.health.prober import BODY_LIMIT, server_name
from meshlb.model import Endpoint


class Connector:
    """Opens connections to a service's endpoints, with TLS if that is wanted."""

    def __init__(self, port: int | None, tls: CheckTLS | None, service: str) -> None:
        self._port = port
        self._context = None if tls is None else tls.context()
        self._server_name = None if tls is None else server_name(tls, service)

    @asynccontextmanager
    async def connect(self, endpoint: Endpoint) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection for as long as the block lasts."""
        reader, writer = await asyncio.open_connection(endpoint.host, self._port or endpoint.port, limit=BODY_LIMIT)
        plain = writer.transport
        try:
            # As a step of its own: asyncio can lose the socket of a connect with TLS that is cancelled.
            if self._context is not None:
                await writer.start_tls(self._context, server_hostname=self._server_name)
            yield reader, writer
        finally:
            # Not close(), which would wait for TLS's farewell: a check must not outlast its time.
            plain.abort()
