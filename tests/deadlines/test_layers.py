"""Three layers of real HTTP services, each a process with our transport and middleware."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from meshlb import Mesh, Retry, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import MeshTransport
from meshlb.serving import OVERLOADED
from tests.deadlines.layer import HEADER
from tests.support.processes import ManagedProcess


@contextlib.contextmanager
def layer(*below: str) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.deadlines.layer", *([",".join(below)] if below else [])]
    process = ManagedProcess(command, stdout=subprocess.PIPE)
    try:
        assert process.popen.stdout is not None
        address = process.popen.stdout.readline().decode().strip()
        assert address, "the layer has not started"
        yield address
    finally:
        process.kill()


@pytest.fixture
def first() -> Iterator[list[str]]:
    """The addresses of the first of three layers, of which each has two instances but the last."""
    with contextlib.ExitStack() as stack:
        last = stack.enter_context(layer())
        middle = [stack.enter_context(layer(last)) for _ in range(2)]
        yield [stack.enter_context(layer(*middle)) for _ in range(2)]


def test_attempts_do_not_multiply_and_the_deadline_shrinks(first: list[str]):
    config = ServiceConfig(timeout=45, deadline_header=HEADER, retry=Retry(max_attempts=3))
    with (
        Mesh(StaticDiscovery({"first": first}), defaults=config) as mesh,
        httpx.Client(transport=MeshTransport(mesh), timeout=60) as client,
    ):
        response = client.get("http://first/503")
        assert response.status_code == 503
        assert response.headers[OVERLOADED] == "true"
        seen = [entry.split("/") for entry in response.headers["x-seen"].split()]
        # Whoever is right above the failure retries, and nobody else: 27 would be the product of the layers.
        assert [int(attempts) for attempts, _, _ in seen] == [1, 1, 3]
        assert [counts for _, _, counts in seen] == ["-", "-", "-+2+3"]
        waits = [int(milliseconds) for _, milliseconds, _ in seen]
        assert 45_000 >= waits[0] >= waits[1] >= waits[2] > 0
        assert waits[0] > waits[2]
