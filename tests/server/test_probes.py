"""Explicit probes on the wire: the middleware and the interceptors answer them, every kind of client makes them."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import meshlb.grpc
import meshlb.grpc.aio
from meshlb import ConfigError, Mesh, Prequal, Probes, ServiceConfig
from meshlb.balancing.orca import parse_header, report_among
from meshlb.balancing.prequal import IN_FLIGHT_METRIC
from meshlb.balancing.probes import PROBE_METHOD, PROBE_PATH
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import MeshTransport
from meshlb.server import LoadMeter
from meshlb.server.asgi import LoadReportMiddleware
from meshlb.server.grpc import AioLoadReportInterceptor, LoadReportInterceptor
from tests.http.drivers import Driver, drive
from tests.server.asgi_server import serving as serving_asgi
from tests.server.rpc_service import Gate
from tests.server.rpc_service import serving as serving_rpc
from tests.support.ports import loopback_host
from tests.support.wait import eventually

PATIENT = Probes(interval=0.02, timeout=30, idle=600)
"""As often as it takes, and no probe too late for a busy machine."""


class Service:
    """An application that counts the requests that reach it."""

    def __init__(self, *, reports: bool = True, **options: Any) -> None:
        self.paths: list[str] = []
        self.asked: list[str | None] = []
        self.meter = LoadMeter()
        app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "HEAD"])])
        self.app: Any = LoadReportMiddleware(app, meter=self.meter, **options) if reports else app

    async def answer(self, request: Request) -> Response:
        self.paths.append(request.url.path)
        return PlainTextResponse("done", 200 if request.url.path == "/" else 404)


def mesh_to(addresses: list[str], probes: Probes = PATIENT, **settings: Any) -> Mesh:
    policy = Prequal(max_age=600, explore=1, probes=probes)  # explore: no call takes a probe out of the pool
    config = ServiceConfig(policy=policy, connect_timeout=15, **settings)
    mesh = Mesh(StaticDiscovery({"orders": addresses}), defaults=config)
    mesh.cluster("orders").wait_ready(15)
    return mesh


def known(mesh: Mesh) -> set[str]:
    """Addresses of the endpoints in the pool."""
    picker: Any = mesh.cluster("orders").view.picker
    return {probe.replica.endpoint.address for probe in picker.probes()}


def quiet(mesh: Mesh, calls: int = 1) -> bool:
    """Whether nothing but the calls has left a trace on the endpoints."""
    nodes = mesh.cluster("orders").nodes
    return sum(node.calls for node in nodes) == calls and not any(node.in_flight or node.failures for node in nodes)


@pytest.fixture(params=[("httpx", "sync"), ("httpx", "trio"), ("httpx2", "asyncio")], ids="-".join)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with drive(*request.param) as driver:
        yield driver


@pytest.fixture
def asgi() -> Iterator[Callable[..., list[str]]]:
    with contextlib.ExitStack() as stack:
        yield lambda services: [stack.enter_context(serving_asgi(service.app)) for service in services]


# -- HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_middleware_answers_probes_itself_and_they_count_nowhere(method: str) -> None:
    service = Service(only_when_asked=True)
    with serving_asgi(service.app) as address:
        for _ in range(3):
            response = httpx.request(method, f"http://{address}{PROBE_PATH}")
            report = parse_header(response.headers["endpoint-load-metrics"])
            assert response.status_code == 204
            assert report is not None and report.named_metrics[IN_FLIGHT_METRIC] == 0
        asked = httpx.get(f"http://{address}{PROBE_PATH}", headers={"endpoint-load-metrics-format": "JSON"})
        assert asked.headers["endpoint-load-metrics"].startswith("JSON ")
    assert service.paths == []
    assert service.meter.in_flight == 0
    assert service.meter._ended == 0


def test_the_path_may_be_another_or_none() -> None:
    service, bare = Service(probe_path="/load"), Service(probe_path=None)
    with serving_asgi(service.app) as address, serving_asgi(bare.app) as other:
        assert httpx.get(f"http://{address}/load").status_code == 204
        assert httpx.get(f"http://{address}{PROBE_PATH}").status_code == 404
        assert httpx.get(f"http://{other}{PROBE_PATH}").status_code == 404
    with pytest.raises(ConfigError, match="probe_path"):
        LoadReportMiddleware(service.app, probe_path="load")


def test_one_call_of_any_client_and_the_pool_fills(asgi: Any, driver: Driver) -> None:
    services = [Service() for _ in range(4)]
    addresses = asgi(services)
    with mesh_to(addresses) as mesh, driver.client(driver.transport(mesh)) as client:
        client.get("http://orders/")
        eventually(lambda: known(mesh) == set(addresses), timeout=60)
        assert quiet(mesh)
    assert [path for service in services for path in service.paths] == ["/"]


def test_with_the_tls_settings_of_the_clients(driver: Driver, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("orders")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(files[0])
    issued.private_key_pem.write_to_path(files[1])
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    tls = {"ssl_certfile": str(files[0]), "ssl_keyfile": str(files[1])}
    services = [Service(), Service()]
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(serving_asgi(service.app, **tls)) for service in services]
        mesh = stack.enter_context(mesh_to(addresses))
        client = stack.enter_context(driver.client(driver.transport(mesh, verify=trusting)))
        assert client.get("https://orders/").status_code == 200
        eventually(lambda: known(mesh) == set(addresses), timeout=60)
        assert quiet(mesh)


def test_a_server_that_knows_no_probes_but_reports_with_every_response(asgi: Any) -> None:
    addresses = asgi([Service(probe_path=None), Service(probe_path=None)])
    with mesh_to(addresses) as mesh, httpx.Client(transport=MeshTransport(mesh)) as client:
        client.get("http://orders/", timeout=30)
        eventually(lambda: known(mesh) == set(addresses), timeout=60)  # from the headers of a 404


def test_servers_that_report_nothing_are_left_alone(asgi: Any) -> None:
    services = [Service(reports=False), Service(reports=False)]
    addresses = asgi(services)
    with mesh_to(addresses) as mesh, httpx.Client(transport=MeshTransport(mesh)) as client:
        client.get("http://orders/", timeout=30)
        demand: Any = mesh.cluster("orders").view.picker
        eventually(lambda: min((times for times, _ in demand._demand._resting.values()), default=0) >= 4, timeout=60)
        assert known(mesh) == set()
        assert quiet(mesh)
        probed = sum(path == PROBE_PATH for service in services for path in service.paths)
        looks = max(times for times, _ in demand._demand._resting.values())
        assert probed <= 2 * (looks + 1)  # the rests double, so each look brings one probe at most


def test_a_server_that_is_down_is_no_failure_of_a_call(asgi: Any) -> None:
    addresses = asgi([Service(), Service()])
    with contextlib.ExitStack() as gone:
        dead = gone.enter_context(serving_asgi(Service().app))
    with mesh_to([*addresses, dead]) as mesh, httpx.Client(transport=MeshTransport(mesh)) as client:
        for _ in range(20):  # until one has gone to a living one: which one it is makes no difference
            if client.get("http://orders/", timeout=30).status_code == 200:
                break
        failures = sum(node.failures for node in mesh.cluster("orders").nodes)
        eventually(lambda: known(mesh) == set(addresses), timeout=60)
        assert sum(node.failures for node in mesh.cluster("orders").nodes) == failures


def test_a_closed_transport_makes_no_more_probes(asgi: Any) -> None:
    service = Service()
    addresses = asgi([service, Service()])
    with mesh_to(addresses) as mesh:
        probing: Any = mesh.cluster("orders").probing
        with httpx.Client(transport=MeshTransport(mesh)) as client:
            client.get("http://orders/", timeout=30)
            eventually(lambda: known(mesh) == set(addresses), timeout=60)
        del client
        eventually(lambda: not probing._armed, timeout=60)
        with httpx.Client(transport=MeshTransport(mesh)) as client:  # and another one starts them again
            client.get("http://orders/", timeout=30)
            assert probing._armed


def test_transports_that_the_program_makes_are_not_probed_past(asgi: Any) -> None:
    addresses = asgi([Service(), Service()])
    transport_factory: Any = lambda endpoint: httpx.HTTPTransport()  # noqa: E731
    transport = MeshTransport(transport_factory=transport_factory, mesh=(mesh := mesh_to(addresses)))
    with mesh, httpx.Client(transport=transport) as client:
        client.get("http://orders/", timeout=30)
        probing: Any = mesh.cluster("orders").probing
        assert not probing._armed


def test_no_policy_without_probes_is_probed(asgi: Any) -> None:
    with Mesh(StaticDiscovery({"orders": ["127.0.0.1:1"]})) as mesh:
        assert mesh.cluster("orders").probing is None


FORKING = """
import gc, os, sys, time
import httpx
import meshlb
from meshlb import Mesh, Prequal, Probes, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import MeshTransport

addresses = sys.argv[1:]
policy = Prequal(max_age=600, explore=1, probes=Probes(interval=0.02, timeout=30, idle=600))
mesh = Mesh(StaticDiscovery({"orders": addresses}), defaults=ServiceConfig(policy=policy, connect_timeout=15))
client = httpx.Client(transport=MeshTransport(mesh), timeout=30)


def fill():
    client.get("http://orders/")
    deadline = time.monotonic() + 60
    while len({probe.replica for probe in mesh.cluster("orders").view.picker.probes()}) < len(addresses):
        assert time.monotonic() < deadline, mesh.cluster("orders").view.picker.probes()
        time.sleep(0.01)


fill()
gc.collect()  # httpx's responses are cycles that hold their socket: the child would find it unclosed, and warn
child = os.fork()
fill()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
client.close()
mesh.close()
"""


def test_probes_go_on_in_the_child_of_a_fork_and_in_its_parent(asgi: Any) -> None:
    addresses = asgi([Service() for _ in range(3)])
    done = subprocess.run(
        # Python 3.12 warns of every fork of a process with threads.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORKING, *addresses],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- gRPC ------------------------------------------------------------------------------------------------------


STYLES = ("sync", "coroutine")


def interceptor(style: str) -> Any:
    return LoadReportInterceptor() if style == "sync" else AioLoadReportInterceptor()


@pytest.mark.parametrize("style", STYLES)
def test_the_interceptors_answer_probes_themselves_and_they_count_nowhere(style: str) -> None:
    reporting = interceptor(style)
    with serving_rpc(style, Gate(), reporting) as address, grpc.insecure_channel(address) as channel:
        probe = channel.unary_unary(PROBE_METHOD, None, None)
        for _ in range(3):
            response, call = probe.with_call(b"", timeout=30)
            report = report_among(call.trailing_metadata())
            assert response == b""
            assert report is not None and report.named_metrics[IN_FLIGHT_METRIC] == 0
    assert reporting.meter.in_flight == 0
    assert reporting.meter._ended == 0


@pytest.fixture
def rpc() -> Iterator[Callable[..., list[str]]]:
    with contextlib.ExitStack() as stack:
        yield lambda style, count=3: [
            stack.enter_context(serving_rpc(style, Gate(), interceptor(style))) for _ in range(count)
        ]


@pytest.mark.parametrize("style", STYLES)
def test_one_call_of_a_blocking_channel(rpc: Any, style: str) -> None:
    addresses = rpc(style)
    with mesh_to(addresses) as mesh, meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel:
        assert channel.unary_unary("/test.Service/unary_unary", None, None)(b"ok", timeout=30) == b"done"
        eventually(lambda: known(mesh) == set(addresses), timeout=60)
        assert quiet(mesh)


@pytest.mark.parametrize("style", STYLES)
def test_one_call_of_an_aio_channel(rpc: Any, style: str) -> None:
    addresses = rpc(style)
    with drive("httpx", "asyncio") as driver, mesh_to(addresses) as mesh:

        async def call_once() -> Any:
            channel = meshlb.grpc.aio.insecure_channel("consul:///orders", mesh=mesh)
            assert await channel.unary_unary("/test.Service/unary_unary")(b"ok", timeout=30) == b"done"
            return channel

        channel = driver.run(call_once)
        eventually(lambda: known(mesh) == set(addresses), timeout=60)
        assert quiet(mesh)
        driver.run(channel.close)
        probing: Any = mesh.cluster("orders").probing
        del channel
        eventually(lambda: not probing._armed, timeout=60)


@pytest.mark.parametrize("kind", ["blocking", "aio"])
def test_with_the_credentials_of_the_channel(kind: str) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("orders")
    pair = (issued.private_key_pem.bytes(), b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(2):
            server = grpc.server(
                stack.enter_context(contextlib.closing(_Pool())).threads, interceptors=[LoadReportInterceptor()]
            )
            port = server.add_secure_port(f"{loopback_host()}:0", grpc.ssl_server_credentials([pair]))
            server.start()
            stack.callback(lambda server=server: server.stop(None).wait())
            addresses.append(f"{loopback_host()}:{port}")
        mesh = stack.enter_context(mesh_to(addresses))
        driver = stack.enter_context(drive("httpx", "asyncio"))
        channel: Any
        if kind == "blocking":
            channel = stack.enter_context(meshlb.grpc.secure_channel("consul:///orders", trusted, mesh=mesh))
        else:

            async def make() -> Any:
                return meshlb.grpc.aio.secure_channel("consul:///orders", trusted, mesh=mesh)

            channel = driver.run(make)
            stack.callback(lambda: driver.run(channel.close))
        mesh.cluster("orders").start().close()  # a call, whose response carries nothing
        eventually(lambda: known(mesh) == set(addresses), timeout=60)


class _Pool:
    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.threads = ThreadPoolExecutor(2)

    def close(self) -> None:
        self.threads.shutdown()


def test_health_checks_will_do(rpc: Any) -> None:
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(2):
            pool = stack.enter_context(contextlib.closing(_Pool()))
            server = grpc.server(pool.threads, interceptors=[LoadReportInterceptor()])
            servicer = health.HealthServicer()
            servicer.set("", health_pb2.HealthCheckResponse.SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
            addresses.append(f"{loopback_host()}:{server.add_insecure_port(f'{loopback_host()}:0')}")
            server.start()
            stack.callback(lambda server=server: server.stop(None).wait())
        probes = Probes(interval=0.02, timeout=30, idle=600, method="/grpc.health.v1.Health/Check")
        mesh = stack.enter_context(mesh_to(addresses, probes))
        stack.enter_context(meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh))
        mesh.cluster("orders").start().close()
        eventually(lambda: known(mesh) == set(addresses), timeout=60)


def test_of_two_adapters_the_one_that_gets_reports_goes_on(asgi: Any) -> None:
    addresses = asgi([Service(), Service()])
    with (
        mesh_to(addresses) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh),  # which these servers do not speak
        httpx.Client(transport=MeshTransport(mesh)) as client,
    ):
        client.get("http://orders/", timeout=30)
        eventually(lambda: known(mesh) == set(addresses), timeout=60)


def test_options_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "meshlb.toml"
    file.write_text('[defaults]\npolicy = {name = "prequal", probes = {rate = 1, path = "/load"}}\n[static]\n')
    with Mesh.from_file(file) as mesh:
        assert mesh.defaults.policy == Prequal(probes=Probes(rate=1, path="/load"))
    file.write_text('[defaults]\npolicy = {name = "prequal", probes = false}\n[static]\n')
    with Mesh.from_file(file) as mesh:
        assert mesh.defaults.policy == Prequal(probes=None)
    file.write_text('[defaults]\npolicy = {name = "prequal", probes = {rat = 1}}\n[static]\n')
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        Mesh.from_file(file)
