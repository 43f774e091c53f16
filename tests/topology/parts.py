"""Endpoints with plain fields, and what lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from meshlb import Endpoint, Failover, Status, Zones
from meshlb.testing import FakeClock
from meshlb.topology.layout import Layout
from meshlb.topology.tiers import Topology


@dataclass(eq=False)
class Member:
    endpoint: Endpoint
    in_flight: int = 0
    weight: float = field(default=1.0)
    is_open: bool = False
    is_forced_open: bool = False
    is_unhealthy: bool = False
    is_unchecked: bool = False

    def __repr__(self) -> str:
        return self.endpoint.address


_numbers = iter(range(1, 1_000_000))


def members(count: int, *, down: int = 0, **fields: Any) -> list[Member]:
    """``count`` endpoints of which ``down`` are critical, with further fields of Endpoint."""
    made = []
    for i in range(count):
        number = next(_numbers)
        status = Status.CRITICAL if i < down else Status.PASSING
        host = f"10.{number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
        made.append(Member(Endpoint(host, 80, status=status, **fields)))
    return made


def topology(
    failover: Failover | None = None,
    zones: Zones | None = None,
    *,
    clock: FakeClock | None = None,
    panic_threshold: float = 0.5,
) -> Topology[Member]:
    return Topology("orders", failover, zones, panic_threshold=panic_threshold, clock=clock or FakeClock())


def shares(layout: Layout[Member]) -> dict[str, float]:
    """What each tier gets, by its name."""
    return {tier.name: round(tier.share, 4) for tier in layout.tiers}


def group_shares(layout: Layout[Member]) -> dict[str, float]:
    return {group.name: round(group.share, 4) for group in layout.groups}


def flat(*parts: Sequence[Member]) -> list[Member]:
    return [member for part in parts for member in part]
