"""The examples that are servers: run by uvicorn and gunicorn, called over HTTP."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.examples.programs import EXAMPLES, environment
from tests.support.backends import Backend, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.ports import free_port, loopback_host
from tests.support.processes import ManagedProcess
from tests.support.registered import registered
from tests.support.wait import eventually


@contextmanager
def serving(command: list[str], consul: ConsulAgent, port: int, log: Path, path: str) -> Iterator[httpx.Client]:
    """Run a server until the block ends; it must end well within seconds of SIGTERM, and log no traceback."""
    with open(log, "wb") as output:
        process = ManagedProcess(command, env=environment(consul), stdout=output, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{loopback_host()}:{port}", timeout=20) as client:

            def answers() -> bool:
                assert process.alive, log.read_text()
                try:
                    return client.get(path).status_code == 200
                except httpx.TransportError:
                    return False

            eventually(answers, 30, 0.05, log.read_text)
            yield client
        process.popen.send_signal(signal.SIGTERM)  # to the master alone, which ends its workers
        assert process.popen.wait(15) in (0, -signal.SIGTERM), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()


def test_starlette_service(consul_agent: ConsulAgent, tmp_path: Path):
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "starlette_service:app"]
    command += ["--host", loopback_host(), "--port", str(port), "--no-access-log"]
    with (
        http_backends(3) as orders,
        serving(command, consul_agent, port, tmp_path / "log", "/debug/mesh") as client,
    ):
        nobody = client.get("/order/1")
        assert nobody.status_code == 503
        assert "'orders'" in nobody.json()["error"]

        def order(number: int) -> Any:
            answer = client.get(f"/order/{number}")
            assert answer.status_code == 200, answer.text
            return answer.json()["served_by"]

        with registered(consul_agent, "orders", orders):
            eventually(lambda: client.get("/order/1").status_code == 200)
            eventually(lambda: {order(number) for number in range(10)} == {backend.id for backend in orders})
            orders[0].kill()
            assert {order(number) for number in range(30)} <= {backend.id for backend in orders[1:]}
            [service] = client.get("/debug/mesh").json()
            assert service["service"] == "orders"
            assert {row["id"] for row in service["endpoints"]} == {backend.id for backend in orders}


@pytest.mark.parametrize("warm", [False, True], ids=["called only in the workers", "called in the master too"])
def test_prefork(warm: bool, consul_agent: ConsulAgent, orders: list[Backend], echo: list[Backend], tmp_path: Path):
    port = free_port()
    config = EXAMPLES / "prefork/gunicorn.conf.py"
    if warm:
        # The channel, its sub-channels, the client's connections and the control thread all exist before the fork.
        config = tmp_path / "gunicorn.conf.py"
        config.write_text(
            (EXAMPLES / "prefork/gunicorn.conf.py").read_text().replace("__file__", repr(str(EXAMPLES / "prefork/x")))
            + "\n\ndef when_ready(server):\n"
            "    import app\n"
            "    for _ in range(6):\n"
            "        app.handle('/order')\n"
            "        app.handle('/echo')\n"
        )
    command = [sys.executable, "-m", "gunicorn", "-c", str(config), "--bind", f"{loopback_host()}:{port}", "app:app"]
    with serving(command, consul_agent, port, tmp_path / "log", "/order") as client:
        failures: list[str] = []
        workers: dict[str, set[str]] = {}
        lock = threading.Lock()

        def call(path: str) -> str:
            # No keep-alive: each call is a connection of its own, which any worker may take.
            answer = client.get(path, headers={"Connection": "close"})
            with lock:
                if answer.status_code != 200:
                    failures.append(answer.text)
                    return ""
                said = answer.json()
                workers.setdefault(str(said["worker"]), set()).add(path)
                return str(said["served_by"])

        def several(path: str, count: int = 40) -> set[str]:
            answered: list[str] = []

            def some() -> None:
                answered.extend(call(path) for _ in range(count // 4))

            threads = [threading.Thread(target=some) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return set(answered)

        def all_workers_serve_both() -> bool:
            several("/order"), several("/echo")
            return len(workers) == 3 and all(paths == {"/order", "/echo"} for paths in workers.values())

        eventually(all_workers_serve_both, 30, message=lambda: f"{workers} {failures}")
        eventually(lambda: several("/order") == {backend.id for backend in orders}, 20)
        eventually(lambda: several("/echo") == {backend.id for backend in echo}, 20)

        orders[0].kill()
        echo[0].kill()
        several("/order"), several("/echo")
        assert failures == []

        # Each worker watches Consul itself: a new instance is seen by all of them.
        orders[0].restart()
        with registered(consul_agent, "orders", [orders[0]]):
            consul_agent.deregister(orders[1].id)
            seen: set[str] = set()

            def every_worker_has_seen_it() -> bool:
                answer = client.get("/mesh", headers={"Connection": "close"}).json()
                for service in answer["mesh"]:
                    rows = {row["id"] for row in service["endpoints"] if row["state"] != "draining"}
                    if service["service"] == "orders" and rows == {orders[0].id, orders[2].id}:
                        seen.add(str(answer["worker"]))
                return seen == set(workers)

            eventually(every_worker_has_seen_it, 20, message=lambda: f"only {seen} of {set(workers)}")
        assert failures == []


def test_service_registers_itself_and_is_gone_afterwards(tmp_path: Path):
    with ConsulAgent() as consul:
        with open(tmp_path / "log", "wb") as output:
            command = [sys.executable, "-W", "error", str(EXAMPLES / "service.py")]
            process = ManagedProcess(command, env=environment(consul), stdout=output, stderr=subprocess.STDOUT)
        try:
            eventually(lambda: len(consul.health("orders", passing=None).body) == 3, 20)
            eventually(lambda: len(consul.health("echo", passing=None).body) == 3, 20)
            [first, *_] = consul.health("orders").body
            host, port = first["Service"]["Address"], first["Service"]["Port"]
            assert httpx.get(f"http://{host}:{port}/v1").headers["x-backend"] == first["Service"]["ID"]
            process.popen.send_signal(signal.SIGINT)
            assert process.popen.wait(10) == 0, (tmp_path / "log").read_text()
            assert consul.health("orders").body == consul.health("echo").body == []
        finally:
            process.kill()
