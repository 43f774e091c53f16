"""Checks belong to their mesh and their process: they end with it, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest

from meshlb import Endpoint, FunctionCheck, GrpcCheck, HttpCheck, Mesh, NoEndpoints, ServiceConfig, TcpCheck
from meshlb.discovery import StaticDiscovery
from tests.core.fork_programs import run
from tests.health.checked import OFTEN, SECONDS, checked
from tests.health.grpc_server import Health, health_server
from tests.support import leaks
from tests.support.backends import http_backends
from tests.support.wait import eventually


@pytest.mark.parametrize("kind", ["http", "tcp", "grpc", "watch"])
def test_closing_ends_what_is_under_way_and_leaves_no_socket(kind):
    health = Health()
    with http_backends(1) as (backend,), health_server(health) as grpc_address:
        address = grpc_address if kind in {"grpc", "watch"} else backend.address
        check = {
            "http": HttpCheck(timeout=60),
            "tcp": TcpCheck(expect="never", timeout=60),
            "grpc": GrpcCheck(timeout=60),
            "watch": GrpcCheck(watch=True),
        }[kind]
        with checked(check, address) as service:  # once, for what only the first one opens
            if kind != "tcp":
                service.until(address, "ready", "200|SERVING")
        backend.behave(hang=True)
        health.hang = kind == "grpc"
        before = leaks.open_files()
        with checked(check, address) as service:
            if kind == "watch":
                eventually(lambda: health.watched, SECONDS)
            elif kind == "grpc":
                eventually(lambda: health.checks >= 2, SECONDS)
            else:
                eventually(lambda: leaks.open_files() > before + 3, SECONDS)
            began = time.monotonic()
        assert time.monotonic() - began < 10
        health.released.set()
        eventually(lambda: leaks.open_files() <= before, SECONDS, message=lambda: f"{leaks.open_files()} > {before}")


def test_an_endpoint_that_leaves_takes_its_watch_along():
    first, second = Health(), Health()
    with (
        health_server(first) as one,
        health_server(second) as two,
        checked(GrpcCheck(watch=True), one, two) as service,
    ):
        eventually(lambda: first.watched and second.watched, SECONDS)
        service.discovery.update("orders", [two])
        eventually(lambda: not first.watched, SECONDS)
        checks = first.checks
        service.rounds(two, 5)
        assert first.checks <= checks + 1


def test_a_mesh_that_is_dropped_is_collected_and_its_checks_end():
    calls = []

    async def function(endpoint: Endpoint) -> None:
        calls.append(endpoint)
        await asyncio.sleep(0)

    check = FunctionCheck(function, interval=0.02)
    mesh = Mesh(StaticDiscovery({"orders": ["10.0.0.1:80"]}), defaults=ServiceConfig(health_check=check))
    cluster = weakref.ref(mesh.cluster("orders"))
    eventually(lambda: len(calls) >= 3, SECONDS)
    reference = weakref.ref(mesh)
    del mesh

    def gone() -> bool:
        gc.collect()
        return reference() is None and cluster() is None

    eventually(gone, SECONDS)


def test_the_first_call_waits_for_the_first_checks_and_says_why_nobody_is_left():
    with http_backends(2, delay=0.3) as backends:
        addresses = [backend.address for backend in backends]
        with checked(HttpCheck(wait_first=True), *addresses) as service:
            assert {row["state"] for row in service.cluster.snapshot()["endpoints"]} == {"unchecked"}
            service.cluster.start().close()
        for backend in backends:
            backend.behave(status=500)
        said = r"none of its 2 endpoints.*\(2 unhealthy\).*active health checks"
        with (
            checked(HttpCheck(wait_first=True), *addresses, panic_threshold=0) as service,
            pytest.raises(NoEndpoints, match=said),
        ):
            service.cluster.start()
        with checked(HttpCheck(wait_first=True), *addresses) as service:
            service.cluster.start().close()  # panic: all have been judged, and all cannot be bad


def test_checks_that_cannot_begin_are_begun_again(tmp_path, caplog):
    import trustme

    from meshlb import CheckTLS

    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    content = file.read_bytes()
    check = HttpCheck(tls=CheckTLS(ca_file=file), **OFTEN)
    file.unlink()
    mesh = Mesh(StaticDiscovery({"orders": ["127.0.0.1:9"]}), defaults=ServiceConfig(health_check=check))
    with mesh:
        cluster = mesh.cluster("orders")
        eventually(lambda: "the health checks failed and are begun again" in caplog.text, SECONDS)
        cluster.start().close()
        file.write_bytes(content)
        eventually(lambda: cluster.nodes[0].health.last is not None, SECONDS)


PROGRAM = """
    os.environ["GRPC_VERBOSITY"] = "ERROR"  # it remarks on threads of its own at each fork
    os.environ.pop("GRPC_ENABLE_FORK_SUPPORT", None)
    os.environ.update(ENVIRONMENT)
    from meshlb import HttpCheck, GrpcCheck
    check = CHECK(interval=0.05, unhealthy_interval=0.05, timeout=10, OPTIONS)
    mesh = Mesh(StaticDiscovery({"orders": ["ADDRESS"]}), defaults=ServiceConfig(health_check=check))
    cluster = mesh.cluster("orders")

    def rounds(count):
        [node] = cluster.nodes
        for _ in range(count):
            last = node.health.last
            eventually(lambda: node.health.last is not last)

    eventually(lambda: cluster.age is not None)
    rounds(3)

    def idle_child():
        assert threading.active_count() == 1

    def child():
        [node] = cluster.nodes
        assert node.health.last.passed  # what was known in the parent
        cluster.start().close()
        rounds(3)
        assert cluster.snapshot()["endpoints"][0]["state"] == "ready"
        mesh.close()
        eventually(lambda: threading.active_count() == 1)

    for _ in range(3):
        end(in_child(child))
        rounds(3)
    end(in_child(idle_child))
    cluster.start().close()
    mesh.close()
    eventually(lambda: threading.active_count() == 1)
"""


@pytest.mark.parametrize(
    ("kind", "options", "support"),
    [
        ("HttpCheck", "", None),
        ("GrpcCheck", "", None),
        ("GrpcCheck", "", "1"),
        ("GrpcCheck", "watch=True", None),
        ("GrpcCheck", "watch=True", "1"),
    ],
)
def test_each_process_of_a_fork_makes_its_own_checks(kind, options, support):
    environment = {} if support is None else {"GRPC_ENABLE_FORK_SUPPORT": support}
    with http_backends(1) as (backend,), health_server(Health()) as grpc_address:
        address = backend.address if kind == "HttpCheck" else grpc_address
        program = PROGRAM.replace("CHECK", kind).replace("ADDRESS", address).replace("OPTIONS", options)
        run(program.replace("ENVIRONMENT", repr(environment)))
