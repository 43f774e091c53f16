"""Nearest first: tiers by round-trip time, by region, or by distance on the globe.

Distance makes tiers, never weights: as a multiplier of load it would send all callers of a rack to one endpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Final

from meshlb._validate import number, text
from meshlb.errors import ConfigError
from meshlb.model import Endpoint
from meshlb.place import NetworkCoordinates, Place, parse_location
from meshlb.topology.coordinates import great_circle, median_round_trip_time, round_trip_time
from meshlb.topology.sorting import OTHER, UNKNOWN, Complaints, Sorted, sort_by_order

_LEAST_WIDTH: Final = 1.25
"""Between two steps: Consul's coordinates are wrong by 5 to 10 % on average."""


@dataclass(frozen=True, slots=True)
class NearestByRTT:
    """Tiers by the round-trip time that Consul's network coordinates estimate.

    * ``steps``: seconds at which a tier ends and the next begins ((0.002, 0.005, ...): the same datacenter, the same
      city, the same country, and so on; each at least a quarter above the one before, since the estimates are not
      better).
    * ``hysteresis``: by how much of a step an endpoint must be beyond it to change its tier (0.2: twice the average
      error).
    * ``max_error``: coordinates less certain than this count as unknown (1.0; a node that knows nothing has 1.5).
    * ``interval``: seconds between two looks at the coordinates (45: they change every few seconds, and mean nothing
      new for minutes).

    Endpoints without a usable coordinate are in the last tier. Raises ConfigError naming the field.
    """

    steps: Sequence[float] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    hysteresis: float = 0.2
    max_error: float = 1.0
    interval: float = 45.0

    name: ClassVar[str] = "rtt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _steps("NearestByRTT.steps", self.steps, _LEAST_WIDTH))
        number("NearestByRTT.hysteresis", self.hysteresis, least=0, most=0.9)
        number("NearestByRTT.max_error", self.max_error, above=0)
        number("NearestByRTT.interval", self.interval, least=1)

    @property
    def needs_place(self) -> bool:
        return True

    def sorter(self, complaints: Complaints) -> RTTSorter:
        return RTTSorter(self, complaints)


@dataclass(frozen=True, slots=True)
class NearestByRegion:
    """Tiers by a table: for each region, the others in order of nearness.

    ``table``: ``{"eu-west": ("eu-central", "us-east"), ...}``; a region is always nearest to itself, and regions that
    its line does not name are last. ``region``: this process's own (None: MESHLB_REGION, else the Consul agent's node
    meta ``region``). An endpoint's region: its meta ``region``, else its node's. Raises ConfigError naming the field.
    """

    table: Mapping[str, Sequence[str]] = field(default_factory=dict)
    region: str | None = None

    name: ClassVar[str] = "region"

    def __post_init__(self) -> None:
        if not isinstance(self.table, Mapping) or not all(
            isinstance(line, list | tuple) and all(isinstance(entry, str) for entry in (region, *line))
            for region, line in self.table.items()
        ):
            raise ConfigError(f"NearestByRegion.table: {self.table!r} is not a mapping of region to a list of regions")
        if self.region is not None:
            text("NearestByRegion.region", self.region)

    @property
    def needs_place(self) -> bool:
        return self.region is None

    def sorter(self, complaints: Complaints) -> RegionSorter:
        return RegionSorter(self, complaints)


@dataclass(frozen=True, slots=True)
class NearestByDistance:
    """Tiers by the great-circle distance to the place that an endpoint's meta names.

    ``steps``: kilometres at which a tier ends ((100, 1000, 5000): the same metropolis, country, continent).
    ``location``: this process's own latitude and longitude in degrees (None: MESHLB_LOCATION, as "52.52,13.40", else
    the Consul agent's node meta). ``latitude`` and ``longitude``: the names of the meta keys. Endpoints without them
    are in the last tier. Raises ConfigError naming the field.
    """

    steps: Sequence[float] = (100.0, 1000.0, 5000.0)
    location: Sequence[float] | None = None
    latitude: str = "latitude"
    longitude: str = "longitude"

    name: ClassVar[str] = "distance"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _steps("NearestByDistance.steps", self.steps, 1.0))
        text("NearestByDistance.latitude", self.latitude)
        text("NearestByDistance.longitude", self.longitude)
        if self.location is not None:
            degrees = tuple(self.location) if isinstance(self.location, list | tuple) else ()
            if len(degrees) != 2 or parse_location(*map(str, degrees)) is None:
                raise ConfigError(
                    f"NearestByDistance.location: {self.location!r} is not (latitude, longitude) in degrees"
                )
            object.__setattr__(self, "location", degrees)

    @property
    def needs_place(self) -> bool:
        return self.location is None

    def sorter(self, complaints: Complaints) -> DistanceSorter:
        return DistanceSorter(self, complaints)


Nearest = NearestByRTT | NearestByRegion | NearestByDistance


class RTTSorter:
    """Remembers the step that each node is on, so that it does not change with every estimate."""

    def __init__(self, options: NearestByRTT, complaints: Complaints) -> None:
        self._options = options
        self._complaints = complaints
        self._names = _names(options.steps, 1000.0, "ms")
        self._on: dict[str, int] = {}

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        coordinates = place.coordinates
        if coordinates is None:
            if place.asked:
                self._complaints.make("own", "network coordinates are not known: all endpoints are one tier")
            return Sorted((UNKNOWN,), (UNKNOWN,) * len(endpoints))
        times: dict[str, float] = {}
        on: dict[str, int] = {}
        tiers = []
        for endpoint in endpoints:
            key = f"{endpoint.datacenter}/{endpoint.node}"
            if key not in times:
                times[key] = time = self._time(endpoint, coordinates, place)
                if time != math.inf:
                    on[key] = step_of(time, self._options.steps, self._options.hysteresis, self._on.get(key))
            tiers.append(self._names[on[key]] if key in on else UNKNOWN)
        self._on = on
        return Sorted((*self._names, UNKNOWN), tuple(tiers))

    def _time(self, endpoint: Endpoint, coordinates: NetworkCoordinates, place: Place) -> float:
        if endpoint.datacenter and place.datacenter and endpoint.datacenter != place.datacenter:
            # Nodes of two datacenters have no common space; their servers have.
            ours, theirs = (
                [one for one in coordinates.datacenters.get(name, ()) if one.error <= self._options.max_error]
                for name in (place.datacenter, endpoint.datacenter)
            )
            return median_round_trip_time(ours, theirs)
        if endpoint.node and endpoint.node == place.node:
            return 0.0
        found = coordinates.nodes.get(endpoint.node)
        own = coordinates.own
        if found is None or own is None:
            self._complaints.make("missing", "no network coordinate of node %r: last tier", endpoint.node)
            return math.inf
        if max(own.error, found.error) > self._options.max_error:
            self._complaints.make(
                "error", "the network coordinate of node %r, or our own, is not certain yet: last tier", endpoint.node
            )
            return math.inf
        time = round_trip_time(own, found)
        if time == math.inf:
            self._complaints.make(
                "shape",
                "the network coordinate of node %r is of another kind than ours (%d dimensions, not %d): last tier",
                endpoint.node,
                len(found.vec),
                len(own.vec),
            )
        return time


class RegionSorter:
    """Looks its own region's line up."""

    def __init__(self, options: NearestByRegion, complaints: Complaints) -> None:
        self._options = options
        self._complaints = complaints

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        region = self._options.region or place.region
        if not region:
            if place.asked:
                self._complaints.make("here", "our own region is not known: all endpoints are one tier")
            return Sorted((OTHER,), (OTHER,) * len(endpoints))
        line = [entry for entry in self._options.table.get(region, ()) if entry != region]
        return sort_by_order([endpoint.region for endpoint in endpoints], (region, *dict.fromkeys(line)))


class DistanceSorter:
    """Distances do not change, so there is nothing to remember."""

    def __init__(self, options: NearestByDistance, complaints: Complaints) -> None:
        self._options = options
        self._complaints = complaints
        self._names = _names(options.steps, 1.0, "km")

    def sort(self, endpoints: Sequence[Endpoint], place: Place) -> Sorted:
        options = self._options
        here = place.location if options.location is None else (options.location[0], options.location[1])
        if here is None:
            if place.asked:
                self._complaints.make("here", "our own location is not known: all endpoints are one tier")
            return Sorted((UNKNOWN,), (UNKNOWN,) * len(endpoints))
        tiers = []
        for endpoint in endpoints:
            there = parse_location(endpoint.meta.get(options.latitude), endpoint.meta.get(options.longitude))
            if there is None:
                self._complaints.make(
                    "there", "no usable latitude and longitude in the meta of %s: last tier", endpoint.address
                )
            tiers.append(UNKNOWN if there is None else self._names[step_of(great_circle(here, there), options.steps)])
        return Sorted((*self._names, UNKNOWN), tuple(tiers))


def step_of(distance: float, steps: Sequence[float], hysteresis: float = 0.0, former: int | None = None) -> int:
    """How many steps a distance is beyond. It leaves ``former`` only if it is beyond a step by ``hysteresis`` (a share
    of the step) on the other side."""
    if former is None:
        return sum(distance > step for step in steps)
    nearest = sum(distance > step * (1.0 + hysteresis) for step in steps)
    farthest = sum(distance > step * (1.0 - hysteresis) for step in steps)
    return min(max(former, nearest), farthest)


def _names(steps: Sequence[float], scale: float, unit: str) -> tuple[str, ...]:
    ends = [f"{step * scale:g} {unit}" for step in steps]
    return (*(f"up to {end}" for end in ends), f"beyond {ends[-1]}")


def _steps(name: str, steps: object, width: float) -> tuple[float, ...]:
    if not isinstance(steps, list | tuple) or not steps:
        raise ConfigError(f"{name}: {steps!r} is not a list of numbers")
    for step in steps:
        number(name, step, above=0)
    for one, next_one in pairwise(steps):
        if not next_one > one or next_one < one * width:
            more = f" by a factor of {width:g} at least" if width > 1 else ""
            raise ConfigError(f"{name}: {next_one!r} after {one!r}: each step must be above the one before{more}")
    return tuple(steps)


BY_NAME: Final[Mapping[str, type[Nearest]]] = {
    kind.name: kind for kind in (NearestByRTT, NearestByRegion, NearestByDistance)
}
