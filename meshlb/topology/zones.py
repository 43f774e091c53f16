"""Zones: how much of a zone's traffic stays in it, and where the rest goes. Pure functions over plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

FULL = 10_000
"""Shares are in basis points, rounded down, as in Envoy."""


@dataclass(frozen=True, slots=True)
class ZoneRouting:
    """What Envoy's zone-aware routing decides for the callers in one zone.

    ``local``: basis points of their traffic that stay in the zone. ``residual``: capacity (basis points of the service)
    that each zone has left over for callers from elsewhere; what does not stay is split in proportion to it, and over
    all zones alike if rounding has left none.
    """

    local_zone: str
    local: int
    residual: Mapping[str, int]

    @property
    def cumulative(self) -> tuple[int, ...]:
        """The running totals of ``residual``, which Envoy draws its zone from."""
        return tuple(accumulate(self.residual.values()))

    def shares(self) -> dict[str, float]:
        """The share of the traffic that goes to each zone; they add up to 1."""
        total = sum(self.residual.values())
        across = 1 - self.local / FULL
        if total:
            shares = {zone: across * residual / total for zone, residual in self.residual.items()}
        else:
            shares = dict.fromkeys(self.residual, across / len(self.residual))
        shares[self.local_zone] += self.local / FULL
        return shares


def zone_routing(
    callers: Mapping[str, int],
    endpoints: Mapping[str, int],
    zone: str,
    *,
    min_cluster_size: int = 6,
    force_local: bool = False,
) -> ZoneRouting | None:
    """Envoy's zone-aware routing (``regenerateLocalityRoutingStructures``) for a caller in ``zone``.

    ``callers`` and ``endpoints``: how many instances of the calling service, and how many healthy ones of the called
    one, each zone has. If the zone has at least the share of the endpoints that it has of the callers, all traffic
    stays; otherwise what its endpoints can take, and the rest goes where callers are fewer than endpoints. So every
    endpoint gets the same load although most calls stay in their zone.

    None if it does not apply, and zones are to be ignored: fewer endpoints than ``min_cluster_size``, fewer than two
    zones on either side, no endpoint in this zone, or no caller known in it.

    ``force_local``: all traffic stays, whatever the capacity (Envoy's ``force_locality_direct_routing``).
    """
    served = {name: count for name, count in endpoints.items() if count > 0}
    calling = {name: count for name, count in callers.items() if count > 0}
    total, total_callers = sum(served.values()), sum(calling.values())
    if total < min_cluster_size or len(served) < 2 or zone not in served:
        return None
    residual = dict.fromkeys(served, 0)
    if force_local:
        return ZoneRouting(zone, FULL, residual)
    if len(calling) < 2 or zone not in calling:
        return None
    supply = {name: FULL * count // total for name, count in served.items()}
    demand = {name: FULL * calling.get(name, 0) // total_callers for name in served}
    if supply[zone] >= demand[zone]:
        return ZoneRouting(zone, FULL, residual)
    residual = {name: max(0, supply[name] - demand[name]) for name in served}
    return ZoneRouting(zone, supply[zone] * FULL // demand[zone], residual)


def locality_weight(weight: float, healthy: int, total: int, overprovisioning: int = 140) -> float:
    """A zone's weight by its health: ``weight * min(1, overprovisioning / 100 * healthy / total)``, 0 without
    endpoints (Envoy ``effectiveLocalityWeight``). The load is then split in proportion."""
    if total <= 0:
        return 0.0
    return weight * min(1.0, overprovisioning / 100.0 * (1.0 * healthy / total))


def headroom_weights(hosts: Sequence[float], utilizations: Sequence[float]) -> list[float]:
    """Weights by what is still free: ``hosts * (1 - utilization)``, never below 0 (Envoy's load-aware locality
    policy). ``utilization``: 0 idle, 1 full."""
    return [count * max(0.0, 1.0 - used) for count, used in zip(hosts, utilizations, strict=True)]
