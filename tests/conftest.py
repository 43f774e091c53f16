"""Fixtures of all tests.

Servers: tests/support/backends.py. More of Consul: tests/support/consul_agent.py, tests/support/consul_cluster.py.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support import leaks
from tests.support.consul_agent import ConsulAgent
from tests.support.consul_cluster import ConsulCluster
from tests.support.wait import eventually

# What the developer's shell says about Consul and proxies is not for the tests.
for _name in list(os.environ):
    if (_name.startswith(("CONSUL_", "MESHLB_", "OTEL_")) and _name != "CONSUL_BIN") or _name.lower().endswith(
        "_proxy"
    ):
        del os.environ[_name]

# A deadline per example is a timing assertion, and this suite shares two cores with servers.
hypothesis.settings.register_profile(
    "meshlb", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("meshlb")

_numbers = itertools.count(1)
_CONSUL_FIXTURES = {"consul_agent", "consul_cluster"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [tool for tool in ("ip", "iptables") if shutil.which(tool) is None]
    can_root = os.geteuid() == 0 and not missing
    for item in items:
        if _CONSUL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.consul)
        # CI provides root and the tools, so there such a test fails rather than being skipped.
        if item.get_closest_marker("root") and not can_root and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=f"needs root and ip, iptables (missing: {missing or 'root'})"))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Async tests run on both; one that is about a single one overrides this fixture with its own."""
    backend: str = request.param
    return backend


@pytest.fixture(scope="session")
def consul_agent() -> Iterator[ConsulAgent]:
    """One -dev agent for all tests of a worker; who kills, freezes or restarts one takes `with ConsulAgent()`."""
    with ConsulAgent() as agent:
        yield agent


@pytest.fixture
def consul_cluster() -> Iterator[ConsulCluster]:
    """Three servers of the test's own, to be broken at will (up in about 1.5 s)."""
    with ConsulCluster() as cluster:
        yield cluster


@pytest.fixture
def service_name() -> str:
    """A service name that no other test of this worker uses, as tests share its Consul agent."""
    return f"service-{next(_numbers)}"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which a thread, a child process or the control loop is left (it may take a moment to go).

    Fixtures of a wider scope are set up before this one, so what they start is known and may stay.
    """
    threads, processes = leaks.running_threads(), leaks.child_processes()
    yield

    def left() -> str:
        return leaks.describe(leaks.running_threads() - threads, leaks.child_processes() - processes)

    eventually(lambda: not left(), timeout=5, message=lambda: f"left behind by the test: {left()}")
