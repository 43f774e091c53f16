"""meshlb: a service mesh's data plane inside the calling process.

::

    mesh = meshlb.Mesh()                                          # instances come from Consul
    client = httpx.Client(transport=meshlb.httpx.MeshTransport(mesh))
    channel = meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh)

The adapters are modules of their own (``meshlb.httpx``, ``meshlb.httpx2``, ``meshlb.grpc``, ``meshlb.grpc.aio``):
this package imports neither grpc nor httpx.
"""

from __future__ import annotations

from meshlb.balancing import (
    LeastConnections,
    LeastResponseTime,
    Policy,
    Random,
    RoundRobin,
    register_policy,
)
from meshlb.cluster import Cluster
from meshlb.config import ServiceConfig
from meshlb.default import default_mesh
from meshlb.errors import (
    CircuitOpen,
    ConfigError,
    DeadlineExceeded,
    DiscoveryError,
    DiscoveryTimeout,
    MeshClosed,
    MeshError,
    NoEndpoints,
)
from meshlb.mesh import Mesh
from meshlb.model import CallContext, Endpoint, Outcome, OutcomeKind, Sent, Status
from meshlb.node import Lease
from meshlb.resilience import Breaker, Retry, RetryBudget

__all__ = [
    "Breaker",
    "CallContext",
    "CircuitOpen",
    "Cluster",
    "ConfigError",
    "DeadlineExceeded",
    "DiscoveryError",
    "DiscoveryTimeout",
    "Endpoint",
    "Lease",
    "LeastConnections",
    "LeastResponseTime",
    "Mesh",
    "MeshClosed",
    "MeshError",
    "NoEndpoints",
    "Outcome",
    "OutcomeKind",
    "Policy",
    "Random",
    "Retry",
    "RetryBudget",
    "RoundRobin",
    "Sent",
    "ServiceConfig",
    "Status",
    "default_mesh",
    "register_policy",
]
