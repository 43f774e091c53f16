"""A mesh whose endpoints are checked often, and what its snapshot says of them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from meshlb import Cluster, Endpoint, Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.health import HealthCheck
from tests.support.wait import eventually

OFTEN = {"interval": 0.1, "unhealthy_interval": 0.05, "timeout": 5.0}
"""For checks in tests: results soon, and no failure of a healthy server on a busy machine."""

SECONDS = 20.0
"""Until a test gives up."""


class Service:
    """One checked service."""

    def __init__(self, mesh: Mesh, cluster: Cluster, discovery: StaticDiscovery) -> None:
        self.mesh = mesh
        self.cluster = cluster
        self.discovery = discovery

    def row(self, address: str) -> dict[str, Any]:
        [row] = [row for row in self.cluster.snapshot()["endpoints"] if row["address"] == address]
        return row

    def until(self, address: str, state: str, words: str = "") -> dict[str, Any]:
        """Wait until an endpoint has a state, and its last check the words (a pattern); its row in the snapshot."""

        def found() -> dict[str, Any] | None:
            row = self.row(address)
            return row if row["state"] == state and re.search(words, row["health"]) else None

        return eventually(found, SECONDS, message=lambda: f"{state} with {words!r}; is: {self.row(address)}")

    def rounds(self, address: str, count: int = 3) -> None:
        """Wait until an endpoint has been checked some more times."""
        [node] = [node for node in self.cluster.nodes if node.endpoint.address == address]
        for _ in range(count):
            last = node.health.last
            eventually(lambda last=last: node.health.last is not last, SECONDS)


@contextlib.contextmanager
def checked(check: HealthCheck, *endpoints: str | Endpoint, **config: Any) -> Iterator[Service]:
    """A mesh with one service, "orders", whose endpoints are checked."""
    defaults = {field.name: field.default for field in dataclasses.fields(check)}
    often = {name: value for name, value in OFTEN.items() if getattr(check, name) == defaults[name]}
    check = dataclasses.replace(check, **often)
    discovery = StaticDiscovery({"orders": endpoints})
    with Mesh(discovery, defaults=ServiceConfig(health_check=check, **config)) as mesh:
        cluster = mesh.cluster("orders")
        eventually(lambda: cluster.age is not None, SECONDS)
        yield Service(mesh, cluster, discovery)
