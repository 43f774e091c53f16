"""TCP servers: one that says who it is and echoes, and addresses that behave badly."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from types import TracebackType

from tests.support.ports import loopback_host

BUSY_TIMEOUT = 10.0
"""``connect_timeout`` where it is not what the test is about: the machine may be slow."""


class Server:
    """Says ``b"name\\n"``, then echoes. With ``tls``, after a handshake. Ends with its `with` block."""

    def __init__(self, name: str, tls: ssl.SSLContext | None = None) -> None:
        self.name = name
        self._tls = tls
        self._listener = socket.create_server((loopback_host(), 0), backlog=64)
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    @property
    def open(self) -> int:
        """Connections that nobody has ended."""
        return len(self._connections)

    def __enter__(self) -> Server:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        for thread in self._threads:
            thread.join(20)

    def reset(self) -> None:
        """Reset all connections."""
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Not close alone: a thread that reads keeps the connection open until it returns.
                connection.shutdown(socket.SHUT_RD)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]  # a function
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.add(connection)
            self._start(self._serve, connection)

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
                self._connections.discard(plain)
                self._connections.add(connection)
            connection.sendall(self.name.encode() + b"\n")
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            pass
        finally:
            connection.close()
            self._connections -= {plain, connection}


def refused() -> str:
    """An address that nobody listens at."""
    with socket.create_server((loopback_host(), 0)) as listener:
        host, port = listener.getsockname()[:2]
    return f"{host}:{port}"


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address that swallows packets: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((loopback_host(), 0), backlog=0))
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"{address[0]}:{address[1]}"


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """An address that accepts connections and says nothing: no TLS handshake ends there."""
    with socket.create_server((loopback_host(), 0), backlog=64) as listener:
        host, port = listener.getsockname()[:2]
        yield f"{host}:{port}"
