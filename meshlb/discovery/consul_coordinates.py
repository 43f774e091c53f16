"""Where Consul says that this process and all nodes are: the agent's meta data, and the network coordinates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from meshlb.discovery.consul_errors import refused, unreadable
from meshlb.place import Coordinate, NetworkCoordinates, Place, parse_location

if TYPE_CHECKING:
    from meshlb.discovery.consul_client import AsyncConsul
    from meshlb.discovery.consul_settings import ConsulSettings


async def ask_place(client: AsyncConsul, settings: ConsulSettings, *, coordinates: bool) -> Place:
    """Ask the agent about itself, and the servers about the rest of the network if ``coordinates``.

    Coordinates are polled, not waited for by blocking queries: they change every few seconds (hashicorp/consul#4988).
    Raises DiscoveryError.
    """
    agent = await _ask(client, settings, "/v1/agent/self", dict)
    place = read_agent(agent)
    if not coordinates:
        return place
    nodes, servers = await asyncio.gather(
        _ask(client, settings, "/v1/coordinate/nodes", list), _ask(client, settings, "/v1/coordinate/datacenters", list)
    )
    return Place(
        place.datacenter, place.node, place.zone, place.region, place.location, read_network(agent, nodes, servers)
    )


async def _ask(client: AsyncConsul, settings: ConsulSettings, path: str, kind: type) -> Any:
    import json

    response = await client.http.get(lambda response: response, path, raw=True)
    if response.code != 200:
        raise refused(settings.address, response.code, response.body)
    try:
        answer = json.loads(response.body)
    except (ValueError, RecursionError):
        answer = None
    # Consul writes an empty list as null in places.
    if answer is None and kind is list and response.body.strip() == b"null":
        answer = []
    if not isinstance(answer, kind):
        raise unreadable(settings.address, f"not what {path} answers", response.body)
    return answer


def read_agent(agent: Mapping[str, Any]) -> Place:
    """/v1/agent/self: the agent's datacenter and node, and what its node meta says of the place (``zone``, ``region``,
    ``latitude``, ``longitude``), or its locality. What is missing or odd is not known."""
    config, meta = _object(agent, "Config"), _object(agent, "Meta")
    locality = _object(_object(agent, "DebugConfig"), "Locality")
    return Place(
        datacenter=_text(config, "Datacenter"),
        node=_text(config, "NodeName"),
        zone=_text(meta, "zone") or _text(locality, "Zone"),
        region=_text(meta, "region") or _text(locality, "Region"),
        location=parse_location(_text(meta, "latitude"), _text(meta, "longitude")),
    )


def read_network(agent: Mapping[str, Any], nodes: Iterable[Any], servers: Iterable[Any]) -> NetworkCoordinates:
    """Our own coordinate (from /v1/agent/self), those of /v1/coordinate/nodes and /v1/coordinate/datacenters.

    Entries that make no sense are left out: the nodes are then unknown. Of a node in several network segments, its
    coordinate in ours counts.
    """
    segment = _text(_object(_object(agent, "Member"), "Tags"), "segment")
    found: dict[str, Coordinate] = {}
    for entry in nodes:
        if not isinstance(entry, dict) or _text(entry, "Segment") != segment:
            continue
        coordinate = parse_coordinate(entry.get("Coord"))
        if coordinate is not None and _text(entry, "Node"):
            found[_text(entry, "Node")] = coordinate
    datacenters: dict[str, tuple[Coordinate, ...]] = {}
    for entry in servers:
        if not isinstance(entry, dict) or _text(entry, "AreaID") not in ("", "wan"):
            continue
        coordinates = [
            parse_coordinate(server.get("Coord"))
            for server in entry.get("Coordinates") or ()
            if isinstance(server, dict)
        ]
        datacenters[_text(entry, "Datacenter")] = tuple(one for one in coordinates if one is not None)
    own = parse_coordinate(agent.get("Coord")) or found.get(_text(_object(agent, "Config"), "NodeName"))
    return NetworkCoordinates(own, found, datacenters)


def parse_coordinate(coord: object) -> Coordinate | None:
    """A coordinate as Consul writes it; None if it is none, or not finite."""
    if not isinstance(coord, dict):
        return None
    vec = coord.get("Vec")
    if not isinstance(vec, list):
        return None
    try:
        # None and text fail, and so does a number of a thousand digits.
        coordinate = Coordinate(
            tuple(float(part) for part in vec),
            float(coord.get("Height", 0.0)),
            float(coord.get("Adjustment", 0.0)),
            float(coord.get("Error", 0.0)),
        )
    except (TypeError, ValueError, OverflowError):
        return None
    return coordinate if coordinate.usable else None


def _object(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


def _text(parent: Mapping[str, Any], name: str) -> str:
    value = parent.get(name)
    return value if isinstance(value, str) else ""
