"""Faults that servers make on purpose or by the calendar: connections that end, certificates, names.

The numbers in the names are those of the list of faults in docs/faults.md.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme

from meshlb import Endpoint, Mesh
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from meshlb.httpx import MeshTransport
from tests.faults.fleet import CALL_TIMEOUT, config, endpoints, fleet, start
from tests.support.backends import Backend, Certificate, Kind, http_backend, started
from tests.support.ports import loopback_host
from tests.support.wait import eventually

PATIENCE = 30.0


class Aging(echo_pb2_grpc.EchoServicer):
    """Ends its connections with GOAWAY when they are old; notes how many there were."""

    def __init__(self, server: grpc.Server) -> None:
        self.peers: set[str] = set()
        echo_pb2_grpc.add_EchoServicer_to_server(self, server)

    def Say(self, request: Any, context: Any) -> Any:  # noqa: N802 - the proto's name
        self.peers.add(context.peer())
        return echo_pb2.EchoReply(text=request.text)


@contextmanager
def aging_server() -> Iterator[tuple[str, Aging]]:
    server = grpc.server(
        ThreadPoolExecutor(8),
        options=[("grpc.max_connection_age_ms", 200), ("grpc.max_connection_age_grace_ms", 2000)],
    )
    servicer = Aging(server)
    port = server.add_insecure_port(f"{(host := loopback_host())}:0")
    server.start()
    try:
        yield f"{host}:{port}", servicer
    finally:
        server.stop(None).wait()


def test_33_connections_that_reach_their_age_cost_no_call():
    """``max_connection_age`` is how gRPC servers are drained and rebalanced all day."""
    with ExitStack() as stack:
        servers = [stack.enter_context(aging_server()) for _ in range(2)]
        mesh = stack.enter_context(Mesh(StaticDiscovery({"shop": [at for at, _ in servers]}), defaults=config()))
        stub = echo_pb2_grpc.EchoStub(stack.enter_context(insecure_channel("consul:///shop", mesh=mesh)))
        over = threading.Event()
        errors: list[Exception] = []

        def load() -> None:
            while not over.is_set():
                try:
                    stub.Say(echo_pb2.EchoRequest(), timeout=CALL_TIMEOUT)
                except Exception as error:
                    errors.append(error)

        callers = [threading.Thread(target=load) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            eventually(lambda: min(len(one.peers) for _, one in servers) >= 4, PATIENCE, 0.02, "connections end")
        finally:
            over.set()
            for caller in callers:
                caller.join()
        assert errors == []


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def issue(authority: trustme.CA, files: Certificate, **more: Any) -> None:
    issued = authority.issue_cert("shop", **more)
    issued.cert_chain_pems[0].write_to_path(files.cert)
    issued.private_key_pem.write_to_path(files.key)


@pytest.fixture
def tls_backends(authority: trustme.CA, tmp_path: Path) -> Iterator[list[Backend]]:
    backends = []
    for number in range(3):
        files = Certificate(tmp_path / f"{number}.pem", tmp_path / f"{number}.key")
        issue(authority, files)
        backends.append(http_backend(tls=files))
    with started(backends):
        yield backends


@pytest.mark.parametrize("fault", ["expired", "another authority"])
def test_36_a_certificate_that_is_no_good_and_its_renewal(
    fault: str, authority: trustme.CA, tls_backends: list[Backend]
):
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    bad = tls_backends[0]
    assert bad.tls is not None
    with (
        Mesh(StaticDiscovery({"shop": endpoints(tls_backends)}), defaults=config(policy="round_robin")) as mesh,
        httpx.Client(transport=MeshTransport(mesh, verify=trusting), timeout=CALL_TIMEOUT) as client,
    ):

        def called() -> set[str]:
            """Twenty calls, none of which may fail; who answered."""
            return {str(client.get("https://shop/").raise_for_status().headers["x-backend"]) for _ in range(20)}

        def row() -> dict[str, Any]:
            return next(row for row in mesh.cluster("shop").snapshot()["endpoints"] if row["id"] == bad.id)

        assert bad.id in called()
        if fault == "expired":
            issue(authority, bad.tls, not_after=datetime.now(UTC) - timedelta(days=1))
        else:
            issue(trustme.CA(), bad.tls)
        bad.restart()
        eventually(lambda: bad.id not in called() and row()["state"] != "ready", PATIENCE, 0.0, "noticed")
        issue(authority, bad.tls)
        bad.restart()
        eventually(lambda: bad.id in called(), PATIENCE, 0.0, "back by itself, without a restart of the caller")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_39_an_address_whose_name_does_not_exist(kind: Kind):
    """Consul may give out names (Service.Address is free text); one that cannot be resolved is one bad endpoint."""
    with start(kind, 2) as backends, fleet(kind, backends) as running:
        ghost = Endpoint("no-such-host.invalid", 80, id="ghost")
        running.cluster.update([ghost, *endpoints(backends)])
        assert running.run(100).errors == []
        (row,) = [row for row in running.cluster.snapshot()["endpoints"] if row["id"] == "ghost"]
        assert row["failures"] >= 1
        assert row["successes"] == 0
