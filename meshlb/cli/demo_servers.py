"""The demo's fleet: which servers there are, and their processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Role:
    """One server of the fleet. ``delay`` in seconds, ``fail`` as a share of its calls."""

    service: str
    protocol: str
    id: str
    part: str
    delay: float = 0.004
    fail: float = 0.0
    dies: bool = False


FLEET = (
    Role("shop", "http", "shop-1", "healthy"),
    Role("shop", "http", "shop-2", "healthy"),
    Role("shop", "http", "shop-3", "slow", delay=0.080),
    Role("shop", "http", "shop-4", "fails half", fail=0.5),
    Role("shop", "http", "shop-5", "dies, returns", dies=True),
    Role("stock", "grpc", "stock-1", "healthy"),
    Role("stock", "grpc", "stock-2", "healthy"),
    Role("stock", "grpc", "stock-3", "slow", delay=0.080),
    Role("stock", "grpc", "stock-4", "fails half", fail=0.5),
    Role("stock", "grpc", "stock-5", "dies, returns", dies=True),
)


class Server:
    """The process of one role. It ends with the demo, whatever happens: its standard input is our pipe."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        """Start the process; ``ready`` waits for it."""
        command = [sys.executable, "-m", "meshlb.cli.demo_backend", self.role.protocol, "--id", self.role.id]
        command += ["--port", str(self.port), "--delay", str(self.role.delay), "--fail", str(self.role.fail)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # the Ctrl-C of a terminal is for the demo alone
        )

    def ready(self) -> None:
        """Wait until it listens. Raises RuntimeError if it ended instead."""
        assert self._process is not None and self._process.stdout is not None
        word, _, port = self._process.stdout.readline().partition(" ")
        if word != "port":
            raise RuntimeError(f"the demo's server {self.role.id} did not start (exit status {self._process.wait()})")
        self.port = int(port)

    def kill(self) -> None:
        """End it without notice, as a crash does. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def start_fleet(between: Callable[[], object]) -> list[Server]:
    """Start every server of the fleet, side by side. ``between`` is called after each one, and may raise."""
    servers = [Server(role) for role in FLEET]
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.ready()
            between()
    except BaseException:
        stop_fleet(servers)
        raise
    return servers


def stop_fleet(servers: list[Server]) -> None:
    """End them all."""
    for server in servers:
        server.kill()
