"""Two instances of each service, and what runs programs that call them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.process_life.programs import DUMP
from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.processes import REPO, ManagedProcess
from tests.support.wait import eventually

PROGRAMS = "tests.process_life.programs"
PATIENCE = 60.0
"""Seconds: several interpreters start at a time, on a machine that has other things to do."""


class Fleet:
    """The instances that the programs call."""

    def __init__(self, orders: list[Backend], echo: list[Backend]) -> None:
        self.orders = orders
        self.echo = echo

    @property
    def ids(self) -> list[str]:
        return sorted(backend.id for backend in (*self.orders, *self.echo))

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PYTHONPATH": str(REPO),
            "ORDERS": ",".join(backend.address for backend in self.orders),
            "ECHO": ",".join(backend.address for backend in self.echo),
            "ORDERS_IDS": ",".join(backend.id for backend in self.orders),
            "ECHO_IDS": ",".join(backend.id for backend in self.echo),
            **more,
        }

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python to its end."""
        return subprocess.run(
            [sys.executable, *command],
            env={**os.environ, **self.environment(**environment)},
            capture_output=True,
            text=True,
            timeout=110,
            cwd=REPO,
        )


@pytest.fixture(scope="package")
def fleet() -> Iterator[Fleet]:
    with http_backends(2) as orders, grpc_backends(2) as echo:
        yield Fleet(orders, echo)


class Program:
    """A server program that is running, and what it has logged."""

    def __init__(self, process: ManagedProcess, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, client: httpx.Client) -> dict[str, object] | None:
        """The program's answer to one request on a connection of its own; None if there is no server (yet)."""
        assert self.process.alive, self.log
        try:
            answer = client.get("/", headers={"Connection": "close"})
        except httpx.TransportError:
            return None
        assert answer.status_code == 200, f"{answer.text}\n{self.log}"
        said: dict[str, object] = answer.json()
        return said


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path, *, ends_with: set[int]) -> Iterator[Program]:
    """Run a server program until the block ends. SIGTERM to its first process must end all of it, quietly."""
    with open(log, "wb") as output:
        process = ManagedProcess([sys.executable, *command], env=environment, stdout=output, stderr=subprocess.STDOUT)
    program = Program(process, log)
    try:
        yield program
        process.popen.terminate()
        try:
            status = process.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it goes on after SIGTERM\n{stacks(program)}")
        assert status in ends_with, program.log
        assert "Traceback" not in program.log, program.log
        eventually(lambda: not members(process.pid), 20, message=lambda: f"{members(process.pid)} {program.log}")
    finally:
        process.kill()


def stacks(program: Program) -> str:
    """The program's log, with what each thread of its processes is at; those that cannot say it end."""
    group = members(program.process.pid)
    program.process.send(DUMP)
    with contextlib.suppress(AssertionError):
        # A process says it all, with one line for each of its threads, or it is gone.
        eventually(lambda: program.log.count("(most recent call first)") >= len(members(program.process.pid)), 5)
    return f"{group}\n{program.log}"


def members(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, _, owner = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(owner) == group and state != "Z":
                found.append(int(entry))
    return found
