"""A socket server that answers with whatever bytes a test wants: for what no decent HTTP server does."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

from tests.support.ports import loopback_host

Handler = Callable[[socket.socket], None]


class RawServer:
    """Calls ``handler(connection)`` for each connection, in a thread each; ends with its `with` block."""

    def __init__(self, handler: Handler, *, backlog: int = 16) -> None:
        self._handler = handler
        self._listener = socket.create_server((loopback_host(), 0), backlog=backlog)
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.accepted = 0

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def open_connections(self) -> list[socket.socket]:
        """Those that neither side has closed."""
        return [connection for connection in self._connections if connection.fileno() >= 0]

    def __enter__(self) -> RawServer:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _close(self._listener)
        for connection in self._connections:
            _close(connection)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._connections.append(connection)
            self._start(lambda connection=connection: self._serve(connection))

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._handler(connection)
        except OSError:
            pass  # the client has gone, which is part of the tests
        finally:
            connection.close()

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target)
        self._threads.append(thread)
        thread.start()


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)  # wakes whoever is blocked in it
    except OSError:
        pass
    connection.close()


def read_request(connection: socket.socket) -> bytes:
    """Read a request to its end, so that whatever comes next cannot meet it while it is being written."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    is_chunked = b"\r\ntransfer-encoding: chunked" in head.lower()
    while len(body) < length or (is_chunked and not body.endswith(b"0\r\n\r\n")):
        body += _receive(connection)
    return head


def _receive(connection: socket.socket) -> bytes:
    piece = connection.recv(65536)
    if not piece:
        raise ConnectionResetError
    return piece


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def answering(response: bytes, *, then: Callable[[socket.socket], object] | None = None) -> Handler:
    """Read one request, send ``response``, then do ``then`` (default: close)."""

    def handle(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(response)
        if then is not None:
            then(connection)

    return handle


def wait_for_close(connection: socket.socket) -> None:
    """Keep the connection until the other side, or the end of the test, closes it."""
    while connection.recv(65536):
        pass
