"""A leased socket is a socket, and its lease is open for as long as it is."""

from __future__ import annotations

import gc
import http.client
import os
import pickle
import selectors
import socket
import ssl
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from meshlb import Outcome, OutcomeKind, tcp
from tests.support.backends import http_backend
from tests.support.wait import eventually
from tests.tcp.conftest import ClusterOf, in_flight
from tests.tcp.servers import Server

Serve = Callable[..., list[Server]]


def test_it_is_a_socket(serve: Serve, cluster_of: ClusterOf) -> None:
    [server] = serve()
    cluster = cluster_of(server)
    with tcp.connect(cluster) as sock:
        assert isinstance(sock, socket.socket)
        assert sock.gettimeout() is None
        assert "{}:{}".format(*sock.getpeername()) == server.address
        sock.settimeout(30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            assert selector.select(30)
        buffer = bytearray(3)
        assert sock.recv_into(buffer) == 3
        assert bytes(buffer) == b"s0\n"
        assert sock.lease is not None
        assert sock.lease.endpoint.address == server.address
        with pytest.raises(TypeError):
            pickle.dumps(sock)
    assert sock.fileno() == -1
    assert in_flight(cluster) == 0
    sock.close()
    assert cluster.nodes[0].successes == 1


def test_the_default_timeout_is_the_sockets(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    socket.setdefaulttimeout(17)
    try:
        with tcp.connect(cluster, timeout=20) as sock:
            assert sock.gettimeout() == 17
    finally:
        socket.setdefaulttimeout(None)


def test_a_file_keeps_it_open(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    sock = tcp.connect(cluster)
    file = sock.makefile("rwb")
    sock.close()
    assert in_flight(cluster) == 1
    assert file.readline() == b"s0\n"
    file.write(b"more\n")
    file.flush()
    assert file.readline() == b"more\n"
    file.close()
    assert in_flight(cluster) == 0
    assert cluster.nodes[0].successes == 1


def test_detached_it_is_somebody_elses(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    sock = tcp.connect(cluster)
    number = sock.detach()
    assert in_flight(cluster) == 0
    with socket.socket(fileno=number) as other:
        assert other.recv(3, socket.MSG_WAITALL) == b"s0\n"
    sock.close()
    assert cluster.nodes[0].calls == cluster.nodes[0].successes == 1


def test_a_duplicate_has_no_lease(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    with tcp.connect(cluster) as sock:
        with sock.dup() as copy:
            assert copy.lease is None
        assert in_flight(cluster) == 1
        assert sock.recv(3, socket.MSG_WAITALL) == b"s0\n"


def test_collected_without_close(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    sock = tcp.connect(cluster)
    assert in_flight(cluster) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del sock
        gc.collect()
    eventually(lambda: in_flight(cluster) == 0, 20)
    assert cluster.nodes[0].failures == 0


@pytest.mark.parametrize(
    ("error", "failures"), [(ConnectionResetError(), 1), (TimeoutError(), 1), (FileNotFoundError(), 0), (KeyError(), 0)]
)
def test_how_a_with_block_ends(error: Exception, failures: int, serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    with pytest.raises(type(error)), tcp.connect(cluster):
        raise error
    assert cluster.nodes[0].failures == failures
    assert cluster.nodes[0].in_flight == 0


def test_the_user_knows_best(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    with tcp.connect(cluster) as sock:
        assert sock.lease is not None
        sock.lease.close(Outcome(OutcomeKind.FAILURE, reason="READONLY"))
        assert in_flight(cluster) == 0
    assert (cluster.nodes[0].failures, cluster.nodes[0].last_failure) == (1, "READONLY")


def test_tls_from_the_start_and_later(
    serve: Serve, cluster_of: ClusterOf, trusting: ssl.SSLContext, server_tls: Any
) -> None:
    cluster = cluster_of(*serve(1, server_tls("cache")))
    with tcp.connect(cluster, ssl=trusting) as secure:
        assert isinstance(secure, ssl.SSLSocket)
        assert isinstance(secure, tcp.LeasedTLSSocket)
        assert secure.version()
        assert type(trusting).sslsocket_class is ssl.SSLSocket
        assert trusting.sslsocket_class is ssl.SSLSocket
        assert secure.makefile("rb").readline() == b"s0\n"
        assert in_flight(cluster) == 1
    eventually(lambda: in_flight(cluster) == 0)
    plain = tcp.connect(cluster)
    with trusting.wrap_socket(plain, server_hostname="cache") as wrapped:
        assert wrapped.recv(1) == b"s"
        assert in_flight(cluster) == 0  # documented: whoever takes the descriptor takes it out of sight
    assert cluster.nodes[0].calls == cluster.nodes[0].successes == 2


def test_a_client_that_takes_a_socket(cluster_of: ClusterOf) -> None:
    """http.client makes its connections through a method that may be replaced, as clients of databases let one do."""
    with http_backend() as backend:
        cluster = cluster_of(backend.address)
        connection = http.client.HTTPConnection("cache", timeout=30)
        connection._create_connection = lambda *_: tcp.connect(cluster)  # type: ignore[attr-defined]
        for _ in range(2):
            connection.request("GET", "/")
            assert connection.getresponse().read()
        assert in_flight(cluster) == 1
        connection.close()
        assert in_flight(cluster) == 0
        assert cluster.nodes[0].calls == 1


def test_many_threads(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve(3))
    errors: list[BaseException] = []

    def connect_and_close() -> None:
        try:
            for _ in range(10):
                with tcp.connect(cluster) as sock:
                    assert sock.recv(3, socket.MSG_WAITALL).startswith(b"s")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=connect_and_close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert in_flight(cluster) == 0
    assert [node.calls for node in cluster.nodes] == [node.successes for node in cluster.nodes]


def test_the_child_of_a_fork_leaves_the_parents_connections_alone(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    with tcp.connect(cluster) as sock:
        assert sock.recv(3, socket.MSG_WAITALL) == b"s0\n"
        pid = os.fork()
        if pid == 0:
            try:
                cluster.close()  # which cuts the connections of this process
                sock.close()
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        sock.settimeout(30)
        sock.sendall(b"hi")
        assert sock.recv(2, socket.MSG_WAITALL) == b"hi"
        assert in_flight(cluster) == 1
