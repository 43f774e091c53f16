"""meshlb: a service mesh's data plane inside the calling process.

::

    mesh = meshlb.Mesh()                                          # instances come from Consul
    client = httpx.Client(transport=meshlb.httpx.MeshTransport(mesh))
    channel = meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh)

The adapters are modules of their own (``meshlb.httpx``, ``meshlb.httpx2``, ``meshlb.grpc``, ``meshlb.grpc.aio``,
``meshlb.tcp``):
this package imports neither grpc nor httpx.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from meshlb._lazy import lazily
from meshlb.affinity import hash_key
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
    LimitExceeded,
    MeshClosed,
    MeshError,
    NoEndpoints,
    SessionLost,
    Throttled,
)
from meshlb.mesh import Mesh
from meshlb.model import CallContext, Endpoint, Outcome, OutcomeKind, Sent, Status
from meshlb.node import Lease
from meshlb.resilience import Breaker, Hedge, Retry, RetryBudget
from meshlb.serving import deadline

if TYPE_CHECKING:
    from meshlb.balancing import (
        ClientWeightedRoundRobin,
        ConsistentHash,
        IPHash,
        LeastConnections,
        LeastResponseTime,
        Prequal,
        Probes,
        Random,
        RoundRobin,
        WeightedRoundRobin,
    )
    from meshlb.health import CheckTLS, FunctionCheck, GrpcCheck, HttpCheck, TcpCheck
    from meshlb.key_sources import Cookie, ForwardedFor, Header, PathSegment, QueryParameter
    from meshlb.resilience import AdaptiveThrottling, Gradient2, Limits, OutlierDetection, StateChange
    from meshlb.sessions import StickyCookie, StickyKey
    from meshlb.topology import (
        DeterministicAperture,
        Failover,
        NearestByDistance,
        NearestByRegion,
        NearestByRTT,
        RendezvousSubset,
        SlowStart,
        Zones,
    )

_LATER = {
    **dict.fromkeys(
        (
            "Cookie",
            "ForwardedFor",
            "Header",
            "PathSegment",
            "QueryParameter",
        ),
        "meshlb.key_sources",
    ),
    **dict.fromkeys(
        (
            "ClientWeightedRoundRobin",
            "ConsistentHash",
            "IPHash",
            "LeastConnections",
            "LeastResponseTime",
            "Prequal",
            "Probes",
            "Random",
            "RoundRobin",
            "WeightedRoundRobin",
        ),
        "meshlb.balancing",
    ),
    **dict.fromkeys(
        ("AdaptiveThrottling", "Gradient2", "Limits", "OutlierDetection", "StateChange"), "meshlb.resilience"
    ),
    **dict.fromkeys(
        (
            "DeterministicAperture",
            "Failover",
            "NearestByDistance",
            "NearestByRTT",
            "NearestByRegion",
            "RendezvousSubset",
            "SlowStart",
            "Zones",
        ),
        "meshlb.topology",
    ),
    **dict.fromkeys(("StickyCookie", "StickyKey"), "meshlb.sessions"),
    **dict.fromkeys(("CheckTLS", "FunctionCheck", "GrpcCheck", "HttpCheck", "TcpCheck"), "meshlb.health"),
}
"""Options that few programs name. They are imported when they are, so that `import meshlb` is cheap."""

__all__ = [
    "AdaptiveThrottling",
    "Breaker",
    "CallContext",
    "CheckTLS",
    "CircuitOpen",
    "ClientWeightedRoundRobin",
    "Cluster",
    "ConfigError",
    "ConsistentHash",
    "Cookie",
    "DeadlineExceeded",
    "DeterministicAperture",
    "DiscoveryError",
    "DiscoveryTimeout",
    "Endpoint",
    "ForwardedFor",
    "FunctionCheck",
    "Gradient2",
    "GrpcCheck",
    "Header",
    "Hedge",
    "HttpCheck",
    "IPHash",
    "Lease",
    "LeastConnections",
    "LeastResponseTime",
    "LimitExceeded",
    "Limits",
    "Mesh",
    "MeshClosed",
    "MeshError",
    "NoEndpoints",
    "Outcome",
    "OutcomeKind",
    "OutlierDetection",
    "PathSegment",
    "Policy",
    "Prequal",
    "Probes",
    "QueryParameter",
    "Random",
    "Failover",
    "NearestByDistance",
    "NearestByRTT",
    "NearestByRegion",
    "RendezvousSubset",
    "Retry",
    "RetryBudget",
    "RoundRobin",
    "Sent",
    "ServiceConfig",
    "SessionLost",
    "StateChange",
    "StickyCookie",
    "StickyKey",
    "SlowStart",
    "Zones",
    "Status",
    "TcpCheck",
    "Throttled",
    "WeightedRoundRobin",
    "deadline",
    "default_mesh",
    "hash_key",
    "register_policy",
]

# A program that has not configured logging hears nothing of a library, as the standard library's guide asks.
logging.getLogger("meshlb").addHandler(logging.NullHandler())


__getattr__ = lazily(__name__, _LATER)


def __dir__() -> list[str]:
    return __all__
