"""The life of a transport: close, the pools of endpoints that come, go and idle, threads, fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshlb import Mesh
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.support.backends import Backend
from tests.support.leaks import open_files
from tests.support.processes import REPO
from tests.support.wait import eventually


def _open_files(mesh: Mesh) -> int:
    """File descriptors of this process, the control loop's included."""
    mesh.cluster("orders").wait_ready(5)
    return open_files()


def test_closing(driver: Driver, backends: list[Backend]):
    with mesh_of(backends[0]) as mesh:
        before = _open_files(mesh)
        transport = driver.transport(mesh)
        with driver.client(transport) as client:
            client.get("http://orders/")
            client.get(backends[1].url)
            assert open_files() > before
        assert open_files() == before
        driver.run(transport.aclose if driver.is_async else transport.close)
        send = transport.handle_async_request if driver.is_async else transport.handle_request
        with pytest.raises(RuntimeError, match="Cannot send a request, as the transport has been closed"):
            driver.run(send, driver.module.Request("GET", "http://orders/"))
        with driver.client(driver.transport(mesh)) as client:
            assert client.get("http://orders/").status_code == 200, "the mesh is open"
        eventually(lambda: not mesh.cluster("orders")._listeners)


def test_transport_that_was_never_used(driver: Driver):
    with driver.client(driver.transport()):
        pass


def test_closing_the_mesh_closes_the_connections_to_endpoints(driver: Driver, backends: list[Backend]):
    mesh = mesh_of(*backends, policy="round_robin")
    before = _open_files(mesh)
    with driver.client(driver.transport(mesh)) as client:
        for _ in range(3):
            client.get("http://orders/")
        mesh.close()
        eventually(lambda: open_files() < before)  # the control loop's are gone too


def test_idle_pools_are_dropped_and_made_again(driver: Driver, backends: list[Backend]):
    with mesh_of(backends[0], idle_timeout=0.1) as mesh, driver.client(driver.transport(mesh)) as client:
        before = _open_files(mesh)
        for _ in range(3):
            assert client.get("http://orders/").status_code == 200
            assert open_files() > before
            eventually(lambda: open_files() == before)


@pytest.mark.parametrize("kind", ["sync"])
def test_endpoint_that_leaves_drains_first(driver: Driver, backends: list[Backend]):
    backends[0].behave(chunks=2, interval=0.3)
    with mesh_of(*backends[:2]) as mesh, driver.client(driver.transport(mesh)) as client:
        before = _open_files(mesh)
        response = client.stream("GET", "http://orders/")
        mesh.discovery.update("orders", [backends[1].address])
        assert client.get("http://orders/").headers["x-backend"] == backends[1].id
        assert response.extensions["meshlb"]["endpoint"] == backends[0].address
        assert b"backend" in driver.read(response), "what had begun is not cut off"
        eventually(lambda: open_files() == before + 1)


@pytest.mark.parametrize("kind", ["sync"])
def test_blocking_transport_that_is_dropped_unclosed(driver: Driver, backends: list[Backend]):
    with mesh_of(backends[0]) as mesh:

        def drop() -> None:
            client = driver.module.Client(transport=driver.transport(mesh))
            assert client.get("http://orders/").status_code == 200

        drop()
        eventually(lambda: gc.collect() >= 0 and not mesh.cluster("orders")._listeners)


@pytest.mark.parametrize("kind", ["sync"])
def test_many_threads_on_one_transport(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends, policy="least_connections") as mesh, driver.client(driver.transport(mesh)) as client:

        def call(number: int) -> None:
            assert client.post("http://orders/", content=str(number)).json()["body"] == str(number)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(call, range(480)))
        assert sum(node.successes for node in mesh.cluster("orders").nodes) == 480
        assert in_flight(mesh) == 0


_FORK = """
import asyncio, os, sys
import {package} as module
import meshlb
from meshlb.discovery import StaticDiscovery
from meshlb.{package} import AsyncMeshTransport, MeshTransport

mesh = meshlb.Mesh(StaticDiscovery({{"orders": ["{address}"]}}))
client = module.Client(transport=MeshTransport(mesh))
asynchronous = module.AsyncClient(transport=AsyncMeshTransport(mesh))

async def call():
    return (await asynchronous.get("http://orders/")).status_code

def check(who):
    held = client.send(client.build_request("GET", "http://orders/"), stream=True)
    answers = client.get("http://orders/"), client.get("{direct}")
    streams = [answer.extensions["network_stream"] for answer in answers]
    addresses = [stream.get_extra_info("client_addr") for stream in streams]
    print(who, *(answer.status_code for answer in answers), asyncio.run(call()), flush=True)
    held.close()
    assert sum(e["in_flight"] for e in mesh.cluster("orders").snapshot()["endpoints"]) == 0, "leases left"
    return set(addresses)

mine = check("before")
runner = asyncio.Runner()
print(runner.run(call()), flush=True)  # its connection is open when we fork
pid = os.fork()
if pid == 0:
    assert not mine & check("child"), "a connection of the parent was used in the child"
    client.close()
    mesh.close()
    os._exit(0)
_, status = os.waitpid(pid, 0)
check("parent")
print("child's status", status, flush=True)
runner.run(asynchronous.aclose())
runner.close()
client.close()
mesh.close()
"""


def test_fork_of_a_process_that_has_called(package: str, backends: list[Backend]):
    script = _FORK.format(package=package, address=backends[0].address, direct=backends[1].url)
    # The child drops its copies of the parent's open sockets, and Python warns of that.
    command = [sys.executable, "-W", "error", "-W", "ignore:unclosed:ResourceWarning", "-c", script]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    expected = ["before 200 200 200", "200", "child 200 200 200", "parent 200 200 200", "child's status 0"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_importing_brings_in_one_package_only(package: str):
    """Importing the adapter brings in its package, and neither the other one nor a loop."""
    other = {"httpx": "httpx2", "httpx2": "grpc"}[package]
    script = f"import meshlb.{package}, sys; print({other!r} in sys.modules, 'trio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr
