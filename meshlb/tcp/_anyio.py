"""Streams for anyio, and so for trio."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSStream

from meshlb.model import OK, Outcome
from meshlb.tcp._connecting import Connecting, outcome_of_connection
from meshlb.tcp._open import opened

if TYPE_CHECKING:
    import ssl as ssl_module

    from meshlb.cluster import Cluster
    from meshlb.model import HashKey
    from meshlb.node import Lease


class LeasedStream(ByteStream):
    """A connection that counts as one request in flight to its endpoint until it is closed. Made by ``open_stream``."""

    def __init__(self, cluster: Cluster, lease: Lease, stream: ByteStream) -> None:
        self._stream = stream
        self._lease = lease
        self._outcome: Outcome = OK
        self._among = opened(cluster, self)

    @property
    def lease(self) -> Lease:
        """The lease on the endpoint. Close it with an ``Outcome`` to say what this connection was like; by default it
        was a good one, unless it broke."""
        return self._lease

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """As the stream of ``anyio.connect_tcp``."""
        try:
            return await self._stream.receive(max_bytes)
        except anyio.BrokenResourceError as error:
            self._broken(error)
            raise

    async def send(self, item: bytes) -> None:
        """As the stream of ``anyio.connect_tcp``."""
        try:
            await self._stream.send(item)
        except anyio.BrokenResourceError as error:
            self._broken(error)
            raise

    async def send_eof(self) -> None:
        """As the stream of ``anyio.connect_tcp``. Over TLS it raises NotImplementedError, as anyio's does."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close the connection. Idempotent."""
        try:
            await self._stream.aclose()
        finally:
            self._lease.close(self._outcome)
            self._among.discard(self)

    def cut(self) -> None:
        """Shut it down both ways, from whatever thread."""
        with contextlib.suppress(OSError):  # closed, or ended by the other side
            self._stream.extra(SocketAttribute.raw_socket).shutdown(socket.SHUT_RDWR)

    def _broken(self, error: anyio.BrokenResourceError) -> None:
        self._outcome = outcome_of_connection(error.__cause__ or ConnectionResetError()) or OK

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Those of the stream of ``anyio.connect_tcp``."""
        return self._stream.extra_attributes


async def open_stream(
    cluster: Cluster,
    *,
    key: HashKey | None = None,
    timeout: float | None = None,
    ssl: ssl_module.SSLContext | None = None,
    server_hostname: str | None = None,
    tls_standard_compatible: bool = True,
) -> LeasedStream:
    """Connect to an instance of a service, as ``anyio.connect_tcp`` does to a host: on asyncio and on trio.

    See ``connect`` for the arguments and what is raised; ``tls_standard_compatible`` as anyio has it: False for a
    server that ends TLS connections without saying so. A connection on which anyio raises BrokenResourceError counts as
    a failure of its endpoint.
    """
    connecting = Connecting(cluster, key, timeout)
    lease = await connecting.start_async()
    while True:
        try:
            with anyio.fail_after(connecting.limit()):
                stream: ByteStream = await anyio.connect_tcp(lease.endpoint.host, lease.endpoint.port)
                if ssl is not None:
                    name = server_hostname or cluster.service
                    stream = await _secured(stream, ssl, name, standard_compatible=tls_standard_compatible)
        except BaseException as error:
            pause = connecting.failed(lease, error)
            if pause is None:
                raise
            await anyio.sleep(pause)
            further = connecting.again()
            if further is None:
                raise
            lease = further
        else:
            lease.answered()
            return LeasedStream(cluster, lease, stream)


async def _secured(
    stream: ByteStream, context: ssl_module.SSLContext, name: str, *, standard_compatible: bool
) -> ByteStream:
    try:
        return await TLSStream.wrap(
            stream, hostname=name, ssl_context=context, server_side=False, standard_compatible=standard_compatible
        )
    except BaseException as error:
        await anyio.aclose_forcefully(stream)
        if isinstance(error, anyio.BrokenResourceError | anyio.EndOfStream):
            raise ConnectionResetError("the connection was closed during the TLS handshake") from error
        raise
