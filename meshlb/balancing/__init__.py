"""Which instance gets a call: one short module a policy, and the registry of their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlb._lazy import lazily
from meshlb.balancing.base import Candidate, Picker, Policy, PolicyEnvironment
from meshlb.balancing.ewma import PeakEwma
from meshlb.balancing.registry import PolicyFactory, policy_names, register_policy, resolve_policy

if TYPE_CHECKING:
    from meshlb.balancing.client_weighted_round_robin import ClientWeightedRoundRobin
    from meshlb.balancing.consistent_hash import ConsistentHash
    from meshlb.balancing.ip_hash import IPHash
    from meshlb.balancing.least_connections import LeastConnections
    from meshlb.balancing.least_response_time import LeastResponseTime
    from meshlb.balancing.prequal import Prequal
    from meshlb.balancing.probes import Probes
    from meshlb.balancing.random_choice import Random
    from meshlb.balancing.round_robin import RoundRobin
    from meshlb.balancing.weighted_round_robin import WeightedRoundRobin

_POLICIES = {
    "ClientWeightedRoundRobin": "meshlb.balancing.client_weighted_round_robin",
    "ConsistentHash": "meshlb.balancing.consistent_hash",
    "IPHash": "meshlb.balancing.ip_hash",
    "LeastConnections": "meshlb.balancing.least_connections",
    "LeastResponseTime": "meshlb.balancing.least_response_time",
    "Prequal": "meshlb.balancing.prequal",
    "Probes": "meshlb.balancing.probes",
    "Random": "meshlb.balancing.random_choice",
    "RoundRobin": "meshlb.balancing.round_robin",
    "WeightedRoundRobin": "meshlb.balancing.weighted_round_robin",
}

__all__ = [
    # the protocols
    "Candidate",
    "Picker",
    "Policy",
    "PolicyEnvironment",
    # by name
    "PolicyFactory",
    "policy_names",
    "register_policy",
    "resolve_policy",
    # the policies
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
    # parts
    "PeakEwma",
]


__getattr__ = lazily(__name__, _POLICIES)


def __dir__() -> list[str]:
    return __all__
