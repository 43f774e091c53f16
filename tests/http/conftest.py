"""Fixtures of the transports' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http.drivers import Driver, drive
from tests.support.backends import Backend, http_backends


@pytest.fixture(params=["httpx", "httpx2"])
def package(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["sync", "asyncio", "trio"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def driver(package: str, kind: str) -> Iterator[Driver]:
    """Each kind of client of each package, driven alike."""
    with drive(package, kind) as driver:
        yield driver


@pytest.fixture(scope="session")
def _shared_backends() -> Iterator[list[Backend]]:
    with http_backends(3) as backends:
        yield backends


@pytest.fixture
def backends(_shared_backends: list[Backend]) -> list[Backend]:
    """Three servers that all tests of a worker share, healthy and with counts at zero. Not to be killed or frozen:
    who does that starts his own."""
    for backend in _shared_backends:
        backend.behave()
        backend.stats(clear=True)
    return _shared_backends
