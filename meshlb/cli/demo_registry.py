"""Where the demo's servers are registered: within the process, or in a real Consul agent."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from meshlb.cli.demo_servers import Server
from meshlb.discovery import ConsulDiscovery, Discovery, StaticDiscovery
from meshlb.errors import DiscoveryError
from meshlb.model import Endpoint

if TYPE_CHECKING:
    from meshlb.discovery.consul_client import AsyncConsul

_START_TIMEOUT: Final = 15.0
"""Seconds that a Consul agent may take to elect itself leader; it takes about two."""

_ID_PREFIX: Final = "meshlb-demo-"
"""Before the ids in somebody's own Consul, where a "shop-1" may exist."""


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

    ``address``: of a running agent, as ConsulDiscovery takes it; empty for one of the demo's own. Raises ConfigError
    for what is no address, and RuntimeError that says what to do if there is no agent to be had.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._agent: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._registered: list[str] = []
        self.name = ""

    def __enter__(self) -> ConsulRegistry:
        try:
            self._consul = ConsulDiscovery(self._address or self._start_agent())
            self.discovery: Discovery = self._consul
            self.name = f"Consul at {self._consul.settings.address}"
            self._wait_for_leader()
        except BaseException:
            self._end_agent()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._agent is None:  # somebody's own agent: leave it as it was
                self._ask(self._deregister)
        finally:
            self._end_agent()

    def register(self, servers: list[Server]) -> None:
        self._ask(lambda consul: self._register(consul, servers))

    async def _register(self, consul: AsyncConsul, servers: list[Server]) -> None:
        from consul import Check

        for server in servers:
            service_id = f"{_ID_PREFIX}{server.role.id}"
            self._registered.append(service_id)
            check = {**Check.tcp("127.0.0.1", server.port, "1s", timeout="1s"), "status": "passing"}
            await consul.agent.service.register(server.role.service, service_id, "127.0.0.1", server.port, check=check)

    async def _deregister(self, consul: AsyncConsul) -> None:
        for service_id in self._registered:
            await consul.agent.service.deregister(service_id)

    def _ask(self, question: Callable[[AsyncConsul], Awaitable[Any]]) -> Any:
        """Ask as the mesh does: the same address, token and TLS settings."""

        async def ask() -> Any:
            try:
                return await question(await self._consul.client())
            finally:
                await self._consul.aclose()

        from consul import ConsulException

        try:
            return asyncio.run(ask())
        except ConsulException as error:
            raise RuntimeError(f"{self.name} refuses: {error}") from error

    def _start_agent(self) -> str:
        binary = os.environ.get("CONSUL_BIN") or shutil.which("consul")
        if not binary:
            raise RuntimeError(
                "no consul found: set CONSUL_BIN, put consul on PATH, give --consul the address of a running agent, "
                "or leave --consul out to use the embedded registry"
            )
        ports = _free_ports(4)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # _end_agent closes it
        try:
            self._agent = subprocess.Popen(
                [
                    binary, "agent", "-dev", "-bind=127.0.0.1", f"-http-port={ports[0]}", f"-server-port={ports[1]}",
                    f"-serf-lan-port={ports[2]}", f"-serf-wan-port={ports[3]}", "-dns-port=-1", "-grpc-port=-1",
                ],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
                process_group=0,  # the Ctrl-C of a terminal is for the demo, which ends the agent
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"{binary} cannot be started: {error.strerror}") from error
        return f"http://127.0.0.1:{ports[0]}"

    def _wait_for_leader(self) -> None:
        deadline = time.monotonic() + (_START_TIMEOUT if self._agent else 0.0)
        while True:
            try:
                if self._ask(lambda consul: consul.status.leader()):
                    return
                reason = "it knows no leader"
            except (DiscoveryError, RuntimeError) as error:
                reason = str(error)
            if self._agent is not None and self._agent.poll() is not None:
                raise RuntimeError(f"the Consul agent ended at once: {self._last_words()}")
            if time.monotonic() >= deadline:
                raise RuntimeError(f"no Consul agent with a leader at {self._consul.settings.address}: {reason}")
            time.sleep(0.1)

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return " ".join(line.strip() for line in lines if line.strip())[-400:]

    def _end_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.kill()
            agent.wait()
        if self._log is not None:
            self._log.close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
