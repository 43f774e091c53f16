"""Which endpoints may be called at all, and how much of each, before a policy chooses among them."""

from __future__ import annotations

from meshlb.topology.eligibility import Eligibility, Standing, judge
from meshlb.topology.failover import Failover, Zones
from meshlb.topology.nearest import NearestByDistance, NearestByRegion, NearestByRTT
from meshlb.topology.slow_start import SlowStart
from meshlb.topology.subset_options import DeterministicAperture, RendezvousSubset

__all__ = [
    # options
    "DeterministicAperture",
    "Failover",
    "NearestByDistance",
    "NearestByRTT",
    "NearestByRegion",
    "RendezvousSubset",
    "SlowStart",
    "Zones",
    # what is judged
    "Eligibility",
    "Standing",
    "judge",
]
