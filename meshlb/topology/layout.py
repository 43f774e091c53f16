"""What comes of tiers and zones: groups of endpoints with shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from meshlb.topology.eligibility import Eligibility, Judged


class Member(Judged, Protocol):
    """What is read of an endpoint."""

    @property
    def in_flight(self) -> int: ...


MemberT = TypeVar("MemberT", bound=Member)


@dataclass(frozen=True, slots=True)
class Group(Generic[MemberT]):
    """Endpoints that a policy chooses among. ``share``: of all calls, 0 for a group that only retries get to."""

    name: str
    tier: int
    members: tuple[MemberT, ...]
    share: float
    panic: bool


@dataclass(frozen=True, slots=True)
class Tier:
    """How a tier stands, for the snapshot. ``reason``: why it gets what it gets, in words."""

    name: str
    endpoints: int
    healthy: int
    share: float
    panic: bool
    reason: str

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "endpoints": self.endpoints,
            "healthy": self.healthy,
            "share": round(self.share, 6),
            "panic": self.panic,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Layout(Generic[MemberT]):
    """Who may be called, in groups. Within a tier groups stand side by side; tiers are in order of preference."""

    groups: tuple[Group[MemberT], ...]
    tiers: tuple[Tier, ...]
    tier_of: Mapping[MemberT, int]
    next_change: float | None
    """Seconds until it should be made anew although nothing has happened; None: not by itself."""
    needed: int
    """How many of the tiers, from the first on, are in use or needed to carry the full load; one more than there are,
    if all of them cannot."""

    @property
    def judged(self) -> Eligibility[MemberT]:
        """All that may be called, of whatever tier, and whether any of them is in panic."""
        eligible = tuple(member for group in self.groups for member in group.members)
        return Eligibility(eligible, any(group.panic for group in self.groups))

    def panics(self, member: MemberT) -> bool:
        """Whether the tier of an endpoint is in panic."""
        tier = self.tier_of.get(member)
        return tier is not None and self.tiers[tier].panic
