"""TCP checks."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import trustme

from meshlb import CheckTLS, TcpCheck
from tests.health.checked import checked
from tests.support.ports import free_port, loopback_host


@contextlib.contextmanager
def server(talk: Callable[[socket.socket], object], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that does ``talk`` with each connection, one after the other; its address."""
    listener = socket.create_server((loopback_host(), 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                with connection if context is None else context.wrap_socket(connection, server_side=True) as plain:
                    talk(plain)
            except OSError:
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"{loopback_host()}:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def test_a_connection_is_enough():
    with server(lambda connection: None) as address, checked(TcpCheck(), address) as service:
        service.until(address, "ready", r"^TCP: connected in \d+ ms, ")
    address = f"{loopback_host()}:{free_port()}"
    with checked(TcpCheck(), address) as service:
        service.until(address, "unhealthy", "^TCP: connection refused in ")


def redis(connection: socket.socket) -> None:
    if connection.recv(100) == b"PING\r\n":
        for byte in b"+PONG\r\n":
            connection.sendall(bytes([byte]))  # the answer comes in pieces
        connection.recv(1)


def test_send_and_expect():
    with server(redis) as address:
        with checked(TcpCheck(send="PING\r\n", expect="+PONG"), address) as service:
            service.until(address, "ready", r"^TCP: answered b'\+PONG' in ")
        with checked(TcpCheck(send="HELLO\r\n", expect="+PONG"), address) as service:
            service.until(address, "unhealthy", r"^TCP: closed without a word instead of b'\+PONG' in ")
    with server(lambda connection: connection.sendall(b"220 mail\r\n")) as address:
        with checked(TcpCheck(expect="220 "), address) as service:
            service.until(address, "ready", "answered b'220 '")
        with checked(TcpCheck(expect="SSH-"), address) as service:
            service.until(address, "unhealthy", r"closed after b'220 mail\\r\\n' instead of b'SSH-'")


def test_a_server_that_says_nothing_and_one_that_says_too_much():
    done = threading.Event()
    with server(lambda connection: done.wait(30)) as address:
        with checked(TcpCheck(expect="x", timeout=0.3, unhealthy_threshold=1), address) as service:
            service.until(address, "unhealthy", "^TCP: no answer in ")
        done.set()

    def flood(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"y" * 65536)

    with server(flood) as address, checked(TcpCheck(expect="x"), address) as service:
        service.until(address, "unhealthy", "b'x' is not in the first 64 KiB")


def test_tls(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("orders").configure_cert(context)
    tls = CheckTLS(ca_file=tmp_path / "ca.pem")

    def talk(connection: socket.socket) -> None:
        connection.sendall(connection.recv(100))

    with server(talk, context) as address:
        with checked(TcpCheck(tls=tls), address) as service:
            service.until(address, "ready", "^TCP: connected with TLS in ")
        with checked(TcpCheck(tls=tls, send="echo", expect="echo"), address) as service:
            service.until(address, "ready", "^TCP: answered b'echo' in ")
        with checked(TcpCheck(tls=CheckTLS(ca_file=tmp_path / "ca.pem", server_name="other")), address) as service:
            service.until(address, "unhealthy", "^TCP: TLS: Hostname mismatch")
    plain = server(lambda connection: connection.sendall(b"220 mail\r\n"))
    with plain as address, checked(TcpCheck(tls=tls), address) as service:
        service.until(address, "unhealthy", "^TCP: TLS: ")
