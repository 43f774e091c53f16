from __future__ import annotations

import math
from typing import Any

import pytest

from meshlb.discovery.consul_coordinates import parse_coordinate, read_agent, read_network
from meshlb.place import Coordinate, NetworkCoordinates, Place

VEC = [0.001 * i for i in range(8)]


def coord(**fields: Any) -> dict[str, Any]:
    return {"Vec": VEC, "Height": 0.0001, "Adjustment": -0.0002, "Error": 0.3, **fields}


def test_a_coordinate_as_consul_writes_it() -> None:
    assert parse_coordinate(coord()) == Coordinate(tuple(VEC), 0.0001, -0.0002, 0.3)
    assert parse_coordinate({"Vec": [1, 2]}) == Coordinate((1.0, 2.0))


@pytest.mark.parametrize(
    "odd",
    [
        None,
        [],
        "here",
        {},
        coord(Vec=None),
        coord(Vec=[]),
        coord(Vec="12345678"),
        coord(Vec=[None] * 8),
        coord(Vec=[math.nan] * 8),
        coord(Vec=[10**400]),
        coord(Height=math.inf),
        coord(Height="high"),
        coord(Error=None),
        coord(Adjustment=[]),
    ],
)
def test_what_is_no_coordinate(odd: Any) -> None:
    assert parse_coordinate(odd) is None


def test_what_the_agent_says_of_its_place() -> None:
    agent = {
        "Config": {"Datacenter": "dc1", "NodeName": "n1"},
        "Meta": {"zone": "a", "region": "eu", "latitude": "52.5", "longitude": "13.4"},
    }
    assert read_agent(agent) == Place("dc1", "n1", "a", "eu", (52.5, 13.4))
    locality = {"DebugConfig": {"Locality": {"Region": "eu", "Zone": "b"}}}
    assert read_agent({**agent, **locality, "Meta": {}}) == Place("dc1", "n1", "b", "eu")
    for odd in ({}, {"Config": None, "Meta": []}, {"Config": {"Datacenter": 3}, "Meta": {"zone": 3, "latitude": "x"}}):
        assert read_agent(odd) == Place()


def test_the_network() -> None:
    agent = {"Config": {"NodeName": "n1"}, "Coord": coord(Error=0.5), "Member": {"Tags": {"segment": ""}}}
    nodes = [
        {"Node": "n1", "Segment": "", "Coord": coord()},
        {"Node": "n2", "Coord": coord(Vec=[0.5] * 8)},
        {"Node": "n3", "Segment": "other", "Coord": coord()},  # of a segment that ours cannot be compared with
        {"Node": "n4", "Segment": "", "Coord": None},
        {"Segment": "", "Coord": coord()},
        "nonsense",
    ]
    servers = [
        {"Datacenter": "dc1", "AreaID": "wan", "Coordinates": [{"Node": "n1.dc1", "Coord": coord()}]},
        {"Datacenter": "dc2", "AreaID": "wan", "Coordinates": [{"Coord": coord(Vec=[0.1] * 8)}, {"Coord": 3}, "x"]},
        {"Datacenter": "dc3", "AreaID": "wan", "Coordinates": None},
        {"Datacenter": "dc4", "AreaID": "an-area-of-its-own", "Coordinates": []},
        3,
    ]
    found = read_network(agent, nodes, servers)
    assert found.own == Coordinate(tuple(VEC), 0.0001, -0.0002, 0.5)
    assert set(found.nodes) == {"n1", "n2"}
    assert {name: len(coordinates) for name, coordinates in found.datacenters.items()} == {"dc1": 1, "dc2": 1, "dc3": 0}
    # An agent that does not know its own is where the catalog has it.
    assert read_network({"Config": {"NodeName": "n2"}}, nodes, []).own == Coordinate((0.5,) * 8, 0.0001, -0.0002, 0.3)
    assert read_network({}, [], []) == NetworkCoordinates()
