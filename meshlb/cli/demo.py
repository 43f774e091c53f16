"""``meshlb demo``: real servers that misbehave, and calls that do not notice."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections import deque
from types import FrameType
from typing import Any, Final

from rich.console import Console

from meshlb.cli.demo_registry import ConsulRegistry, EmbeddedRegistry, Registry
from meshlb.cli.demo_servers import FLEET, Server, start_fleet, stop_fleet
from meshlb.cli.demo_traffic import Traffic
from meshlb.cli.demo_view import LiveView, PlainView, View
from meshlb.config import ServiceConfig
from meshlb.errors import MeshError
from meshlb.mesh import Mesh

_TICK: Final = 0.25
_DIES_AT: Final = 0.3
_RETURNS_AT: Final = 0.6
"""As shares of the demo's length."""

_SHARE_WINDOW: Final = 4
"""Ticks that a share is counted over: a second."""


def run_demo(*, seconds: float, consul: str | None, policy: str, plain: bool) -> int:
    """Run it; returns the exit status: 0 if no call failed for its caller, 1 if one did, 2 if it could not be run."""
    console = Console()
    ending = _Ending()
    logging.getLogger("meshlb").setLevel(logging.ERROR)  # what it would warn of is what the table shows
    try:
        config = ServiceConfig(policy=policy)
        registry: Registry = EmbeddedRegistry() if consul is None else ConsulRegistry(consul)
        console.print(f"starting {len(FLEET)} servers ...", highlight=False)
        with registry:
            servers = start_fleet(ending.check)
            try:
                registry.register(servers)
                ending.check()
                return _Demo(console, registry, servers, config, seconds, ending, plain=plain).run()
            finally:
                stop_fleet(servers)
    except (MeshError, RuntimeError) as error:
        ending.check()  # a Ctrl-C may have met a server before it was in a process group of its own
        print(f"meshlb demo: {error}", file=sys.stderr)
        return 2


class _Ending:
    """Notes a signal that asks the demo to end, until the demo comes to ``check``: an exception out of the handler
    itself could come in the middle of an import, whose lock nobody would ever release. A second one does end it there.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._status is not None:
            self.check()
        self._status = 128 + number

    def check(self) -> None:
        """Raise SystemExit if the demo is to end: through every ``finally``, so that servers and agent end too."""
        if self._status is not None:
            sys.exit(self._status)


class _Demo:
    def __init__(
        self,
        console: Console,
        registry: Registry,
        servers: list[Server],
        config: ServiceConfig,
        seconds: float,
        ending: _Ending,
        *,
        plain: bool,
    ) -> None:
        self._ending = ending
        self._console = console
        self._registry = registry
        self._servers = servers
        self._config = config
        self._seconds = seconds
        title = f"meshlb demo, {config.policy.name}, {registry.name}"  # type: ignore[union-attr]  # resolved
        self._view: View = PlainView(console, title) if plain or not console.is_terminal else LiveView(console, title)
        self._history: deque[dict[str, int]] = deque(maxlen=_SHARE_WINDOW + 1)

    def run(self) -> int:
        with Mesh(self._registry.discovery, defaults=self._config) as mesh:
            for service in sorted({server.role.service for server in self._servers}):
                mesh.cluster(service).wait_ready(10)
            traffic = Traffic(mesh)
            thread = threading.Thread(target=traffic.run, name="demo-traffic")
            thread.start()
            try:
                with self._view:
                    self._watch(mesh, traffic)
            finally:
                traffic.stop()
                thread.join()
            services = mesh.snapshot()
        self._summarize(traffic, services)
        return 1 if traffic.errors or not traffic.calls else 0

    def _watch(self, mesh: Mesh, traffic: Traffic) -> None:
        began = time.monotonic()
        acts = deque([(_DIES_AT, self._kill), (_RETURNS_AT, self._return)])
        while (elapsed := time.monotonic() - began) < self._seconds:
            if acts and elapsed >= acts[0][0] * self._seconds:
                acts.popleft()[1]()
            services = mesh.snapshot()
            self._view.show(elapsed, services, self._shares(services), traffic.calls)
            time.sleep(_TICK)
            self._ending.check()

    def _kill(self) -> None:
        for server in self._servers:
            if server.role.dies:
                server.kill()
                self._view.event(f"{server.role.id} is killed")

    def _return(self) -> None:
        for server in self._servers:
            if server.role.dies:
                server.launch()
        for server in self._servers:
            if server.role.dies:
                server.ready()
                self._view.event(f"{server.role.id} is back")

    def _shares(self, services: list[dict[str, Any]]) -> dict[str, float]:
        now: dict[str, int] = {}
        for service in services:
            for endpoint in service["endpoints"]:
                now[endpoint["id"]] = endpoint["calls"]
        self._history.append(now)
        before = self._history[0]
        shares: dict[str, float] = {}
        for service in services:
            ids = [endpoint["id"] for endpoint in service["endpoints"]]
            fresh = {one: now[one] - before.get(one, 0) for one in ids}
            total = sum(fresh.values()) or 1
            shares.update({one.removeprefix("meshlb-demo-"): count / total for one, count in fresh.items()})
        return shares

    def _summarize(self, traffic: Traffic, services: list[dict[str, Any]]) -> None:
        endpoints = [endpoint for service in services for endpoint in service["endpoints"]]
        failed = sum(endpoint["failures"] + endpoint["overloads"] for endpoint in endpoints)
        lines = [
            f"calls made by callers        {traffic.calls}",
            f"errors seen by callers       {len(traffic.errors)}",
            f"attempts that failed         {failed}",
            f"retried on another instance  {sum(service['retries'] for service in services)}",
            f"times a breaker took one out {sum(service['ejections'] for service in services)}",
        ]
        self._console.print("\n".join(lines), highlight=False)
        for error in traffic.errors[:5]:
            self._console.print(f"  {error}", markup=False, highlight=False)
