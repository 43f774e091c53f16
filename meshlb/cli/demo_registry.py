"""Where the demo's servers are registered: within the process, or in a real Consul agent."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from types import TracebackType
from typing import Protocol

import httpx

from meshlb.cli.demo_servers import Server
from meshlb.discovery import ConsulDiscovery, Discovery, StaticDiscovery
from meshlb.model import Endpoint

_START_TIMEOUT = 15.0
"""Seconds that a Consul agent may take to elect itself leader; it takes about two."""


class Registry(Protocol):
    """Holds the servers, and is what the mesh discovers them from."""

    name: str
    discovery: Discovery

    def __enter__(self) -> Registry: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def register(self, servers: list[Server]) -> None: ...


class EmbeddedRegistry:
    """A list within the process. It knows nothing of health: that the dead are avoided is the mesh's own doing."""

    name = "embedded registry"

    def __init__(self) -> None:
        self._static = StaticDiscovery({})
        self.discovery: Discovery = self._static

    def __enter__(self) -> EmbeddedRegistry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def register(self, servers: list[Server]) -> None:
        for service in sorted({server.role.service for server in servers}):
            self._static.update(
                service,
                [Endpoint("127.0.0.1", s.port, id=s.role.id) for s in servers if s.role.service == service],
            )


class ConsulRegistry:
    """A real Consul agent: a running one, or one in development mode that is started here and ended with the demo.

    Raises RuntimeError, saying what to do, if there is none to be had.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._agent: subprocess.Popen[bytes] | None = None
        self._registered: list[str] = []
        self.name = "Consul"
        self.discovery: Discovery = StaticDiscovery({})

    def __enter__(self) -> ConsulRegistry:
        if not self._address:
            self._address = self._start_agent()
        elif "//" not in self._address:
            self._address = f"http://{self._address}"
        self.name = f"Consul at {self._address}"
        self._http = httpx.Client(base_url=self._address, trust_env=False, headers=_token(), timeout=10)
        self._wait_for_leader()
        self.discovery = ConsulDiscovery(self._address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._agent is None:  # somebody's own agent: leave it as it was
            for service_id in self._registered:
                self._http.put(f"/v1/agent/service/deregister/{service_id}")
        self._http.close()
        self._end_agent()

    def register(self, servers: list[Server]) -> None:
        for server in servers:
            service_id = f"meshlb-demo-{server.role.id}"
            answer = self._http.put(
                "/v1/agent/service/register",
                json={
                    "ID": service_id,
                    "Name": server.role.service,
                    "Address": "127.0.0.1",
                    "Port": server.port,
                    "Check": {
                        "TCP": f"127.0.0.1:{server.port}",
                        "Interval": "1s",
                        "Timeout": "1s",
                        "Status": "passing",
                    },
                },
            )
            answer.raise_for_status()
            self._registered.append(service_id)

    def _start_agent(self) -> str:
        binary = os.environ.get("CONSUL_BIN") or shutil.which("consul")
        if not binary:
            raise RuntimeError(
                "no consul found: set CONSUL_BIN, put consul on PATH, give --consul the address of a running agent, "
                "or leave --consul out to use the embedded registry"
            )
        ports = _free_ports(4)
        self._agent = subprocess.Popen(
            [
                binary, "agent", "-dev", "-bind=127.0.0.1", f"-http-port={ports[0]}", f"-server-port={ports[1]}",
                f"-serf-lan-port={ports[2]}", f"-serf-wan-port={ports[3]}", "-dns-port=-1", "-grpc-port=-1",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return f"http://127.0.0.1:{ports[0]}"

    def _wait_for_leader(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        reason = ""
        while time.monotonic() < deadline and (self._agent is None or self._agent.poll() is None):
            try:
                answer = self._http.get("/v1/status/leader")
                if answer.status_code == 200 and answer.json():
                    return
                reason = f"{answer.status_code} {answer.text.strip()}"
            except (httpx.TransportError, ValueError) as error:
                reason = str(error)
            time.sleep(0.1)
        self._http.close()
        self._end_agent()
        raise RuntimeError(f"no Consul agent with a leader at {self._address}: {reason or 'it ended'}")

    def _end_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.kill()
            agent.wait()


def _token() -> dict[str, str]:
    token = os.environ.get("CONSUL_HTTP_TOKEN")
    return {"X-Consul-Token": token} if token else {}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
