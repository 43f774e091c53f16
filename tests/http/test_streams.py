"""A response holds its endpoint's lease until it is closed, however that comes about."""

from __future__ import annotations

import gc
from typing import Any

import anyio
import pytest

from meshlb import Endpoint
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.http.raw_server import RawServer, answering, wait_for_close
from tests.support.backends import Backend
from tests.support.wait import eventually

_HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"


def test_lease_lasts_until_the_body_is_read(driver: Driver, backends: list[Backend]):
    backends[0].behave(chunks=4)
    with mesh_of(backends[0]) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.stream("GET", "http://orders/bytes?size=4000")
        node = mesh.cluster("orders").nodes[0]
        assert (in_flight(mesh), node.successes) == (1, 0)
        assert node.oldest_wait(mesh.clock()) == 0, "it has answered: nobody waits for it any more"
        assert node.latency.has_history, "the latency is the time to the headers"
        assert driver.read(response) == b"x" * 4000
        assert (in_flight(mesh), node.successes) == (0, 1)
        driver.close(response)
        assert node.successes == 1


def test_early_close_is_the_callers_right(driver: Driver, backends: list[Backend]):
    limits = driver.module.Limits(max_connections=2)
    timeout = driver.module.Timeout(5, pool=1)
    with (
        mesh_of(backends[0]) as mesh,
        driver.client(driver.transport(mesh, limits=limits), timeout=timeout) as client,
    ):
        for _ in range(4):
            unread = client.stream("GET", "http://orders/bytes?size=50000000")
            driver.close(unread)
            driver.close(unread)
        node = mesh.cluster("orders").nodes[0]
        assert (node.successes, node.failures, in_flight(mesh)) == (4, 0, 0)


@pytest.mark.parametrize("kind", ["sync", "asyncio"])  # on trio, httpx's own streams warn when their reader stops early
def test_close_in_the_middle_of_the_body(driver: Driver, backends: list[Backend]):
    with RawServer(answering(_HALF, then=wait_for_close)) as server, mesh_of(Endpoint.parse(server.address)) as mesh:
        with driver.client(driver.transport(mesh)) as client:
            response = client.stream("GET", "http://orders/")
            assert driver.first_chunk(response) == b"half"
            driver.run(response.chunks.aclose if driver.is_async else response.chunks.close)
            driver.close(response)
            node = mesh.cluster("orders").nodes[0]
            assert (node.successes, node.failures, in_flight(mesh)) == (1, 0, 0)
        eventually(lambda: not server.open_connections())


def test_failure_in_the_middle_of_a_streamed_body(driver: Driver):
    with (
        RawServer(answering(_HALF)) as server,
        mesh_of(Endpoint.parse(server.address)) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        response = client.stream("GET", "http://orders/")
        with pytest.raises(driver.module.RemoteProtocolError) as caught:
            driver.read(response)
        assert str(caught.value.request.url) == "http://orders/"
        node = mesh.cluster("orders").nodes[0]
        assert (node.failures, in_flight(mesh)) == (1, 0), "as soon as it happens"
        driver.close(response)
        assert (node.failures, node.successes, in_flight(mesh)) == (1, 0, 0)


def test_response_that_is_dropped_unclosed(driver: Driver, backends: list[Backend]):
    """Its lease comes back; a blocking client's connection as well, or the pool would run dry."""
    limits = driver.module.Limits(max_connections=1)
    timeout = driver.module.Timeout(5, pool=3)
    with (
        mesh_of(backends[0]) as mesh,
        driver.client(driver.transport(mesh, limits=limits), timeout=timeout) as client,
    ):

        def drop() -> None:
            assert client.stream("GET", "http://orders/bytes?size=50000000").status_code == 200

        drop()
        eventually(lambda: gc.collect() >= 0 and in_flight(mesh) == 0)
        node = mesh.cluster("orders").nodes[0]
        assert (node.ignored, node.failures) == (1, 0)
        if not driver.is_async:
            assert client.get("http://orders/").status_code == 200


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
class TestCancellation:
    def test_while_waiting_for_the_response(self, driver: Driver, backends: list[Backend]):
        backends[0].behave(hang=True)

        async def main(client: Any) -> None:
            with anyio.move_on_after(0.2) as scope:
                await client.get("http://orders/")
            assert scope.cancelled_caught

        with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh), timeout=60) as client:
            driver.run(main, client.client)
            node = mesh.cluster("orders").nodes[0]
            assert (node.ignored, node.failures, in_flight(mesh)) == (1, 0, 0)
            assert backends[1].requests() == 0
            backends[0].behave()
            assert client.get("http://orders/").status_code == 200

    def test_while_the_body_is_read(self, driver: Driver):
        async def main(client: Any) -> None:
            async with client.stream("GET", "http://orders/") as response:
                with anyio.move_on_after(0.2) as scope:
                    await response.aread()
            assert scope.cancelled_caught

        with (
            RawServer(answering(_HALF, then=wait_for_close)) as server,
            mesh_of(Endpoint.parse(server.address)) as mesh,
            driver.client(driver.transport(mesh)) as client,
        ):
            driver.run(main, client.client)
            node = mesh.cluster("orders").nodes[0]
            assert (node.ignored, node.failures, in_flight(mesh)) == (1, 0, 0)

    def test_while_pausing_before_another_attempt(self, driver: Driver, backends: list[Backend]):
        backends[0].behave(status=429, headers={"retry-after": "20"})

        async def main(client: Any) -> None:
            with anyio.move_on_after(0.3) as scope:
                await client.get("http://orders/")
            assert scope.cancelled_caught

        with mesh_of(backends[0]) as mesh, driver.client(driver.transport(mesh)) as client:
            driver.run(main, client.client)
            node = mesh.cluster("orders").nodes[0]
            assert (node.overloads, in_flight(mesh)) == (1, 0)

    def test_while_waiting_for_discovery(self, driver: Driver):
        from meshlb import Mesh

        class Never:
            async def watch(self, query: Any, sink: Any) -> None:
                await anyio.sleep_forever()

            async def aclose(self) -> None: ...

            def knows(self, service: str) -> bool:
                return False

        async def main(client: Any) -> None:
            with anyio.move_on_after(0.2) as scope:
                await client.get("http://orders/")
            assert scope.cancelled_caught

        with Mesh(Never()) as mesh, driver.client(driver.transport(mesh)) as client:
            driver.run(main, client.client)


@pytest.mark.parametrize("kind", ["sync"])
def test_keyboard_interrupt_is_nobodys_fault(driver: Driver):
    module = driver.module

    def interrupted(request: Any) -> Any:
        raise KeyboardInterrupt

    def body() -> Any:
        yield b"half"
        raise KeyboardInterrupt

    with mesh_of(Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 1)) as mesh:
        transport = driver.transport(mesh, transport_factory=lambda endpoint: module.MockTransport(interrupted))
        with driver.client(transport) as client, pytest.raises(KeyboardInterrupt):
            client.get("http://orders/")
        transport = driver.transport(
            mesh,
            transport_factory=lambda endpoint: module.MockTransport(
                lambda request: module.Response(200, content=body())
            ),
        )
        with driver.client(transport) as client, pytest.raises(KeyboardInterrupt):
            client.get("http://orders/")
        node = mesh.cluster("orders").nodes[0]
        assert (node.ignored, node.failures, in_flight(mesh)) == (2, 0, 0)


def test_factory_that_fails_is_no_endpoints_fault(driver: Driver):
    def factory(endpoint: Endpoint) -> Any:
        raise ZeroDivisionError

    with mesh_of(Endpoint("10.0.0.1", 1)) as mesh:
        transport = driver.transport(mesh, transport_factory=factory)
        with driver.client(transport) as client, pytest.raises(ZeroDivisionError):
            client.get("http://orders/")
        node = mesh.cluster("orders").nodes[0]
        assert (node.ignored, node.failures, in_flight(mesh)) == (1, 0, 0)
