"""Sockets, for threads."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import TYPE_CHECKING

from meshlb.model import OK
from meshlb.tcp._connecting import Connecting, outcome_of_connection
from meshlb.tcp._open import OpenConnections, opened

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.model import HashKey
    from meshlb.node import Lease

    _Socket = socket.socket
else:
    _Socket = object


class _Leased(_Socket):
    """What is added to a socket class: a lease that is open for as long as the file descriptor is ours."""

    __slots__ = ()

    _lease: Lease | None = None  # a copy made by dup() has none
    _among: OpenConnections | None = None

    @property
    def lease(self) -> Lease | None:
        """The lease on the endpoint. Close it with an ``Outcome`` to say what this connection was like; by default a
        connection that was made is a good one, whatever comes of it. None for a duplicate."""
        return self._lease

    def hold(self, cluster: Cluster, lease: Lease) -> None:
        """Keep the lease until the socket is closed."""
        self._lease = lease
        self._among = opened(cluster, self)

    def cut(self) -> None:
        """Shut it down both ways, from whatever thread."""
        with contextlib.suppress(OSError):  # closed, or ended by the other side
            # Not what SSLSocket makes of it, which would take the TLS session from under a thread that reads.
            socket.socket.shutdown(self, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; with files of ``makefile`` still open, the last of them does. Idempotent."""
        super().close()
        self._let_go()

    def detach(self) -> int:
        """Give the file descriptor away. What becomes of it is no longer seen: the connection counts as closed."""
        number = super().detach()
        self._let_go()
        return number

    def _let_go(self) -> None:
        if self._lease is not None and self.fileno() == -1:
            self._lease.close(OK)
            if self._among is not None:
                self._among.discard(self)

    def __exit__(self, *raised: object) -> None:
        error = raised[1]
        outcome = outcome_of_connection(error if isinstance(error, BaseException) else None)
        if outcome is not None and self._lease is not None:
            self._lease.close(outcome)
        self.close()


class LeasedSocket(_Leased, socket.socket):
    """A ``socket.socket`` that counts as one request in flight to its endpoint until it is closed or detached.

    A ``with`` block that ends with a ConnectionError or a TimeoutError counts as a failure of the endpoint. If
    ``SSLContext.wrap_socket`` takes it over, it counts as closed from then on: have ``connect`` do that (``ssl=``).
    """


class LeasedTLSSocket(_Leased, ssl.SSLSocket):
    """The same for an ``ssl.SSLSocket``."""


def connect(
    cluster: Cluster,
    *,
    key: HashKey | None = None,
    timeout: float | None = None,
    ssl: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> LeasedSocket | LeasedTLSSocket:
    """Connect to an instance of a service, as ``socket.create_connection`` does to a host.

    An instance that refuses, or has not answered within ``ServiceConfig.connect_timeout``, counts a failure, and
    another one is tried. ``key``: what a hash policy hashes. ``timeout``: seconds for all of it, the wait for the
    registry's first answer included (None: ``ServiceConfig.timeout``); the socket itself gets
    ``socket.getdefaulttimeout()``. ``ssl``: speak TLS; the certificate is verified for ``server_hostname`` (None: the
    service's name).

    Raises the OSError of the last attempt if all failed; NoEndpoints, CircuitOpen, DiscoveryTimeout, DiscoveryError or
    MeshClosed of this package, which are OSErrors, if there was nobody to connect to; ConfigError for a bad timeout.
    """
    connecting = Connecting(cluster, key, timeout)
    lease = connecting.start()
    while True:
        try:
            return _attempt(connecting, lease, ssl, server_hostname or cluster.service)
        except BaseException as error:
            pause = connecting.failed(lease, error)
            if pause is None:
                raise
            time.sleep(pause)
            further = connecting.again()
            if further is None:
                raise
            lease = further


def _attempt(
    connecting: Connecting, lease: Lease, context: ssl.SSLContext | None, server_hostname: str
) -> LeasedSocket | LeasedTLSSocket:
    endpoint = lease.endpoint
    until = time.monotonic() + connecting.limit()
    plain = socket.create_connection((endpoint.host, endpoint.port), until - time.monotonic())
    try:
        made: LeasedSocket | LeasedTLSSocket
        if context is None:
            made = LeasedSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        else:
            plain.settimeout(max(0.001, until - time.monotonic()))
            secure = context.wrap_socket(plain, server_hostname=server_hostname)
            plain = secure
            # The context makes sockets of its own class. Setting that on the context would be the user's to see.
            secure.__class__ = LeasedTLSSocket
            assert isinstance(secure, LeasedTLSSocket)
            made = secure
        made.settimeout(socket.getdefaulttimeout())
    except BaseException:
        plain.close()
        raise
    lease.answered()
    made.hold(connecting.cluster, lease)
    return made
