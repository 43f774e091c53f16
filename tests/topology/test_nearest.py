from __future__ import annotations

import math
from typing import Any

import pytest

from meshlb import ConfigError, Failover, NearestByDistance, NearestByRegion, NearestByRTT
from meshlb.place import Coordinate, NetworkCoordinates, Place, parse_location, place_from_environment
from meshlb.topology.nearest import step_of
from tests.topology.parts import Member, flat, members, shares, topology


def at(seconds: float, error: float = 0.1, dimensions: int = 8) -> Coordinate:
    return Coordinate((seconds, *[0.0] * (dimensions - 1)), error=error)


def place(**nodes: Coordinate) -> Place:
    servers = {"dc1": (at(0.0),), "dc2": (at(0.03), at(0.04), at(0.05))}
    return Place("dc1", "me", coordinates=NetworkCoordinates(at(0.0), nodes, servers))


def node(name: str, datacenter: str = "dc1", **fields: Any) -> Member:
    return members(1, node=name, datacenter=datacenter, **fields)[0]


def named(failover: Failover, endpoints: list[Member], where: Place) -> list[str]:
    laid = topology(failover)
    laid.place = where
    layout = laid.lay_out(endpoints)
    return [layout.tiers[layout.tier_of[member]].name for member in endpoints]


def test_tiers_by_round_trip_time() -> None:
    endpoints = [node("near"), node("far"), node("farther"), node("web", "dc2"), node("web", "dc3")]
    where = place(near=at(0.001), far=at(0.004), farther=at(0.5), web=at(0.001))
    tiers = named(Failover(by="nearest"), endpoints, where)
    # Another datacenter is as far as the median of its servers: the node's own coordinate is of another space.
    assert tiers == ["up to 2 ms", "up to 5 ms", "beyond 100 ms", "up to 50 ms", "unknown"]
    laid = topology(Failover(by="nearest"))
    laid.place = where
    layout = laid.lay_out(endpoints)
    assert shares(layout) == {
        "up to 2 ms": 1.0, "up to 5 ms": 0.0, "up to 50 ms": 0.0, "beyond 100 ms": 0.0, "unknown": 0.0
    }  # fmt: skip


def test_near_ones_that_fall_ill_spill_to_the_next() -> None:
    near, far = members(4, node="near", datacenter="dc1"), members(4, node="far", datacenter="dc1")
    laid = topology(Failover(by=NearestByRTT()))
    laid.place = place(near=at(0.001), far=at(0.004))
    near[0].is_open = near[1].is_open = True
    assert shares(laid.lay_out(flat(near, far))) == {"up to 2 ms": 0.7, "up to 5 ms": 0.3}


@pytest.mark.parametrize(
    ("coordinate", "complaint"),
    [
        (None, "no network coordinate of node 'odd'"),
        (at(0.001, dimensions=4), "of another kind than ours (4 dimensions, not 8)"),
        (at(0.001, error=1.5), "not certain yet"),
    ],
)
def test_bad_coordinates_are_unknown_and_said_once(
    coordinate: Coordinate | None, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    endpoints = [node("odd"), node("good"), node("odd")]
    where = place(good=at(0.4), **({} if coordinate is None else {"odd": coordinate}))
    laid = topology(Failover(by="nearest"))
    laid.place = where
    for _ in range(3):
        layout = laid.lay_out(endpoints)
        assert [tier.name for tier in layout.tiers] == ["beyond 100 ms", "unknown"]
        assert [layout.tier_of[member] for member in endpoints] == [1, 0, 1]
    assert [record.getMessage() for record in caplog.records if complaint in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_where_we_are_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    endpoints = [node("a", region="eu"), node("b", region="us")]
    for by in (NearestByRTT(), NearestByRegion({"eu": ["us"]}), NearestByDistance()):
        assert len(set(named(Failover(by=by), endpoints, Place(asked=True)))) == 1
        named(Failover(by=by), endpoints, Place())  # not known yet: nothing to complain of
    assert len(caplog.records) == 3


def test_an_estimate_that_wavers_moves_nobody() -> None:
    laid = topology(Failover(by="nearest"))
    endpoints = [node("a")]

    def tier(seconds: float) -> str:
        laid.place = place(a=at(seconds))
        return laid.lay_out(endpoints).tiers[0].name

    assert tier(0.0019) == "up to 2 ms"
    assert tier(0.0023) == "up to 2 ms"  # not beyond 2 ms by a fifth
    assert tier(0.0025) == "up to 5 ms"
    assert tier(0.0018) == "up to 5 ms"
    assert tier(0.0015) == "up to 2 ms"
    assert tier(0.0300) == "up to 50 ms"


def test_steps() -> None:
    assert [step_of(distance, (1, 2, 4)) for distance in (0, 1, 1.1, 2, 3, 4, 5, math.inf)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert step_of(1.9, (1, 2, 4), 0.2, former=2) == 2
    assert step_of(0.1, (1, 2, 4), 0.2, former=3) == 0
    assert step_of(9.0, (1, 2, 4), 0.2, former=0) == 3


def test_regions_by_table() -> None:
    table = {"eu-west": ["eu-central", "us-east"]}
    endpoints = [node(region, region=region) for region in ("us-east", "eu-west", "ap-south", "eu-central", "")]
    by = NearestByRegion(table, region="eu-west")
    assert named(Failover(by=by), endpoints, Place()) == ["us-east", "eu-west", "other", "eu-central", "other"]
    laid = topology(Failover(by=NearestByRegion(table)))
    laid.place = Place(region="eu-west")
    assert [tier.name for tier in laid.lay_out(endpoints).tiers] == ["eu-west", "eu-central", "us-east", "other"]
    assert named(Failover(by=NearestByRegion({})), endpoints[:2], Place(region="eu-west")) == ["other", "eu-west"]


def test_tiers_by_distance(caplog: pytest.LogCaptureFixture) -> None:
    def somewhere(latitude: str, longitude: str) -> Member:
        return node("n", meta={"latitude": latitude, "longitude": longitude})

    potsdam, paris, tokyo = somewhere("52.4", "13.06"), somewhere("48.86", "2.35"), somewhere("35.7", "139.7")
    odd = [node("n"), somewhere("north", "1"), somewhere("91", "0"), somewhere("nan", "0")]
    by = NearestByDistance(location=(52.52, 13.405))
    expected = ["up to 100 km", "up to 1000 km", "beyond 5000 km", *["unknown"] * 4]
    assert named(Failover(by=by), [potsdam, paris, tokyo, *odd], Place()) == expected
    assert len(caplog.records) == 1
    from_place = NearestByDistance(steps=[10])
    where = Place(location=(48.86, 2.35))
    assert named(Failover(by=from_place), [paris, potsdam], where) == ["up to 10 km", "beyond 10 km"]


@pytest.mark.parametrize(
    ("kind", "options", "field"),
    [
        (NearestByRTT, {"steps": []}, "steps"),
        (NearestByRTT, {"steps": [0.01, 0.011]}, "steps"),
        (NearestByRTT, {"steps": [0.01, -1]}, "steps"),
        (NearestByRTT, {"hysteresis": 1}, "hysteresis"),
        (NearestByRTT, {"max_error": 0}, "max_error"),
        (NearestByRTT, {"interval": 0.1}, "interval"),
        (NearestByRegion, {"table": ["eu"]}, "table"),
        (NearestByRegion, {"table": {"eu": "us"}}, "table"),
        (NearestByRegion, {"region": 3}, "region"),
        (NearestByDistance, {"steps": [5, 5]}, "steps"),
        (NearestByDistance, {"location": (91, 0)}, "location"),
        (NearestByDistance, {"location": "here"}, "location"),
        (NearestByDistance, {"latitude": 3}, "latitude"),
    ],
)
def test_wrong_options(kind: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{field}"):
        kind(**options)


def test_what_the_environment_says() -> None:
    said = place_from_environment({"MESHLB_ZONE": "a", "MESHLB_REGION": "eu", "MESHLB_LOCATION": "52.5, 13.4"})
    assert (said.zone, said.region, said.location) == ("a", "eu", (52.5, 13.4))
    assert place_from_environment({}) == Place()
    assert place_from_environment({"MESHLB_LOCATION": "Berlin"}) == Place()
    assert parse_location("1e400", "0") is None
    assert parse_location(None, "0") is None
