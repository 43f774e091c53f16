"""Which endpoints may be called at all, and how much of each, before a policy chooses among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlb._lazy import lazily
from meshlb.topology.eligibility import Eligibility, Standing, judge

if TYPE_CHECKING:
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

__getattr__ = lazily(
    __name__,
    {
        "DeterministicAperture": "meshlb.topology.subset_options",
        "Failover": "meshlb.topology.failover",
        "NearestByDistance": "meshlb.topology.nearest",
        "NearestByRTT": "meshlb.topology.nearest",
        "NearestByRegion": "meshlb.topology.nearest",
        "RendezvousSubset": "meshlb.topology.subset_options",
        "SlowStart": "meshlb.topology.slow_start",
        "Zones": "meshlb.topology.failover",
    },
)


def __dir__() -> list[str]:
    return __all__
