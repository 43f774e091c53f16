"""Layer 4: plain TCP (or TLS) connections to the instances of a service, for clients of databases, caches and the like.

::

    sock = meshlb.tcp.connect(mesh.cluster("postgres"))                       # a socket.socket
    reader, writer = await meshlb.tcp.open_connection(mesh.cluster("redis"))  # asyncio streams
    stream = await meshlb.tcp.open_stream(mesh.cluster("redis"))              # an anyio stream, for trio too

Each connection goes to the instance that the service's policy picks, and to another one if that cannot be connected. It
counts as one request in flight for as long as it is open, so ``least_connections`` balances connections; the latency
that is measured is the time to connect. See docs/tcp.md.

What is raised before an instance is connected is one of the classes here, which are a ``meshlb.MeshError`` and an
``OSError``; when all instances that were tried fail, it is the last one's own error.
"""

from __future__ import annotations

from meshlb.tcp._anyio import LeasedStream, open_stream
from meshlb.tcp._asyncio import open_connection
from meshlb.tcp._errors import (
    CircuitOpen,
    DiscoveryError,
    DiscoveryTimeout,
    LimitExceeded,
    MeshClosed,
    NoEndpoints,
    SessionLost,
    Throttled,
)
from meshlb.tcp._socket import LeasedSocket, LeasedTLSSocket, connect

__all__ = [
    "connect",
    "open_connection",
    "open_stream",
    "LeasedSocket",
    "LeasedTLSSocket",
    "LeasedStream",
    "CircuitOpen",
    "DiscoveryError",
    "DiscoveryTimeout",
    "LimitExceeded",
    "MeshClosed",
    "NoEndpoints",
    "SessionLost",
    "Throttled",
]
