"""A service whose instances are chosen by a key, and who gets which."""

from __future__ import annotations

from typing import Any

from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from tests.support.backends import Backend

USERS = [f"user-{number}" for number in range(40)]


def mesh_of(backends: list[Backend], policy: Any = "consistent_hash", **settings: Any) -> Mesh:
    config = ServiceConfig(policy=policy, **settings)
    return Mesh(StaticDiscovery({"orders": [backend.address for backend in backends]}), defaults=config)


def expected(mesh: Mesh, backends: list[Backend], keys: list[Any]) -> list[str]:
    """The backends that these keys belong to, by the protocol-neutral core."""
    names = {backend.address: backend.id for backend in backends}
    cluster = mesh.cluster("orders")
    cluster.wait_ready(5)
    found = []
    for key in keys:
        with cluster.lease(key=key) as lease:
            found.append(names[lease.endpoint.address])
    assert len(set(found)) > 1
    return found
