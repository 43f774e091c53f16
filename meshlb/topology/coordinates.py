"""Distances: estimated round-trip times from Consul's network coordinates, and kilometres on the globe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from meshlb.place import Coordinate

__all__ = ["EARTH_RADIUS", "Coordinate", "great_circle", "median_round_trip_time", "round_trip_time"]

EARTH_RADIUS: Final = 6371.0088
"""Kilometres: the mean radius (IUGG)."""


def round_trip_time(one: Coordinate | None, other: Coordinate | None) -> float:
    """Seconds from one node to the other and back, as estimated; infinite if a coordinate is missing, is not finite,
    or has another number of dimensions than the other one (they are of different spaces: any number would be a guess).

    ``|v1 - v2| + h1 + h2``, plus both adjustments unless that makes it 0 or less (serf ``DistanceTo``).
    """
    if one is None or other is None or len(one.vec) != len(other.vec) or not (one.usable and other.usable):
        return math.inf
    raw = math.dist(one.vec, other.vec) + one.height + other.height
    adjusted = raw + one.adjustment + other.adjustment
    return adjusted if adjusted > 0.0 else raw


def median_round_trip_time(ours: Iterable[Coordinate], theirs: Iterable[Coordinate]) -> float:
    """Seconds between two groups of servers: the median over all pairs (as Consul sorts datacenters); infinite if
    there is none."""
    theirs = tuple(theirs)
    times = sorted(round_trip_time(one, other) for one in ours for other in theirs)
    known = [time for time in times if time != math.inf]
    return known[len(known) // 2] if known else math.inf


def great_circle(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Kilometres on the globe between two places, each (latitude, longitude) in degrees (haversine formula).

    >>> round(great_circle((52.52, 13.405), (48.8566, 2.3522)))
    877
    """
    (lat1, lon1), (lat2, lon2) = ((math.radians(lat), math.radians(lon)) for lat, lon in (one, other))
    half = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * EARTH_RADIUS * math.asin(min(1.0, math.sqrt(half)))
