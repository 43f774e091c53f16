"""From endpoints to groups with shares: tiers first, then the zones within each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic

from meshlb.model import Endpoint, Status
from meshlb.place import NOWHERE, Place
from meshlb.topology.eligibility import Eligibility, judge
from meshlb.topology.failback import ActivePassive, TierHealth
from meshlb.topology.failover import Failover, Zones
from meshlb.topology.headroom import Headroom
from meshlb.topology.layout import Group, Layout, MemberT, Tier
from meshlb.topology.priority import PriorityLevel, PriorityLoad, availability, priority_load
from meshlb.topology.sorting import OTHER
from meshlb.topology.zones import headroom_weights, locality_weight, zone_routing

_EVERYBODY: Final = 2.0
"""A panic threshold that any set of endpoints is below: to know who would be used in a panic."""

ALL: Final = "all"
"""The one tier of a service without failover."""


class Topology(Generic[MemberT]):
    """Lays out one service's endpoints. Remembers what failing back and headroom need. Not safe by itself: its cluster
    serialises changes."""

    def __init__(
        self,
        service: str,
        failover: Failover | None,
        zones: Zones | None,
        *,
        panic_threshold: float,
        clock: Callable[[], float],
    ) -> None:
        self._failover = failover
        self._zones = zones
        self._panic_percent = round(panic_threshold * 100)
        self._clock = clock
        self._sorter = None if failover is None else failover.sorter(service)
        self._active = ActivePassive(failover.failback_delay, failover.ramp) if failover is not None else None
        self._headroom: dict[str, Headroom] = {}
        self._laid_out: dict[str, tuple[tuple[MemberT, ...], int]] = {}
        """The members of each tier, and how many of them are healthy, as of the last layout."""
        self.place: Place = NOWHERE
        """Where this process is; set by whoever finds it out."""
        self.silent: frozenset[str] = frozenset()
        """Tiers that the registry has not told of: it has not been asked yet, or has not answered."""
        self.peers: Mapping[str, int] = {}
        """How many instances of this process's own service each zone has."""

    def peers_changed(self, peers: Sequence[Endpoint]) -> bool:
        """Take over the instances of this process's own service. True if that makes a difference."""
        former = self.peers
        self.peers = Counter(
            peer.zone for peer in peers if peer.zone and peer.status not in (Status.CRITICAL, Status.MAINTENANCE)
        )
        return self._zones is not None and self.peers != former

    def divide(self, members: Sequence[MemberT]) -> list[tuple[MemberT, ...]]:
        """The endpoints of each tier, healthy or not."""
        return self._sort(members)[1]

    def lay_out(self, members: Sequence[MemberT]) -> Layout[MemberT]:
        """The groups as things stand now."""
        now = self._clock()
        names, parts = self._sort(members)
        judged = [judge(part, 0.0) for part in parts]
        usable = [judge(part, _EVERYBODY).eligible for part in parts]
        levels = [PriorityLevel(len(all_), len(fit.eligible)) for all_, fit in zip(usable, judged, strict=True)]
        load = priority_load(
            levels,
            overprovisioning=self._overprovisioning,
            panic_threshold=self._panic_percent,
            limits=[self._limit(name) for name in names] if self._headroom else None,
        )
        shares, panic, reasons, next_change = self._share(names, judged, levels, load, now)
        groups: list[Group[MemberT]] = []
        for tier, name in enumerate(names):
            fit = usable[tier] if panic[tier] else judged[tier].eligible
            if fit:
                groups += self._zoned(tier, name, fit, usable[tier], shares[tier], panic=panic[tier])
        self._laid_out = {name: (parts[i], len(judged[i].eligible)) for i, name in enumerate(names)}
        return Layout(
            tuple(groups),
            tuple(
                Tier(name, len(parts[i]), levels[i].healthy, shares[i], panic[i], reasons[i])
                for i, name in enumerate(names)
            ),
            {member: tier for tier, part in enumerate(parts) for member in part},
            next_change,
            self._needed(levels, shares),
        )

    # -- tiers -------------------------------------------------------------------------------------------------

    @property
    def _overprovisioning(self) -> int:
        return 140 if self._failover is None else round(self._failover.overprovisioning * 100)

    def _sort(self, members: Sequence[MemberT]) -> tuple[list[str], list[tuple[MemberT, ...]]]:
        if self._sorter is None:
            return [ALL], [tuple(members)]
        found = self._sorter.sort([member.endpoint for member in members], self.place)
        parts: dict[str, list[MemberT]] = {name: [] for name in found.names}
        for member, tier in zip(members, found.tiers, strict=True):
            parts[tier].append(member)
        wanted = () if self._failover is None else tuple(self._failover.order)
        # A tier that was asked for is shown even if it is empty; the others only if there is somebody in it.
        kept = [name for name, part in parts.items() if part or name in wanted]
        return (kept, [tuple(parts[name]) for name in kept]) if kept else ([OTHER], [()])

    def _needed(self, levels: list[PriorityLevel], shares: list[float]) -> int:
        able = 0
        in_use = max((i + 1 for i, share in enumerate(shares) if share), default=0)
        for i, level in enumerate(levels, 1):
            able += availability(level.healthy, level.counted, self._overprovisioning)
            if able >= 100:
                return max(i, in_use)
        return len(levels) + 1

    def _share(
        self,
        names: list[str],
        judged: list[Eligibility[MemberT]],
        levels: list[PriorityLevel],
        load: PriorityLoad,
        now: float,
    ) -> tuple[list[float], tuple[bool, ...], list[str], float | None]:
        """Shares, panic and reasons of the tiers, and the seconds until they change by themselves."""
        mode = "spill" if self._failover is None else self._failover.mode
        panic = load.panic
        reasons = [_reason(level, silent=name in self.silent) for name, level in zip(names, levels, strict=True)]
        next_change: float | None = None
        if all(panic) or mode == "spill":
            shares = [percent / 100 for percent in load.healthy]
        elif mode == "active_active":
            shares = self._by_weight(names, judged, levels)
        else:
            shares, next_change = self._active_passive(names, levels, panic, reasons, now)
        # Tiers that share by weight, and one that carries all, give way to better ones rather than panic.
        panic = tuple(
            panics and share > 0 and (mode == "spill" or all(load.panic))
            for panics, share in zip(panic, shares, strict=True)
        )
        return _normalised(shares, levels, panic), panic, reasons, next_change

    def _active_passive(
        self, names: list[str], levels: list[PriorityLevel], panic: tuple[bool, ...], reasons: list[str], now: float
    ) -> tuple[list[float], float | None]:
        failover, active = self._failover, self._active
        assert failover is not None and active is not None
        able = [level.healthy > 0 and not panics for level, panics in zip(levels, panic, strict=True)]
        enough = [
            fit and level.healthy >= failover.minimum_healthy * level.counted
            for fit, level in zip(able, levels, strict=True)
        ]
        tiers = [
            TierHealth(name, fit, fit and level.healthy >= failover.failback_healthy * level.counted)
            for name, fit, level in zip(names, enough if any(enough) else able, levels, strict=True)
        ]
        shares = active.shares(tiers, now)
        for i, name in enumerate(names):
            if name == active.active:
                break
            if (left := active.waits(name, now)) is not None:
                reasons[i] = f"good again; gets the load back in {left:.0f} s"
        return [shares.get(name, 0.0) for name in names], active.next_change(tiers, now)

    def _by_weight(
        self, names: list[str], judged: list[Eligibility[MemberT]], levels: list[PriorityLevel]
    ) -> list[float]:
        failover = self._failover
        assert failover is not None
        if failover.weights is not None:
            return [
                locality_weight(failover.weights.get(name, 0.0), level.healthy, level.counted, self._overprovisioning)
                for name, level in zip(names, levels, strict=True)
            ]
        capacities = [sum(member.endpoint.weight for member in fit.eligible) for fit in judged]
        used = [self._headroom[name].utilization if name in self._headroom else 0.0 for name in names]
        free = headroom_weights(capacities, used)
        return free if any(free) else capacities

    # -- headroom ----------------------------------------------------------------------------------------------

    @property
    def measures(self) -> bool:
        """Whether ``measure`` is to be called, every ``headroom.INTERVAL`` seconds."""
        return self._failover is not None and self._failover.max_in_flight is not None

    def measure(self) -> bool:
        """See how busy the tiers are. True if that changes their shares."""
        places = 0.0 if self._failover is None else self._failover.max_in_flight or 0.0
        now = self._clock()
        self._headroom = {name: self._headroom.get(name) or Headroom() for name in self._laid_out}
        moved = False
        for name, (part, fit) in self._laid_out.items():
            used = sum(member.in_flight for member in part) / (places * fit) if fit else 0.0
            moved |= self._headroom[name].measure(used, now)
        return moved

    def _limit(self, name: str) -> float:
        headroom = self._headroom.get(name)
        return 1.0 if headroom is None else headroom.limit

    # -- zones -------------------------------------------------------------------------------------------------

    def _zoned(
        self,
        tier: int,
        name: str,
        fit: tuple[MemberT, ...],
        usable: tuple[MemberT, ...],
        share: float,
        *,
        panic: bool,
    ) -> list[Group[MemberT]]:
        shares = None if panic else self._zone_shares(fit, usable)  # as in Envoy, a panic knows no zones
        if shares is None:
            return [Group(name, tier, fit, share, panic)]
        parts: dict[str, list[MemberT]] = {}
        for member in fit:
            parts.setdefault(member.endpoint.zone, []).append(member)
        here = self._here
        order = sorted(parts, key=lambda zone: (zone != here, -shares.get(zone, 0.0), zone))
        return [
            Group(f"{name}/{zone}", tier, tuple(parts[zone]), share * shares.get(zone, 0.0), panic) for zone in order
        ]

    @property
    def _here(self) -> str:
        return (self._zones.zone if self._zones is not None else None) or self.place.zone

    def _zone_shares(self, fit: tuple[MemberT, ...], usable: tuple[MemberT, ...]) -> Mapping[str, float] | None:
        """The share of each zone in the calls of its tier; None if zones do not matter."""
        zones = self._zones
        if zones is None:
            return None
        healthy = Counter(member.endpoint.zone for member in fit)
        if len(healthy) < 2:
            return None
        if zones.weights is not None:
            counted = Counter(member.endpoint.zone for member in usable)
            percent = round(zones.overprovisioning * 100)
            weights = {
                zone: locality_weight(zones.weights.get(zone, 1.0), count, counted[zone], percent)
                for zone, count in healthy.items()
            }
            total = sum(weights.values())
            return {zone: weight / total for zone, weight in weights.items()} if total else None
        routing = zone_routing(
            self.peers,
            healthy,
            self._here,
            min_cluster_size=zones.min_cluster_size,
            force_local=zones.force_local,
        )
        return None if routing is None else routing.shares()


def _reason(level: PriorityLevel, *, silent: bool) -> str:
    if not level.hosts:
        return "not asked for yet, or no answer" if silent else "no endpoints"
    return "" if level.healthy else "no healthy endpoint"


def _normalised(shares: list[float], levels: list[PriorityLevel], panic: Sequence[bool]) -> list[float]:
    """Shares that add up to 1, of tiers that have somebody to give them to."""
    kept = [
        share if level.healthy or (panics and level.hosts) else 0.0
        for share, level, panics in zip(shares, levels, panic, strict=True)
    ]
    total = sum(kept)
    if total:
        return [share / total for share in kept]
    # All weights 0, or all weight on tiers without endpoints: the first that has any.
    first = next((i for i, level in enumerate(levels) if level.healthy), None)
    return [1.0 if i == first else 0.0 for i in range(len(levels))]
