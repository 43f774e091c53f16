"""Which instance gets a call: one short module a policy, and the registry of their names."""

from __future__ import annotations

from meshlb.balancing.base import Candidate, Picker, Policy, PolicyEnvironment
from meshlb.balancing.client_weighted_round_robin import ClientWeightedRoundRobin
from meshlb.balancing.consistent_hash import ConsistentHash
from meshlb.balancing.ewma import PeakEwma
from meshlb.balancing.ip_hash import IPHash
from meshlb.balancing.least_connections import LeastConnections
from meshlb.balancing.least_response_time import LeastResponseTime
from meshlb.balancing.prequal import Prequal
from meshlb.balancing.random_choice import Random
from meshlb.balancing.registry import PolicyFactory, policy_names, register_policy, resolve_policy
from meshlb.balancing.round_robin import RoundRobin
from meshlb.balancing.weighted_round_robin import WeightedRoundRobin

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
    "Random",
    "RoundRobin",
    "WeightedRoundRobin",
    # parts
    "PeakEwma",
]
