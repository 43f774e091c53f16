"""Failover and zones: the options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshlb._validate import integer, number, text
from meshlb.errors import ConfigError
from meshlb.model import Endpoint
from meshlb.place import Place
from meshlb.topology.nearest import BY_NAME, Nearest
from meshlb.topology.sorting import ByFunction, ByLabel, ByTag, Complaints, Sorter

MODES: Final = ("active_passive", "active_active", "spill")
_LABELS: Final = ("datacenter", "zone", "region")
_KINDS: Final = (*_LABELS, "tag", "tag:NAME", "meta:KEY", "nearest", *BY_NAME)


@dataclass(frozen=True, slots=True)
class Failover:
    """Tiers of endpoints: which come first, and when others take over.

    What makes a tier:

    * ``by``: ``"datacenter"``, ``"zone"`` or ``"region"``; ``"tag"`` (the entries of ``order`` are tags) or
      ``"tag:NAME"`` (first those that carry it); ``"meta:KEY"``, a value of the meta data, numbers by size; a function
      of the endpoint that returns a number (0 first) or a text; or nearness: ``"nearest"``, which is
      ``NearestByRTT()``, ``NearestByRegion(...)`` or ``NearestByDistance(...)``.
    * ``order``: the tiers, first one first; ``"*"`` stands for all endpoints that no entry names, which are last
      otherwise. Empty: for datacenter, zone and region this process's own comes first, then all others together; for
      meta values and functions they are sorted.
    * ``datacenters``: the same as ``by="datacenter"`` with this order, and the registry is asked for each of them. For
      those that are not needed yet it is asked when the ones before them weaken, or from the start with ``prefetch``;
      what is known of them is kept.

    What tiers do:

    * ``mode``: ``"active_passive"`` (the first usable tier gets everything), ``"active_active"`` (all share), or
      ``"spill"`` (Envoy's priorities: what a tier cannot carry goes on to the next). None: spill for nearest,
      active_passive for the rest.
    * ``minimum_healthy``: share of a tier's endpoints that must be healthy for it to be used, active_passive (0.0: one
      is enough).
    * ``failback_delay``: seconds for which a tier must have been good again, without a break, before it gets its load
      back (30: longer than restarts and flapping checks take). Good: a share of ``failback_healthy`` of its endpoints
      is healthy (0.5, the panic threshold: below that a judgement is doubted). ``ramp``: seconds over which the load
      comes back (30: caches and pools are cold). All three: active_passive.
    * ``weights``: the share of each tier, by its name, active_active; None: by capacity, which is the sum of the
      weights of its healthy endpoints.
    * ``overprovisioning``: 1.4: a tier keeps its full load while 1 / 1.4 of its endpoints are healthy (Envoy).
    * ``max_ejection_percent``: takes the place of the service's (100: a tier whose endpoints are all held out by their
      breakers has to give way to the next; and when those of all tiers are, a panic uses them again).
    * ``max_in_flight``: calls in flight from this process to an endpoint, on average over a tier, above which the tier
      is full: what is beyond spills to the next tier (spill), or weighs against it (active_active by capacity). None:
      no limit.

    Raises ConfigError naming the field.
    """

    by: str | Nearest | Callable[[Endpoint], str | int] = "datacenter"
    order: Iterable[str] = ()
    datacenters: Iterable[str] = ()
    prefetch: bool = False
    mode: str | None = None
    minimum_healthy: float = 0.0
    failback_delay: float = 30.0
    failback_healthy: float = 0.5
    ramp: float = 30.0
    weights: Mapping[str, float] | None = None
    overprovisioning: float = 1.4
    max_ejection_percent: float = 100.0
    max_in_flight: float | None = None

    def __post_init__(self) -> None:
        for name in ("order", "datacenters"):
            object.__setattr__(self, name, _names(f"Failover.{name}", getattr(self, name)))
        if self.datacenters:
            if self.by != "datacenter" or self.order:
                raise ConfigError("Failover.datacenters: it is the order, by datacenter: leave out 'by' and 'order'")
            object.__setattr__(self, "order", self.datacenters)
        if self.by == "nearest":
            object.__setattr__(self, "by", BY_NAME["rtt"]())
        elif isinstance(self.by, str):
            self._check_kind(self.by)
        elif not isinstance(self.by, tuple(BY_NAME.values())) and not callable(self.by):
            raise ConfigError(f"Failover.by: {self.by!r} is none of {', '.join(_KINDS)}, nor a function")
        if self.mode is None:
            object.__setattr__(self, "mode", "spill" if self.nearest is not None else "active_passive")
        if self.mode not in MODES:
            raise ConfigError(f"Failover.mode: {self.mode!r} is none of {', '.join(MODES)}")
        if not isinstance(self.prefetch, bool):
            raise ConfigError(f"Failover.prefetch: {self.prefetch!r} is neither True nor False")
        number("Failover.minimum_healthy", self.minimum_healthy, least=0, most=1)
        number("Failover.failback_delay", self.failback_delay, least=0)
        number("Failover.failback_healthy", self.failback_healthy, least=0, most=1)
        number("Failover.ramp", self.ramp, least=0)
        number("Failover.overprovisioning", self.overprovisioning, least=1, most=100)
        number("Failover.max_ejection_percent", self.max_ejection_percent, least=0, most=100)
        _check_weights("Failover.weights", self.weights)
        if self.weights is not None and self.mode != "active_active":
            raise ConfigError("Failover.weights: only tiers that share the load (mode 'active_active') have weights")
        if self.max_in_flight is not None:
            number("Failover.max_in_flight", self.max_in_flight, above=0)

    def _check_kind(self, by: str) -> None:
        kind, separator, name = by.partition(":")
        if by in _LABELS or (kind in ("tag", "meta") and separator and name):
            return
        if by == "tag":
            if not self.order:
                raise ConfigError("Failover.order: tiers by tag need the tags, the first tier's first")
            return
        hint = " (it takes options: NearestByDistance(...))" if by == "distance" else ""
        raise ConfigError(f"Failover.by: {by!r} is none of {', '.join(_KINDS)}, nor a function{hint}")

    @property
    def nearest(self) -> Nearest | None:
        """The kind of nearness that makes the tiers, if that is it."""
        by = self.by
        return None if isinstance(by, str) or not isinstance(by, tuple(BY_NAME.values())) else by  # type: ignore[return-value]  # just checked

    @property
    def needs_place(self) -> bool:
        """Whether the tiers depend on where this process is, and the options do not say it."""
        if self.nearest is not None:
            return self.nearest.needs_place
        return self.by in _LABELS and not self.order

    def sorter(self, service: str) -> Sorter:
        """What puts a service's endpoints into the tiers."""
        complaints = Complaints(service)
        if self.nearest is not None:
            return self.nearest.sorter(complaints)
        by, order = self.by, tuple(self.order)
        if not isinstance(by, str):
            return ByFunction(by, order, complaints)  # type: ignore[arg-type]  # neither a text nor one of Nearest
        kind, _, name = by.partition(":")
        if kind == "tag":
            return ByTag(order or (name,))
        if kind == "meta":
            return ByLabel(lambda endpoint: endpoint.meta.get(name, ""), order, None, complaints, by)
        label, here = _PLACES[by]
        return ByLabel(label, order, here, complaints, by)


_PLACES: Final[Mapping[str, tuple[Callable[[Endpoint], str], Callable[[Place], str]]]] = {
    "datacenter": (lambda endpoint: endpoint.datacenter, lambda place: place.datacenter),
    "zone": (lambda endpoint: endpoint.zone, lambda place: place.zone),
    "region": (lambda endpoint: endpoint.region, lambda place: place.region),
}


@dataclass(frozen=True, slots=True)
class Zones:
    """Calls stay in this process's zone as far as its endpoints can carry them (Envoy's zone-aware routing); or, with
    ``weights``, zones share the load by weight and health (Envoy's locality-weighted balancing).

    * ``zone``: this process's own (None: MESHLB_ZONE, else the Consul agent's node meta ``zone``).
    * ``peers``: the name of this process's own service, from whose instances the registry's share of each zone in the
      calls is known. Needed without ``weights``, unless ``force_local``.
    * ``min_cluster_size``: below so many healthy endpoints zones are ignored (6: Envoy; a single endpoint more or less
      would move too much).
    * ``force_local``: everything stays in the zone while it has an endpoint, whatever the others have to carry.
    * ``weights``: the weight of each zone by its name (others: 1). ``overprovisioning``: 1.4: a zone keeps its full
      weight while 1 / 1.4 of its endpoints are healthy (Envoy).

    Applies within each tier. Raises ConfigError naming the field.
    """

    zone: str | None = None
    peers: str | None = None
    min_cluster_size: int = 6
    force_local: bool = False
    weights: Mapping[str, float] | None = None
    overprovisioning: float = 1.4

    def __post_init__(self) -> None:
        for name in ("zone", "peers"):
            if getattr(self, name) is not None:
                text(f"Zones.{name}", getattr(self, name))
        integer("Zones.min_cluster_size", self.min_cluster_size, least=0)
        if not isinstance(self.force_local, bool):
            raise ConfigError(f"Zones.force_local: {self.force_local!r} is neither True nor False")
        _check_weights("Zones.weights", self.weights)
        number("Zones.overprovisioning", self.overprovisioning, least=1, most=100)
        if self.weights is None and not self.force_local and not self.peers:
            raise ConfigError(
                "Zones.peers: zone-aware routing needs the name of this process's own service, "
                "since the capacity of zones is shared out among its instances (or give weights, or force_local)"
            )
        if self.weights is not None and (self.force_local or self.peers):
            raise ConfigError("Zones.weights: weights decide alone; leave out 'peers' and 'force_local'")

    @property
    def needs_place(self) -> bool:
        """Whether this process's zone has to be found out."""
        return self.zone is None


def _names(field: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise ConfigError(f"{field}: {names!r} is not a list of names")
    found = tuple(names)
    for name in found:
        text(field, name)
        if not name or found.count(name) > 1:
            raise ConfigError(f"{field}: {name!r} is {'given twice' if name else 'no name'}")
    return found


def _check_weights(field: str, weights: object) -> None:
    if weights is None:
        return
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"{field}: {weights!r} is not a mapping of name to weight")
    for name, weight in weights.items():
        text(field, name)
        number(f"{field}[{name!r}]", weight, least=0)
    if not any(weights.values()):
        raise ConfigError(f"{field}: all of them are 0")
