"""HTTP checks of real servers that pass, fail, hang, flap, drop and answer far too much."""

from __future__ import annotations

import re
import socket
import ssl
import threading

import pytest
import trustme

from meshlb import CheckTLS, Endpoint, HttpCheck
from tests.health.checked import SECONDS, checked
from tests.support.backends import Backend, Certificate, http_backends
from tests.support.ports import free_port, loopback_host
from tests.support.wait import eventually


def test_a_server_that_passes_fails_hangs_and_comes_back():
    with http_backends(2) as (good, bad), checked(HttpCheck(path="/ready"), good.address, bad.address) as service:
        row = service.until(bad.address, "ready", r"^GET /ready: 200 in \d+ ms, \d+ s ago$")
        assert row["eligible"] and row["reason"] == ""
        bad.behave(status=503)
        row = service.until(
            bad.address, "unhealthy", r"^GET /ready: 503 in \d+ ms, (3 of 3 failures|\d+ failures in a row), "
        )
        assert row["reason"].startswith("GET /ready: 503 in ") and row["status"] == "passing"
        eventually(lambda: not service.row(bad.address)["eligible"], SECONDS)
        for _ in range(10):
            with service.cluster.lease() as lease:
                assert lease.endpoint.address == good.address
        bad.behave()
        service.until(bad.address, "ready", "^GET /ready: 200 ")
        bad.kill()
        service.until(bad.address, "unhealthy", "^GET /ready: connection refused in ")
        bad.restart()
        service.until(bad.address, "ready", "^GET /ready: 200 ")
        assert service.row(good.address)["state"] == "ready"


def test_a_server_that_hangs():
    check = HttpCheck(timeout=0.5, unhealthy_threshold=2)
    with http_backends(1) as (backend,), checked(check, backend.address) as service:
        service.until(backend.address, "ready", "200 in")
        backend.behave(hang=True)
        service.until(backend.address, "unhealthy", r"^GET /health: no answer in \d+ ms, ")
        backend.behave()
        service.until(backend.address, "ready", "200 in")


def test_a_server_that_flaps_stays_where_it_is():
    with http_backends(1) as (backend,), checked(HttpCheck(), backend.address) as service:
        service.until(backend.address, "ready", "200 in")
        backend.behave(status=503, fail_share=0.5)  # every other one: never three in a row
        service.until(backend.address, "ready", "503 in .* 1 of 3 failures")
        service.rounds(backend.address, 8)
        assert service.row(backend.address)["state"] == "ready"
        backend.behave(status=503)
        service.until(backend.address, "unhealthy")
        backend.behave(status=503, fail_share=0.5)  # never two successes in a row
        service.until(backend.address, "unhealthy", "200 in .* 1 of 2 successes")
        service.rounds(backend.address, 8)
        assert service.row(backend.address)["state"] == "unhealthy"


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"reset": True}, "connection reset by peer"),
        ({"truncate": True}, "peer closed connection without sending complete message body"),
    ],
)
def test_a_server_that_drops_the_connection(behaviour, words):
    with http_backends(1, **behaviour) as (backend,), checked(HttpCheck(), backend.address) as service:
        service.until(backend.address, "unhealthy", words)
        backend.behave()
        service.until(backend.address, "ready", "200 in")


def test_what_is_asked():
    check = HttpCheck(path="/a?b=c", method="POST", headers={"X-Probe": "1"})
    with http_backends(1) as (backend,), checked(check, backend.address) as service:
        service.until(backend.address, "ready", r"^POST /a\?b=c: 200 ")
        assert backend.requests("/a") >= 1
    seen = re.compile(r'"host": "orders".*"user-agent": "meshlb-health-check"')
    with http_backends(1) as (backend,), checked(HttpCheck(body=seen), backend.address) as service:
        service.until(backend.address, "ready", "200 in")
    own = HttpCheck(headers={"host": "my.name"}, body='"host": "my.name"')
    with http_backends(1) as (backend,), checked(own, backend.address) as service:
        service.until(backend.address, "ready", "200 in")


def test_the_body_tells_one_service_from_another():
    with http_backends(2) as (mine, other):
        check = HttpCheck(body=f'"backend": "{mine.id}"')
        with checked(check, mine.address, other.address) as service:
            service.until(mine.address, "ready", "200 in")
            service.until(other.address, "unhealthy", f"200, but .*{mine.id}.* is not in its \\d+ bytes in")


def test_statuses_and_redirects():
    with http_backends(1, status=404) as (backend,), checked(HttpCheck(), backend.address) as service:
        service.until(backend.address, "unhealthy", "404 in")
    with (
        http_backends(1, status=404) as (backend,),
        checked(HttpCheck(expected_statuses=("200-299", 404)), backend.address) as service,
    ):
        service.until(backend.address, "ready", "404 in")
    with http_backends(1) as (backend,):
        check = HttpCheck(path=f"/redirect?to={backend.url}/elsewhere")
        with checked(check, backend.address) as service:
            service.until(backend.address, "unhealthy", "302 in")
            assert backend.requests("/elsewhere") == 0


def test_the_header_that_fails_at_once():
    header = {"x-envoy-immediate-health-check-fail": "true"}
    check = HttpCheck(unhealthy_threshold=1000)
    with http_backends(1) as (backend,), checked(check, backend.address) as service:
        service.until(backend.address, "ready", "200 in")
        backend.behave(headers=header)
        service.until(backend.address, "unhealthy", "200 with x-envoy-immediate-health-check-fail in")
        backend.behave()
        service.until(backend.address, "ready", "200 in")
    check = HttpCheck(unhealthy_threshold=1000, immediate_fail_header="X-Draining")
    with http_backends(1, headers=header) as (backend,), checked(check, backend.address) as service:
        service.until(backend.address, "ready", "200 in")
        backend.behave(headers={"x-draining": "1"})
        service.until(backend.address, "unhealthy", "200 with X-Draining in")


class Endless:
    """A server that sends a head and then as much body as the client takes, and counts it."""

    def __init__(self, head: bytes, size: int = 100_000_000) -> None:
        self.sent: list[int] = []
        self.ended = 0
        self._head = head
        self._size = size
        self._listener = socket.create_server((loopback_host(), 0))
        self.address = f"{loopback_host()}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        piece = b"x" * 65536
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            sent = 0
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(self._head)
                    while sent < self._size:
                        sent += connection.send(piece)
                except OSError:
                    pass
            self.sent.append(sent)

    def __enter__(self) -> Endless:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def test_an_answer_of_100_megabytes_is_cut_off_and_judged_by_its_beginning():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nI am well."
    with Endless(head) as server, checked(HttpCheck(body="I am well."), server.address) as service:
        service.until(server.address, "ready", "200 in")
        eventually(lambda: len(server.sent) >= 2, SECONDS)
        assert max(server.sent) < 50_000_000  # socket buffers of both sides, and no more
    with Endless(head) as server, checked(HttpCheck(body="I am ill."), server.address) as service:
        service.until(server.address, "unhealthy", "200, but 'I am ill.' is not in the first 64 KiB in")
    with Endless(head.replace(b"200 OK", b"500 No")) as server, checked(HttpCheck(), server.address) as service:
        service.until(server.address, "unhealthy", "500 in")
    with Endless(b"HTTP/1.1 200 OK\r\nX: ") as server, checked(HttpCheck(), server.address) as service:
        service.until(server.address, "unhealthy", "Receive buffer too long in ")  # a head without end
    with Endless(b"SSH-2.0-OpenSSH_9\r\n\r\n", size=0) as server, checked(HttpCheck(), server.address) as service:
        service.until(server.address, "unhealthy", "illegal status line")


def test_an_answer_that_only_drips_ends_with_its_time():
    drip = {"chunks": 20, "interval": 0.3}
    check = HttpCheck(timeout=0.9, unhealthy_threshold=1)
    with http_backends(1, **drip) as (backend,), checked(check, backend.address) as service:
        service.until(backend.address, "unhealthy", "no answer in")


def test_another_port_and_ipv6():
    with http_backends(1) as (backend,):
        endpoint = Endpoint(backend.host, free_port())
        with checked(HttpCheck(port=backend.port), endpoint) as service:
            service.until(endpoint.address, "ready", "200 in")
    with Backend("http", host="::1") as backend, checked(HttpCheck(), backend.address) as service:
        service.until(backend.address, "ready", "200 in")


def test_a_host_without_address():
    with checked(HttpCheck(timeout=30), Endpoint("no-such-host.invalid", 80)) as service:
        service.until("no-such-host.invalid:80", "unhealthy", "GET /health: ")


def test_https(tmp_path, monkeypatch):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    files = Certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    issued = authority.issue_cert("orders", "other.name")
    issued.cert_chain_pems[0].write_to_path(str(files.cert))
    issued.private_key_pem.write_to_path(str(files.key))
    ca_file = tmp_path / "ca.pem"
    with Backend("http", tls=files) as backend:
        for tls, state, words in [
            (CheckTLS(ca_file=ca_file), "ready", "200 in"),
            (CheckTLS(ca_file=ca_file, server_name="other.name"), "ready", "200 in"),
            (CheckTLS(verify=False), "ready", "200 in"),
            (CheckTLS(ca_file=ca_file, server_name="wrong.name"), "unhealthy", "TLS: Hostname mismatch"),
            (CheckTLS(), "unhealthy", "TLS: (self-signed certificate|unable to get local issuer)"),
        ]:
            with checked(HttpCheck(tls=tls), backend.address) as service:
                service.until(backend.address, state, words)
    with http_backends(1) as (backend,), checked(HttpCheck(tls=CheckTLS(verify=False)), backend.address) as service:
        service.until(backend.address, "unhealthy", "GET /health: TLS: ")


def test_a_client_certificate(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    client = authority.issue_cert("client")
    client.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("orders").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server((loopback_host(), 0))
    address = f"{loopback_host()}:{listener.getsockname()[1]}"

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(4096)
                    secured.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        tls = CheckTLS(ca_file=tmp_path / "ca.pem", cert=tmp_path / "client.pem")
        with checked(HttpCheck(tls=tls), address) as service:
            service.until(address, "ready", "204 in")
        with checked(HttpCheck(tls=CheckTLS(ca_file=tmp_path / "ca.pem")), address) as service:
            service.until(address, "unhealthy", "TLS: ")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def test_no_proxy_of_the_environment_comes_between(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{loopback_host()}:1")
    monkeypatch.setenv("all_proxy", f"http://{loopback_host()}:1")
    with http_backends(1) as (backend,), checked(HttpCheck(), backend.address) as service:
        service.until(backend.address, "ready", "200 in")
