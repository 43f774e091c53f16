"""Servers report, clients follow: the middleware and the interceptors on one side, policies on the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import meshlb.grpc
import meshlb.grpc.aio
from meshlb import ClientWeightedRoundRobin, Mesh, Prequal, Retry, ServiceConfig
from meshlb.balancing.prequal import IN_FLIGHT_METRIC
from meshlb.discovery import StaticDiscovery
from meshlb.server import LoadMeter
from meshlb.server.asgi import LoadReportMiddleware
from meshlb.server.grpc import AioLoadReportInterceptor, LoadReportInterceptor
from tests.http.drivers import Driver, drive
from tests.server.asgi_server import serving as serving_asgi
from tests.server.rpc_service import KINDS, Gate
from tests.server.rpc_service import serving as serving_rpc
from tests.support.wait import eventually

COSTS = (0.001, 0.002, 0.001)
"""Seconds of processor time that a request takes on each of three servers: the middle one is half as fast."""

POLICY = ClientWeightedRoundRobin(blackout_period=0, update_period=0.1)


class Metered:
    """A meter whose processor time is what requests are said to cost. So the weights are known to a digit, whatever
    the machine that runs the tests is doing."""

    def __init__(self, cost: float) -> None:
        self.requests = 0
        self.meter = LoadMeter(cpu_time=lambda: self.requests * cost, cores=1)


class AsgiServer(Metered):
    def __init__(self, cost: float, **options: Any) -> None:
        super().__init__(cost)
        self.asked = 0
        self.status = 200
        self.app = LoadReportMiddleware(Starlette(routes=[Route("/", self.answer)]), meter=self.meter, **options)

    async def answer(self, request: Request) -> Response:
        self.requests += 1
        self.asked += "endpoint-load-metrics-format" in request.headers
        return PlainTextResponse("done", self.status)


class RpcServer(Metered):
    def __init__(self, cost: float, style: str) -> None:
        super().__init__(cost)
        self.gate = Gate()
        interceptor: Any = LoadReportInterceptor if style == "sync" else AioLoadReportInterceptor
        self.interceptors = [Counting(self), interceptor(meter=self.meter)]
        if style != "sync":
            self.interceptors[0] = AioCounting(self)


class Counting(grpc.ServerInterceptor):
    def __init__(self, server: RpcServer) -> None:
        self.server = server

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self.server.requests += 1
        return continuation(handler_call_details)


class AioCounting(grpc.aio.ServerInterceptor):
    def __init__(self, server: RpcServer) -> None:
        self.server = server

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self.server.requests += 1
        return await continuation(handler_call_details)


def mesh_to(addresses: list[str], policy: Any = POLICY, **settings: Any) -> Mesh:
    mesh = Mesh(StaticDiscovery({"orders": addresses}), defaults=ServiceConfig(policy=policy, **settings))
    mesh.cluster("orders").wait_ready(5)
    return mesh


def follows(servers: list[Any], call: Callable[[], object]) -> Callable[[], bool]:
    """Whether a hundred calls go 2:1:2. By the weights of the registry they would go 1:1:1."""

    def check() -> bool:
        before = [server.requests for server in servers]
        for _ in range(100):
            call()
        first, slow, last = (server.requests - count for server, count in zip(servers, before, strict=True))
        return 17 <= slow <= 23 and 34 <= first <= 46 and 34 <= last <= 46

    return check


@pytest.fixture(params=[("httpx", "sync"), ("httpx", "trio"), ("httpx2", "asyncio")], ids="-".join)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with drive(*request.param) as driver:
        yield driver


@pytest.fixture
def asgi() -> Iterator[Callable[..., tuple[list[AsgiServer], list[str]]]]:
    with contextlib.ExitStack() as stack:

        def start(costs: tuple[float, ...] = COSTS, **options: Any) -> tuple[list[AsgiServer], list[str]]:
            servers = [AsgiServer(cost, **options) for cost in costs]
            return servers, [stack.enter_context(serving_asgi(server.app)) for server in servers]

        yield start


@pytest.mark.parametrize("form", ["TEXT", "JSON", "BIN"])
def test_a_server_that_reports_twice_the_utilization_gets_half(asgi: Any, form: str):
    servers, addresses = asgi(form=form)
    with drive("httpx", "sync") as driver, mesh_to(addresses) as mesh, driver.client(driver.transport(mesh)) as client:
        headers = {"endpoint-load-metrics-format": form}  # or the transport would ask for its own
        eventually(follows(servers, lambda: client.get("http://orders/", headers=headers)), timeout=30)


def test_every_kind_of_http_client_follows_and_asks(asgi: Any, driver: Driver):
    servers, addresses = asgi(only_when_asked=True)
    with mesh_to(addresses) as mesh, driver.client(driver.transport(mesh)) as client:
        eventually(follows(servers, lambda: client.get("http://orders/")), timeout=30)
    assert all(server.asked == server.requests for server in servers)


def test_nobody_is_asked_for_policies_that_do_not_want_reports(asgi: Any, driver: Driver):
    servers, addresses = asgi(only_when_asked=True)
    with mesh_to(addresses, "round_robin") as mesh, driver.client(driver.transport(mesh)) as client:
        for _ in range(9):
            assert "endpoint-load-metrics" not in client.get("http://orders/").headers
    assert [server.asked for server in servers] == [0, 0, 0]


def test_probes_for_prequal_come_with_responses(asgi: Any, driver: Driver):
    _, addresses = asgi()
    policy = Prequal(max_age=60)
    with mesh_to(addresses, policy) as mesh, driver.client(driver.transport(mesh)) as client:
        picker: Any = mesh.cluster("orders").view.picker
        eventually(lambda: client.get("http://orders/") and len(picker.probes()) >= 2)
        assert all(probe.in_flight >= 0 and 0 < probe.latency < 10 for probe in picker.probes())


def test_who_fails_is_no_candidate_however_idle_he_says_he_is(asgi: Any):
    servers, addresses = asgi()
    servers[0].status = 503
    policy = Prequal(max_age=60, explore=0)
    with (
        drive("httpx", "sync") as driver,
        mesh_to(addresses, policy, breaker=None, retry=Retry(budget=None)) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        picker: Any = mesh.cluster("orders").view.picker
        for _ in range(50):
            assert client.get("http://orders/").status_code == 200
        assert all(probe.replica.endpoint.address != addresses[0] for probe in picker.probes())


def test_a_broken_report_breaks_no_call(asgi: Any):
    async def answer(request: Request) -> Response:
        return PlainTextResponse("done", headers={"endpoint-load-metrics": "BIN ?!"})

    with (
        serving_asgi(Starlette(routes=[Route("/", answer)])) as address,
        drive("httpx", "sync") as driver,
        mesh_to([address]) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        assert client.get("http://orders/").text == "done"


class Failing:
    """A policy of the program's own whose picker fails on reports."""

    name = "failing"
    wants_reports = True

    def build(self, candidates: Any, environment: Any, previous: Any) -> Any:
        self.candidates = candidates
        return self

    def pick(self, call: Any) -> Any:
        return self.candidates[0]

    def observe_report(self, candidate: Any, report: Any) -> None:
        raise RuntimeError("was told to fail")


def test_a_policy_that_fails_on_a_report_breaks_no_call(asgi: Any, caplog: pytest.LogCaptureFixture):
    _, addresses = asgi()
    with (
        drive("httpx", "sync") as driver,
        mesh_to(addresses, Failing()) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        assert client.get("http://orders/").text == "done"
    assert "was told to fail" in caplog.text


# -- gRPC ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rpc() -> Iterator[Callable[..., tuple[list[RpcServer], list[str]]]]:
    with contextlib.ExitStack() as stack:

        def start(style: str) -> tuple[list[RpcServer], list[str]]:
            servers = [RpcServer(cost, style) for cost in COSTS]
            return servers, [
                stack.enter_context(serving_rpc(style, server.gate, *server.interceptors)) for server in servers
            ]

        yield start


def caller(channel: grpc.Channel, way: str, request: bytes = b"ok") -> Callable[[], object]:
    """A call in this way, to its end."""
    kind = {"blocking": "unary_unary", "with_call": "unary_unary", "future": "unary_unary"}.get(way, way)
    method = getattr(channel, kind)(f"/test.Service/{kind}")

    def call() -> object:
        argument: Any = iter([request]) if kind.startswith("stream") else request
        with contextlib.suppress(grpc.RpcError):
            if way == "with_call":
                response, ended = method.with_call(argument, timeout=10)
                assert (response, ended.code()) == (b"done", grpc.StatusCode.OK)
            elif way == "future":
                return method.future(argument, timeout=10).result()
            elif kind.endswith("stream"):
                return list(method(argument, timeout=10))
            else:
                return method(argument, timeout=10)
        return None

    return call


@pytest.mark.parametrize("way", ["blocking", "with_call", "future", *KINDS[1:]])
def test_every_kind_of_grpc_call_follows(rpc: Any, way: str):
    servers, addresses = rpc("sync")
    with mesh_to(addresses) as mesh, meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel:
        eventually(follows(servers, caller(channel, way)), timeout=30)


@pytest.mark.parametrize("way", ["blocking", "future", "unary_stream"])
def test_calls_that_end_with_an_error_report_too(rpc: Any, way: str):
    """NOT_FOUND is no fault of the server's."""
    servers, addresses = rpc("coroutine")
    with mesh_to(addresses) as mesh, meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel:
        eventually(follows(servers, caller(channel, way, b"code")), timeout=30)


@pytest.mark.parametrize("request_", [b"ok", b"code"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_aio_call_follows(rpc: Any, kind: str, request_: bytes):
    servers, addresses = rpc("coroutine")
    with drive("httpx", "asyncio") as driver, mesh_to(addresses) as mesh:
        assert driver.portal is not None

        async def hundred() -> list[int]:
            before = [server.requests for server in servers]
            async with meshlb.grpc.aio.insecure_channel("consul:///orders", mesh=mesh) as channel:
                method = getattr(channel, kind)(f"/test.Service/{kind}")
                for _ in range(100):
                    call = method(iter([request_]) if kind.startswith("stream") else request_, timeout=10)
                    with contextlib.suppress(grpc.RpcError):
                        if kind.endswith("stream"):
                            async for _ in call:
                                pass
                        else:
                            await call
                    await call.code()
            return [server.requests - count for server, count in zip(servers, before, strict=True)]

        def check() -> bool:
            first, slow, last = driver.run(hundred)
            return 17 <= slow <= 23 and 34 <= first <= 46 and 34 <= last <= 46

        eventually(check, timeout=30)


def test_probes_for_prequal_come_with_trailers(rpc: Any):
    servers, addresses = rpc("sync")
    policy = Prequal(max_age=60)
    with (
        mesh_to(addresses, policy) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
        ThreadPoolExecutor(4) as threads,
    ):
        picker: Any = mesh.cluster("orders").view.picker
        wait, ok = caller(channel, "blocking", b"wait"), caller(channel, "blocking")
        waiting = [threads.submit(wait) for _ in range(3)]
        eventually(lambda: sum(server.gate.waiting for server in servers) == 3)
        eventually(lambda: ok() and max(probe.in_flight for probe in picker.probes()) >= 1)
        assert {probe.replica.endpoint.address for probe in picker.probes()} <= set(addresses)
        for server in servers:
            server.gate.open()
        assert all(future.result(10) == b"done" for future in waiting)
    assert servers[0].meter.report().named_metrics[IN_FLIGHT_METRIC] == 0
