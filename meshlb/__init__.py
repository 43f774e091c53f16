"""meshlb: a service mesh's data plane inside the calling process.

::

    mesh = meshlb.Mesh()                                          # instances come from Consul
    client = httpx.Client(transport=meshlb.httpx.MeshTransport(mesh))
    channel = meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh)

The adapters are modules of their own (``meshlb.httpx``, ``meshlb.httpx2``, ``meshlb.grpc``, ``meshlb.grpc.aio``):
this package imports neither grpc nor httpx.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from meshlb.balancing import Policy, register_policy
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

if TYPE_CHECKING:
    from meshlb.affinity import Cookie, ForwardedFor, Header, PathSegment, QueryParameter, hash_key
    from meshlb.balancing import (
        ClientWeightedRoundRobin,
        ConsistentHash,
        IPHash,
        LeastConnections,
        LeastResponseTime,
        Prequal,
        Random,
        RoundRobin,
        WeightedRoundRobin,
    )

_LATER = {
    **dict.fromkeys(
        (
            "Cookie",
            "ForwardedFor",
            "Header",
            "PathSegment",
            "QueryParameter",
            "hash_key",
        ),
        "meshlb.affinity",
    ),
    **dict.fromkeys(
        (
            "ClientWeightedRoundRobin",
            "ConsistentHash",
            "IPHash",
            "LeastConnections",
            "LeastResponseTime",
            "Prequal",
            "Random",
            "RoundRobin",
            "WeightedRoundRobin",
        ),
        "meshlb.balancing",
    ),
}
"""Options that few programs name. They are imported when they are, so that `import meshlb` is cheap."""

__all__ = [
    "Breaker",
    "CallContext",
    "CircuitOpen",
    "ClientWeightedRoundRobin",
    "Cluster",
    "ConfigError",
    "ConsistentHash",
    "Cookie",
    "DeadlineExceeded",
    "DiscoveryError",
    "DiscoveryTimeout",
    "Endpoint",
    "ForwardedFor",
    "Header",
    "IPHash",
    "Lease",
    "LeastConnections",
    "LeastResponseTime",
    "Mesh",
    "MeshClosed",
    "MeshError",
    "NoEndpoints",
    "Outcome",
    "OutcomeKind",
    "PathSegment",
    "Policy",
    "Prequal",
    "QueryParameter",
    "Random",
    "Retry",
    "RetryBudget",
    "RoundRobin",
    "Sent",
    "ServiceConfig",
    "Status",
    "WeightedRoundRobin",
    "default_mesh",
    "hash_key",
    "register_policy",
]

# A program that has not configured logging hears nothing of a library, as the standard library's guide asks.
logging.getLogger("meshlb").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
