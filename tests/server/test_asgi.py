"""The ASGI middleware on a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from meshlb import ConfigError
from meshlb.affinity import current_caller_address
from meshlb.balancing.orca import LoadReport, report_in
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC
from meshlb.server import LoadMeter
from meshlb.server.asgi import LoadReportMiddleware
from meshlb.testing import FakeClock
from tests.server.asgi_server import serving
from tests.support.wait import eventually


class Service:
    """A Starlette application behind the middleware, and a client of it."""

    def __init__(self, **options: Any) -> None:
        self.release = asyncio.Event()
        routes = [
            Route("/status/{status:int}", self.status),
            Route("/wait", self.wait),
            Route("/stream", self.stream),
            Route("/own", self.own),
            Route("/crash", self.crash),
            Route("/caller", self.caller),
            Route("/caller/blocking", self.caller_blocking),
        ]
        self.app = LoadReportMiddleware(Starlette(routes=routes), **options)
        self.meter = self.app.meter
        self.client: httpx.Client
        self.loop: asyncio.AbstractEventLoop | None = None

    async def status(self, request: Request) -> Response:
        return PlainTextResponse("done", request.path_params["status"])

    async def wait(self, request: Request) -> Response:
        self.loop = asyncio.get_running_loop()
        await self.release.wait()
        return PlainTextResponse("done")

    async def stream(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"first"
            self.loop = asyncio.get_running_loop()
            await self.release.wait()
            yield b"last"

        return StreamingResponse(pieces())

    async def own(self, request: Request) -> Response:
        return PlainTextResponse("done", headers={"Endpoint-Load-Metrics": "TEXT cpu_utilization=0.9"})

    async def crash(self, request: Request) -> Response:
        raise RuntimeError("was told to crash")

    async def caller(self, request: Request) -> Response:
        await asyncio.sleep(0)
        return PlainTextResponse(str(current_caller_address()))

    def caller_blocking(self, request: Request) -> Response:
        return PlainTextResponse(str(current_caller_address()))

    def let_go(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.release.set)

    def report(self, path: str = "/status/200", **headers: str) -> LoadReport:
        report = report_in(self.client.get(path, headers=headers).headers)
        assert report is not None
        return report


@pytest.fixture
def serve() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Service:
            service = Service(**options)
            address = stack.enter_context(serving(service.app))
            service.client = stack.enter_context(httpx.Client(base_url=f"http://{address}", trust_env=False))
            return service

        yield start


def test_every_response_reports_in_flight_and_latency(serve: Any):
    service = serve()
    report = service.report()
    assert report.named_metrics[IN_FLIGHT_METRIC] == 0
    assert 0 < report.named_metrics[LATENCY_METRIC] < 5
    assert service.client.get("/status/404").headers["endpoint-load-metrics"].startswith("TEXT ")


def test_others_in_flight_are_counted(serve: Any):
    service = serve()
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(service.client.get, "/wait") for _ in range(4)]
        eventually(lambda: service.meter.in_flight == 4)
        assert service.report().named_metrics[IN_FLIGHT_METRIC] == 4
        service.let_go()
        reports = [report_in(future.result().headers) for future in waiting]
        assert all(report is not None and 0 <= report.named_metrics[IN_FLIGHT_METRIC] <= 3 for report in reports)
    eventually(lambda: service.meter.in_flight == 0)


def test_rates_utilization_and_errors(serve: Any):
    clock = FakeClock()
    cpu = 0.0
    service = serve(meter=LoadMeter(clock=clock, cpu_time=lambda: cpu, cores=2, application_utilization=lambda: 0.75))
    for path in ("/status/200", "/status/404", "/status/503", "/status/429"):
        assert service.client.get(path).status_code
    assert service.client.get("/crash").status_code == 500
    eventually(lambda: service.meter.in_flight == 0)
    clock.advance(2)
    cpu = 1.0
    report = service.report()
    assert report.rps_fractional == pytest.approx(5 / 2)
    assert report.eps == pytest.approx(3 / 2)  # 503, 429 and the crash
    assert report.cpu_utilization == pytest.approx(1.0 / 2 / 2)
    assert report.application_utilization == 0.75


@pytest.mark.parametrize("form", ["TEXT", "JSON", "BIN"])
def test_the_form_is_as_configured_unless_a_request_asks_for_another(serve: Any, form: Any):
    service = serve(form=form)
    assert service.client.get("/status/200").headers["endpoint-load-metrics"].startswith(f"{form} ")
    for asked in ("TEXT", "JSON", "BIN"):
        response = service.client.get("/status/200", headers={"endpoint-load-metrics-format": asked.lower()})
        assert response.headers["endpoint-load-metrics"].startswith(f"{asked} ")
        assert report_in(response.headers) is not None
    strange = service.client.get("/status/200", headers={"endpoint-load-metrics-format": "XML"})
    assert strange.headers["endpoint-load-metrics"].startswith(f"{form} ")


def test_only_who_asks_gets_a_report_if_so_configured(serve: Any):
    service = serve(only_when_asked=True)
    assert "endpoint-load-metrics" not in service.client.get("/status/200").headers
    assert service.report(**{"endpoint-load-metrics-format": "TEXT"}).named_metrics


def test_the_applications_own_report_stays(serve: Any):
    service = serve()
    assert service.client.get("/own").headers.get_list("endpoint-load-metrics") == ["TEXT cpu_utilization=0.9"]


def test_a_crash_is_answered_with_a_report(serve: Any):
    service = serve()
    response = service.client.get("/crash")
    assert response.status_code == 500
    report = report_in(response.headers)
    assert report is not None
    assert LATENCY_METRIC not in report.named_metrics  # how fast it crashes is nothing to go by


def test_a_stream_is_in_flight_until_its_end(serve: Any):
    service = serve()
    with service.client.stream("GET", "/stream") as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"first"
        assert service.meter.in_flight == 1
        assert service.report().named_metrics[IN_FLIGHT_METRIC] == 1
        eventually(lambda: service.loop)
        service.let_go()
        assert next(chunks) == b"last"
    eventually(lambda: service.meter.in_flight == 0)


def test_a_client_that_goes_away_leaves_nothing_in_flight(serve: Any):
    service = serve()
    with service.client.stream("GET", "/stream") as response:
        assert next(response.iter_raw()) == b"first"
    eventually(lambda: service.meter.in_flight == 0)


@pytest.mark.parametrize("path", ["/caller", "/caller/blocking"])
def test_the_caller_is_who_connects(serve: Any, path: str):
    service = serve()
    assert service.client.get(path, headers={"x-forwarded-for": "203.0.113.7"}).text == "127.0.0.1"


@pytest.mark.parametrize("path", ["/caller", "/caller/blocking"])
def test_the_caller_is_whom_a_trusted_proxy_names(serve: Any, path: str):
    service = serve(trusted_proxies=1)
    assert service.client.get(path, headers={"x-forwarded-for": "1.1.1.1, 203.0.113.7"}).text == "203.0.113.7"
    assert service.client.get(path).text == "127.0.0.1"


def test_another_header_may_name_the_caller(serve: Any):
    service = serve(trusted_proxies=1, forwarded_header="X-Real-IP")
    assert service.client.get("/caller", headers={"x-real-ip": "2001:db8::7"}).text == "2001:db8::7"


def test_requests_side_by_side_have_their_own_callers(serve: Any):
    service = serve(trusted_proxies=1)
    addresses = [f"203.0.113.{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        seen = threads.map(lambda at: service.client.get("/caller", headers={"x-forwarded-for": at}).text, addresses)
        assert list(seen) == addresses


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_other_protocols_pass_and_websockets_have_a_caller_too():
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], current_caller_address()))

    middleware = LoadReportMiddleware(app)
    for scope in (
        {"type": "lifespan"},
        {"type": "websocket", "client": ("203.0.113.7", 1), "headers": []},
        {"type": "websocket", "client": None, "headers": []},
        {"type": "websocket", "headers": []},
    ):
        await middleware(scope, None, None)  # type: ignore[arg-type]  # it calls neither
    assert seen == [("lifespan", None), ("websocket", "203.0.113.7"), ("websocket", None), ("websocket", None)]
    assert middleware.meter.in_flight == 0
    assert current_caller_address() is None


async def test_a_cancelled_request_ends():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.get_running_loop().create_future()

    middleware = LoadReportMiddleware(app)
    task = asyncio.create_task(middleware({"type": "http", "headers": []}, None, None))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert middleware.meter.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert middleware.meter.in_flight == 0


@pytest.mark.parametrize("options", [{"form": "XML"}, {"trusted_proxies": -1}, {"forwarded_header": ""}])
def test_wrong_settings_are_named(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LoadReportMiddleware(None, **options)  # type: ignore[arg-type]  # it gets no further
