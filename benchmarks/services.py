"""A service without a network, for what is measured of balancing itself."""

from __future__ import annotations

from typing import Any, Final

from meshlb import Endpoint, Mesh, ServiceConfig
from meshlb.balancing import ConsistentHash, LeastConnections, policy_names
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC
from meshlb.discovery import StaticDiscovery

REPORT: Final = LoadReport(
    cpu_utilization=0.5, rps_fractional=100.0, named_metrics={IN_FLIGHT_METRIC: 3.0, LATENCY_METRIC: 0.01}
)


def variants() -> dict[str, Any]:
    """Every policy by its name, and those options that work in another way."""
    return {
        **{name: name for name in policy_names()},
        "least_connections (full scan)": LeastConnections(full_scan=True),
        "consistent_hash (rendezvous)": ConsistentHash(table="rendezvous"),
        "consistent_hash (maglev)": ConsistentHash(table="maglev"),
        "consistent_hash (ring)": ConsistentHash(table="ring"),
    }


def mesh_of(policy: Any, size: int) -> Mesh:
    """A mesh whose ``service`` has that many endpoints, of three weights, and is ready."""
    endpoints = [
        Endpoint(f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}", 80, weight=1 + i % 3, id=f"i{i}") for i in range(size)
    ]
    mesh = Mesh(StaticDiscovery({"service": endpoints}), defaults=ServiceConfig(policy=policy))
    mesh.cluster("service").wait_ready(30)
    return mesh
