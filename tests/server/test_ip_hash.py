"""``ip_hash`` through a service: its caller's address decides which instance of the next service it calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import AsyncMeshTransport, MeshTransport
from meshlb.server.asgi import LoadReportMiddleware
from meshlb.server.grpc import AioLoadReportInterceptor, LoadReportInterceptor
from tests.server.asgi_server import serving
from tests.support.backends import Backend, http_backends
from tests.support.ports import loopback_host

CALLERS = [f"203.0.113.{number}" for number in range(30)]


@pytest.fixture(scope="module")
def backends() -> Iterator[list[Backend]]:
    with http_backends(4) as backends:
        yield backends


@pytest.fixture
def mesh(backends: list[Backend]) -> Iterator[Mesh]:
    orders = [backend.address for backend in backends]
    with Mesh(StaticDiscovery({"orders": orders}), defaults=ServiceConfig(policy="ip_hash")) as mesh:
        yield mesh


def belongs(backends: list[Backend], address: str) -> str:
    """Where the calls of a caller go, as another process would find out."""
    names = {backend.address: backend.id for backend in backends}
    orders = [backend.address for backend in backends]
    with Mesh(StaticDiscovery({"orders": orders}), defaults=ServiceConfig(policy="ip_hash")) as mesh:
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        with cluster.lease(key=address) as lease:
            return names[lease.endpoint.address]


@pytest.mark.parametrize("path", ["/async", "/blocking"])
def test_through_an_asgi_service(backends: list[Backend], mesh: Mesh, path: str):
    sync_client = httpx.Client(transport=MeshTransport(mesh))
    async_client = httpx.AsyncClient(transport=AsyncMeshTransport(mesh))

    async def calls_async(request: Request) -> Response:
        await asyncio.sleep(0)
        responses = await asyncio.gather(*(async_client.get("http://orders/") for _ in range(2)))
        return PlainTextResponse(" ".join(response.headers["x-backend"] for response in responses))

    def calls_blocking(request: Request) -> Response:
        names = [sync_client.get("http://orders/").headers["x-backend"] for _ in range(2)]
        return PlainTextResponse(" ".join(names))

    routes = [Route("/async", calls_async), Route("/blocking", calls_blocking)]
    app = LoadReportMiddleware(Starlette(routes=routes), trusted_proxies=1)
    with serving(app) as address, httpx.Client(base_url=f"http://{address}", trust_env=False) as client, sync_client:

        def answer(caller: str | None) -> set[str]:
            headers = {} if caller is None else {"x-forwarded-for": f"1.1.1.1, {caller}"}
            return set(client.get(path, headers=headers).text.split())

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(answer, CALLERS))
        assert answers == [{belongs(backends, caller)} for caller in CALLERS]
        assert len(set.union(*answers)) > 1
        assert answer(None) == {belongs(backends, "127.0.0.1")}
    asyncio.run(async_client.aclose())


@pytest.mark.parametrize("aio", [False, True])
def test_through_a_grpc_service(backends: list[Backend], mesh: Mesh, aio: bool):
    with httpx.Client(transport=MeshTransport(mesh)) as client, ThreadPoolExecutor(4) as pool:

        def handler(request: bytes, context: Any) -> bytes:
            return client.get("http://orders/").headers["x-backend"].encode()

        methods = {"Call": grpc.unary_unary_rpc_method_handler(handler)}
        generic = grpc.method_handlers_generic_handler("test.Front", methods)
        with front(pool, generic, aio=aio) as address, grpc.insecure_channel(address) as channel:
            call = channel.unary_unary("/test.Front/Call")

            def answer(caller: str) -> str:
                return call(b"", metadata=(("x-forwarded-for", caller),), timeout=20).decode()

            with ThreadPoolExecutor(4) as threads:
                answers = list(threads.map(answer, CALLERS))
            assert answers == [belongs(backends, caller) for caller in CALLERS]
            assert len(set(answers)) > 1


@contextlib.contextmanager
def front(pool: ThreadPoolExecutor, handler: Any, *, aio: bool) -> Iterator[str]:
    """Serve until the block ends; gives host:port."""
    if not aio:
        server = grpc.server(pool, [handler], [LoadReportInterceptor(trusted_proxies=1)])
        port = server.add_insecure_port(f"{loopback_host()}:0")
        server.start()
        yield f"{loopback_host()}:{port}"
        server.stop(None).wait()
        return

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server(pool, [handler], [AioLoadReportInterceptor(trusted_proxies=1)])
        port = server.add_insecure_port(f"{loopback_host()}:0")
        await server.start()
        return server, port

    with start_blocking_portal("asyncio") as portal:
        aio_server, port = portal.call(start)
        yield f"{loopback_host()}:{port}"
        portal.call(aio_server.stop, None)
