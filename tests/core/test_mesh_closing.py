"""Closing a mesh, and dropping it."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import anyio
import pytest

from meshlb import (
    Cluster,
    Lease,
    Mesh,
    MeshClosed,
    control,
)
from meshlb.discovery import ServiceQuery, Sink, StaticDiscovery
from tests.core.parts import endpoint
from tests.support.leaks import running_threads
from tests.support.wait import eventually, eventually_async


def static(*names: str) -> StaticDiscovery:
    return StaticDiscovery({name: [endpoint(0), endpoint(1)] for name in names or ("orders",)})


class Discovery:
    """Whatever a test's own discovery does not say otherwise: knows nobody, reports nothing."""

    closed = 0

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        await asyncio.sleep(3600)

    async def aclose(self) -> None:
        self.closed += 1

    def knows(self, service: str) -> bool:
        return False


# -- closing


def test_closing_ends_everything_and_again_is_nothing() -> None:
    discovery = Discovery()
    mesh = Mesh(discovery)
    cluster = mesh.cluster("orders")
    mesh.close()
    mesh.close()
    assert mesh.closed
    assert cluster.closed
    assert discovery.closed == 1
    with pytest.raises(MeshClosed):
        mesh.cluster("orders").start()
    for name in ("stock", "users"):
        with pytest.raises(MeshClosed, match=name):
            mesh.cluster(name)
    with pytest.raises(MeshClosed):
        mesh.find("stock")
    assert not mesh.call_soon(print)


async def test_closing_from_a_task() -> None:
    discovery = Discovery()
    async with Mesh(discovery) as mesh:
        mesh.cluster("orders")
    await mesh.aclose()
    assert discovery.closed == 1
    assert control._current is None
    async with Mesh(static()):
        pass


class Stubborn(Discovery):
    """A watch that does not let itself be cancelled, and a close that never ends."""

    def __init__(self) -> None:
        self.release = threading.Event()

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        sink.update([endpoint(0)])
        await self._endless()

    async def aclose(self) -> None:
        await self._endless()

    async def _endless(self) -> None:
        while not self.release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass


@pytest.mark.parametrize("services", [1, 5])
def test_closing_does_not_wait_for_a_watch_that_ignores_it(services: int, caplog: pytest.LogCaptureFixture) -> None:
    discovery = Stubborn()
    mesh = Mesh(discovery)
    for number in range(services):
        mesh.cluster(f"s{number}").wait_ready(5)
    began = time.monotonic()
    mesh.close()
    took = time.monotonic() - began
    assert took < control.CLOSE_TIMEOUT + 2  # not a matter of speed: it would be five seconds, or for ever
    discovery.release.set()
    eventually(lambda: not running_threads())
    assert "did not end in time" in caplog.text


async def test_closing_from_a_task_does_not_wait_for_it_either() -> None:
    discovery = Stubborn()
    mesh = Mesh(discovery)
    await mesh.cluster("orders").wait_ready_async(5)
    with anyio.fail_after(control.CLOSE_TIMEOUT + 5):
        await mesh.aclose()
    discovery.release.set()
    await eventually_async(lambda: not running_threads())


def test_closing_does_not_wait_for_a_watch_that_blocks_the_control_loop() -> None:
    blocked, release = threading.Event(), threading.Event()

    class Blocking(Discovery):
        async def watch(self, query: ServiceQuery, sink: Sink) -> None:
            blocked.set()
            release.wait(30)

    discovery = Blocking()
    mesh = Mesh(discovery)
    mesh.cluster("orders")
    assert blocked.wait(5)
    began = time.monotonic()
    mesh.close()
    assert time.monotonic() - began < control.CLOSE_TIMEOUT + 2
    release.set()
    eventually(lambda: not running_threads())
    assert discovery.closed == 1  # the rest has followed by itself


def test_a_cancelled_close_goes_on_by_itself() -> None:
    discovery = Discovery()
    mesh = Mesh(discovery)
    mesh.cluster("orders")

    async def main() -> None:
        with anyio.move_on_after(0):
            await mesh.aclose()

    anyio.run(main)
    eventually(lambda: discovery.closed == 1)
    eventually(lambda: not running_threads())


def test_closing_on_the_control_loops_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLOSE_TIMEOUT", 3600)  # it must not wait for itself
    discovery = Discovery()
    mesh = Mesh(discovery)
    mesh.cluster("orders")
    assert mesh.call_soon(mesh.close)
    eventually(lambda: discovery.closed == 1)
    eventually(lambda: not running_threads())


def test_a_watch_that_closes_its_own_mesh() -> None:
    class Suicidal(Discovery):
        mesh: Mesh

        async def watch(self, query: ServiceQuery, sink: Sink) -> None:
            await self.mesh.aclose()
            await asyncio.sleep(3600)

    discovery = Suicidal()
    discovery.mesh = Mesh(discovery)
    with pytest.raises(MeshClosed):
        discovery.mesh.cluster("orders").start(patient=True)
    eventually(lambda: discovery.closed == 1)
    eventually(lambda: not running_threads())


def test_another_mesh_keeps_the_control_loop() -> None:
    shared = static("orders", "stock")
    with Mesh(shared) as first, Mesh(shared) as second:
        a, b = first.cluster("orders"), second.cluster("orders")
        for cluster in (a, b):
            cluster.wait_ready(5)
        assert len(shared._watches) == 2
        first.close()
        eventually(lambda: len(shared._watches) == 1)
        shared.update("orders", [endpoint(7)])
        assert [node.endpoint for node in b.nodes] == [endpoint(7)]
        assert a.nodes == ()
    assert shared._watches == []


def test_closing_while_threads_start_leases() -> None:
    for _ in range(5):
        mesh = Mesh(static())
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        go = threading.Barrier(33)
        wrong: list[object] = []

        def call(cluster: Cluster = cluster, go: threading.Barrier = go, wrong: list[object] = wrong) -> None:
            go.wait()
            while True:
                try:
                    with cluster.lease() as lease:
                        if not isinstance(lease, Lease):
                            wrong.append(lease)
                except MeshClosed:
                    return
                except BaseException as error:
                    wrong.append(error)
                    return

        threads = [threading.Thread(target=call) for _ in range(32)]
        for thread in threads:
            thread.start()
        nodes = cluster.nodes
        go.wait()
        mesh.close()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert [node.in_flight for node in nodes] == [0, 0]


def test_threads_that_close_together_all_find_it_closed() -> None:
    discovery = Discovery()
    mesh = Mesh(discovery)
    mesh.cluster("orders")
    closed: list[int] = []

    def close() -> None:
        mesh.close()
        closed.append(discovery.closed)

    threads = [threading.Thread(target=close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert closed == [1] * 8


# -- dropping


def dropped(mesh: Mesh) -> weakref.ref[Mesh]:
    return weakref.ref(mesh)


@pytest.mark.parametrize("shared", [False, True], ids=["own loop", "shared loop"])
def test_a_mesh_dropped_without_close_ends_by_itself(shared: bool) -> None:
    other = Mesh(static())
    if shared:
        other.cluster("orders").wait_ready(5)
    discovery = Discovery()
    mesh = Mesh(discovery)
    cluster = mesh.cluster("orders")
    cluster.update([endpoint(0), endpoint(1)])
    cluster.start().close()
    held = cluster.start()
    cluster.update([endpoint(1)])  # one that drains, with a timer of its own
    held.close()
    reference = weakref.ref(mesh)
    del mesh, cluster, held

    def gone() -> bool:
        gc.collect()
        return reference() is None

    eventually(gone)
    eventually(lambda: discovery.closed == 1)
    other.close()
    eventually(lambda: not running_threads())


def test_whoever_has_a_cluster_keeps_its_mesh() -> None:
    discovery = static()
    cluster = Mesh(discovery).cluster("orders")
    cluster.wait_ready(5)
    gc.collect()
    discovery.update("orders", [endpoint(9)])
    assert cluster.start().endpoint == endpoint(9)
    assert isinstance(cluster._background, Mesh)
    cluster._background.close()


def test_a_program_that_ends_without_closing() -> None:
    program = """
        import meshlb, threading
        from meshlb.discovery import StaticDiscovery
        mesh = meshlb.Mesh(StaticDiscovery({"orders": ["127.0.0.1:80"]}))
        mesh.cluster("orders").wait_ready(5)
        lease = mesh.cluster("orders").start()
        print("end", threading.active_count())
    """
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("end 2\n", "", 0)


def test_the_level_of_an_ordinary_life_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "meshlb"), Mesh(static()) as mesh:
        mesh.cluster("orders").wait_ready(5)
        with mesh.cluster("orders").lease():
            pass
    assert caplog.records == []
