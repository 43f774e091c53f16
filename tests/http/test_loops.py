"""One async transport on several event loops: at once, one after the other, asyncio and trio."""

from __future__ import annotations

import asyncio
import gc
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import anyio
import pytest

from tests.http.drivers import in_flight, mesh_of
from tests.support.backends import Backend
from tests.support.leaks import open_files
from tests.support.wait import eventually


@pytest.fixture
def module(package: str) -> ModuleType:
    return importlib.import_module(package)


@pytest.fixture
def adapter(package: str) -> ModuleType:
    return importlib.import_module(f"meshlb.{package}")


async def _call(client: Any, times: int = 3) -> None:
    for _ in range(times):
        assert (await client.get("http://orders/")).status_code == 200


def test_loops_in_several_threads_at_once(module: ModuleType, adapter: ModuleType, backends: list[Backend]):
    with mesh_of(*backends, policy="round_robin") as mesh:
        transport = adapter.AsyncMeshTransport(mesh)
        client = module.AsyncClient(transport=transport)
        barrier = threading.Barrier(4)

        async def main() -> None:
            await anyio.to_thread.run_sync(barrier.wait)
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(_call, client)

        with ThreadPoolExecutor(4) as pool:
            kinds = ["asyncio", "trio", "asyncio", "trio"]
            for done in [pool.submit(anyio.run, main, backend=kind) for kind in kinds]:
                done.result()
        assert in_flight(mesh) == 0
        assert sum(node.calls for node in mesh.cluster("orders").nodes) == 4 * 8 * 3
        assert transport._loops == {}, "each went with its loop"
        anyio.run(client.aclose)


def test_loops_one_after_the_other(module: ModuleType, adapter: ModuleType, backends: list[Backend]):
    """As with asyncio.run for each task, or a loop for each test. Bare httpx: "Event loop is closed"."""
    with mesh_of(backends[0]) as mesh:
        transport = adapter.AsyncMeshTransport(mesh)
        client = module.AsyncClient(transport=transport)
        anyio.run(_call, client)
        before = open_files()
        for kind in ("asyncio", "trio", "asyncio", "trio"):
            anyio.run(_call, client, backend=kind)
            anyio.run(_call_direct, client, backends[1].url, backend=kind)
        assert transport._loops == {}
        assert open_files() == before
        anyio.run(client.aclose)
        with pytest.raises(RuntimeError, match="has been closed"):
            anyio.run(_call, client)


async def _call_direct(client: Any, url: str) -> None:
    assert (await client.get(url)).status_code == 200


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # the loop is closed under its connections, on purpose
def test_loop_that_is_closed_without_being_shut_down(module: ModuleType, adapter: ModuleType, backends: list[Backend]):
    with mesh_of(backends[0]) as mesh:
        transport = adapter.AsyncMeshTransport(mesh)
        client = module.AsyncClient(transport=transport)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(_call(client))
        loop.close()
        assert list(transport._loops) == [loop]
        anyio.run(_call, client)
        assert transport._loops == {}
        anyio.run(client.aclose)
        gc.collect()


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_closing_from_one_loop_closes_what_others_hold(
    module: ModuleType, adapter: ModuleType, backends: list[Backend], kind: str
):
    with mesh_of(backends[0]) as mesh:
        client = module.AsyncClient(transport=adapter.AsyncMeshTransport(mesh))
        called, closed = threading.Event(), threading.Event()
        inner: list[Any] = []

        async def stay() -> None:
            await _call(client)
            entries = client._transport._loops.values()
            inner.extend(resource.transport for entry in entries for resource in _inner(entry))
            called.set()
            await anyio.to_thread.run_sync(closed.wait, 10)
            for _ in range(1000):
                if all(not transport._pool.connections for transport in inner):
                    return
                await anyio.sleep(0.01)
            raise AssertionError("still open")

        with ThreadPoolExecutor(1) as pool:
            staying = pool.submit(anyio.run, stay, backend=kind)
            assert called.wait(10)
            assert inner
            anyio.run(client.aclose)
            anyio.run(client.aclose)
            closed.set()
            staying.result()
        assert in_flight(mesh) == 0


def _inner(entry: Any) -> list[Any]:
    return [inner for route in entry.pools._routes.values() for inner in route.resources._live.values()]


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_endpoint_that_leaves_is_closed_on_its_loop(
    module: ModuleType, adapter: ModuleType, backends: list[Backend], kind: str
):
    with mesh_of(*backends[:2]) as mesh:

        async def main() -> None:
            async with module.AsyncClient(transport=adapter.AsyncMeshTransport(mesh)) as client:
                await _call(client)
                (gone,) = [inner.transport for entry in client._transport._loops.values() for inner in _inner(entry)]
                assert gone._pool.connections
                mesh.discovery.update("orders", [backends[1].address])
                while gone._pool.connections:
                    await anyio.sleep(0.01)
                await _call(client)

        anyio.run(main, backend=kind)
        assert backends[1].requests() == 3
        assert in_flight(mesh) == 0


def test_transport_that_is_dropped_unclosed(module: ModuleType, adapter: ModuleType, backends: list[Backend]):
    with mesh_of(backends[0]) as mesh:

        async def drop() -> None:
            await _call(module.AsyncClient(transport=adapter.AsyncMeshTransport(mesh)))

        async def main() -> None:
            await drop()
            before = open_files()
            for _ in range(5):
                await drop()
            gc.collect()
            while open_files() > before:
                gc.collect()
                await anyio.sleep(0.01)

        anyio.run(main)
        eventually(lambda: not mesh.cluster("orders")._listeners)


def test_trio_as_a_guest_of_asyncio(module: ModuleType, adapter: ModuleType, backends: list[Backend]):
    """One thread, two loops: each request has the connections of the loop that it is made on."""
    outcome: Any = None
    with mesh_of(*backends) as mesh:
        transport = adapter.AsyncMeshTransport(mesh)

        async def host() -> None:
            import trio

            loop, done = asyncio.get_running_loop(), asyncio.Event()
            tokens = []

            async def guest() -> None:
                await _call(module.AsyncClient(transport=transport))
                tokens.append(trio.lowlevel.current_trio_token())
                assert set(transport._loops) == {loop, *tokens}

            def finished(result: Any) -> None:
                nonlocal outcome
                outcome = result
                done.set()

            async with module.AsyncClient(transport=transport) as client:
                await _call(client)
                assert set(transport._loops) == {loop}
                trio.lowlevel.start_guest_run(
                    guest, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=finished
                )
                await done.wait()
                await _call(client)

        asyncio.run(host())
        outcome.unwrap()
        assert in_flight(mesh) == 0
        assert transport._loops == {}, "each went with its loop"


def test_outside_of_any_loop_there_is_none(adapter: ModuleType):
    with mesh_of() as mesh:
        find = adapter.AsyncMeshTransport(mesh)._running_loop
        with pytest.raises(RuntimeError):
            find()

        async def same() -> bool:
            return find() is asyncio.get_running_loop()

        assert asyncio.run(same())
        with pytest.raises(RuntimeError):
            find()
