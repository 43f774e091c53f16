"""Where this process is, and where the nodes of the network are: what zones and nearest go by."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

ZONE_VARIABLE: Final = "MESHLB_ZONE"
REGION_VARIABLE: Final = "MESHLB_REGION"
LOCATION_VARIABLE: Final = "MESHLB_LOCATION"
"""Environment variables that say where the process is; they win over what the registry's agent says. The location is
"latitude,longitude" in degrees."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A node's place in Consul's network coordinate space (Vivaldi with height and adjustment; serf ``coordinate.go``).

    ``vec``: the position, in seconds. ``height``: the node's own access link, in seconds. ``adjustment``: a correction,
    in seconds, of either sign. ``error``: 0 (certain) to 1.5 (knows nothing yet).
    """

    vec: tuple[float, ...]
    height: float = 0.0
    adjustment: float = 0.0
    error: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether it is a place at all: finite, with at least one dimension."""
        numbers = (*self.vec, self.height, self.adjustment, self.error)
        return bool(self.vec) and all(math.isfinite(number) for number in numbers)


@dataclass(frozen=True, slots=True)
class NetworkCoordinates:
    """What the registry knows of the network: our own coordinate and those of the nodes of our datacenter (one space),
    and those of the servers of every datacenter (another space, which must not be mixed with the first)."""

    own: Coordinate | None = None
    nodes: Mapping[str, Coordinate] = field(default_factory=lambda: MappingProxyType({}))
    datacenters: Mapping[str, tuple[Coordinate, ...]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process is. An empty text or None: not known."""

    datacenter: str = ""
    node: str = ""
    zone: str = ""
    region: str = ""
    location: tuple[float, float] | None = None
    """Latitude and longitude in degrees."""
    coordinates: NetworkCoordinates | None = None
    asked: bool = False
    """The registry has been asked: what is not known now is not merely not known yet."""


NOWHERE: Final = Place()


def place_from_environment(environment: Mapping[str, str] | None = None) -> Place:
    """What the environment variables say; one that cannot be read says nothing."""
    environment = os.environ if environment is None else environment
    return Place(
        zone=environment.get(ZONE_VARIABLE, ""),
        region=environment.get(REGION_VARIABLE, ""),
        location=parse_location(*environment.get(LOCATION_VARIABLE, "").partition(",")[::2]),
    )


def parse_location(latitude: str | None, longitude: str | None) -> tuple[float, float] | None:
    """Two numbers in degrees as they stand in a registry; None if they are missing or no place on the globe."""
    try:
        found = float(latitude or ""), float(longitude or "")
    except ValueError:
        return None
    return found if abs(found[0]) <= 90 and abs(found[1]) <= 180 else None  # also None for NaN
