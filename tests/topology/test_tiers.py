from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import ConfigError, Endpoint, Failover, Status, Zones
from meshlb.place import Place
from meshlb.testing import FakeClock
from tests.topology.parts import Member, flat, group_shares, members, shares, topology

ORDER = ("dc1", "dc2")


def two(down1: int = 0, down2: int = 0, count: int = 4) -> list[Member]:
    return flat(members(count, down=down1, datacenter="dc1"), members(count, down=down2, datacenter="dc2"))


# -- modes


def test_active_passive_is_strict() -> None:
    laid = topology(Failover(order=ORDER))
    assert shares(laid.lay_out(two())) == {"dc1": 1.0, "dc2": 0.0}
    # One healthy endpoint is enough, and there is no panic while the other tier is well.
    layout = laid.lay_out(two(down1=3))
    assert shares(layout) == {"dc1": 1.0, "dc2": 0.0}
    assert not layout.judged.panic
    layout = laid.lay_out(two(down1=4))
    assert shares(layout) == {"dc1": 0.0, "dc2": 1.0}
    assert layout.tiers[0].reason == "no healthy endpoint"


def test_a_minimum_of_healthy_endpoints() -> None:
    laid = topology(Failover(order=ORDER, minimum_healthy=0.5))
    assert shares(laid.lay_out(two(down1=2))) == {"dc1": 1.0, "dc2": 0.0}
    assert shares(laid.lay_out(two(down1=3))) == {"dc1": 0.0, "dc2": 1.0}
    # Where no tier has as many, one that has any.
    laid = topology(Failover(order=ORDER, minimum_healthy=0.9))
    assert shares(laid.lay_out(two(down1=1, down2=1))) == {"dc1": 1.0, "dc2": 0.0}


def test_fail_back_after_the_delay_with_a_ramp() -> None:
    clock = FakeClock()
    laid = topology(Failover(order=ORDER, failback_delay=30, ramp=10), clock=clock)
    endpoints = two()
    first = [member for member in endpoints if member.endpoint.datacenter == "dc1"]

    def dc1(up: int) -> float:
        for i, member in enumerate(first):
            member.is_open = i >= up
        layout = laid.lay_out(endpoints)
        changes.append(layout.next_change)
        reasons.append(layout.tiers[0].reason)
        return shares(layout)["dc1"]

    changes: list[float | None] = []
    reasons: list[str] = []
    assert dc1(0) == 0.0
    assert dc1(1) == 0.0  # a quarter is not good enough to come back to
    assert changes[-1] is None
    assert dc1(2) == 0.0
    assert changes[-1] == 30
    clock.advance(10)
    assert dc1(2) == 0.0
    assert reasons[-1] == "good again; gets the load back in 20 s"
    assert dc1(0) == 0.0  # it flaps: the delay begins anew
    assert dc1(4) == 0.0
    clock.advance(29)
    assert dc1(4) == 0.0
    clock.advance(1)
    assert dc1(4) == 0.1
    clock.advance(5)
    assert dc1(4) == 0.5
    clock.advance(5)
    assert dc1(4) == 1.0
    assert changes[-1] is None


def test_spill_is_envoys() -> None:
    laid = topology(Failover(order=ORDER, mode="spill"))
    assert shares(laid.lay_out(two())) == {"dc1": 1.0, "dc2": 0.0}
    assert shares(laid.lay_out(two(down1=2))) == {"dc1": 0.7, "dc2": 0.3}
    assert shares(laid.lay_out(two(down1=3))) == {"dc1": 0.35, "dc2": 0.65}
    layout = laid.lay_out(two(down1=3, down2=3))
    assert shares(layout) == {"dc1": 0.5, "dc2": 0.5}
    assert [tier.panic for tier in layout.tiers] == [True, True]
    assert len(layout.judged.eligible) == 8
    assert (
        topology(Failover(order=ORDER, mode="spill", overprovisioning=1.0)).lay_out(two(down1=1)).groups[0].share
        == 0.75
    )


def test_how_many_tiers_are_needed() -> None:
    for failover in (Failover(order=ORDER), Failover(order=ORDER, mode="spill")):
        laid = topology(failover)
        assert laid.lay_out(two()).needed == 1
        assert laid.lay_out(two(down1=1)).needed == 1
        assert laid.lay_out(two(down1=2)).needed == 2
        assert laid.lay_out(two(down1=3, down2=3)).needed == 3
    clock = FakeClock()
    laid = topology(Failover(order=ORDER), clock=clock)
    laid.lay_out(two(down1=4))
    assert laid.lay_out(two()).needed == 2  # still in use
    clock.advance(100)
    laid.lay_out(two())
    clock.advance(100)
    assert laid.lay_out(two()).needed == 1


def test_one_tier_panics_while_another_does_not() -> None:
    endpoints = flat(members(10, down=9, datacenter="dc1"), members(10, down=5, datacenter="dc2"))
    layout = topology(Failover(order=ORDER, mode="spill")).lay_out(endpoints)
    assert [(tier.panic, tier.share > 0) for tier in layout.tiers] == [(True, True), (False, True)]
    assert [len(group.members) for group in layout.groups] == [10, 5]
    assert layout.panics(endpoints[0])
    assert not layout.panics(endpoints[-1])
    assert not layout.panics(members(1)[0])  # of no tier
    # Active-passive would rather leave the tier that is in panic.
    strict = topology(Failover(order=ORDER)).lay_out(endpoints)
    assert shares(strict) == {"dc1": 0.0, "dc2": 1.0}
    assert not strict.judged.panic


def test_active_active_by_weight_and_by_capacity() -> None:
    weighted = topology(Failover(order=ORDER, mode="active_active", weights={"dc1": 3, "dc2": 1}))
    assert shares(weighted.lay_out(two())) == {"dc1": 0.75, "dc2": 0.25}
    assert shares(weighted.lay_out(two(down1=1))) == {"dc1": 0.75, "dc2": 0.25}  # 1.4 times as much as needed
    assert shares(weighted.lay_out(two(down1=2))) == {"dc1": 0.6774, "dc2": 0.3226}
    assert shares(weighted.lay_out(two(down1=4))) == {"dc1": 0.0, "dc2": 1.0}
    only = topology(Failover(order=ORDER, mode="active_active", weights={"dc1": 1}))
    assert shares(only.lay_out(two())) == {"dc1": 1.0, "dc2": 0.0}
    assert shares(only.lay_out(two(down1=4))) == {"dc1": 0.0, "dc2": 1.0}  # nobody else is left
    capacity = topology(Failover(order=ORDER, mode="active_active"))
    heavy = flat(members(2, datacenter="dc1", weight=3), members(3, down=1, datacenter="dc2"))
    assert shares(capacity.lay_out(heavy)) == {"dc1": 0.75, "dc2": 0.25}
    layout = capacity.lay_out(two(down1=4, down2=3))
    assert layout.judged.panic
    assert shares(layout) == {"dc1": 0.5, "dc2": 0.5}


def test_without_panic_there_is_nobody() -> None:
    for mode in ("active_passive", "active_active", "spill"):
        layout = topology(Failover(order=ORDER, mode=mode), panic_threshold=0).lay_out(two(down1=4, down2=4))
        assert layout.groups == ()
        assert layout.judged.eligible == ()
        assert shares(layout) == {"dc1": 0.0, "dc2": 0.0}


def test_full_tiers_spill() -> None:
    clock = FakeClock()
    laid = topology(Failover(order=ORDER, mode="spill", max_in_flight=10), clock=clock)
    assert laid.measures
    endpoints = two()
    assert shares(laid.lay_out(endpoints)) == {"dc1": 1.0, "dc2": 0.0}
    for _ in range(120):  # 80 calls in flight, for 40 places
        clock.advance(1)
        dc1 = laid.lay_out(endpoints).tiers[0].share
        for member in endpoints:
            member.in_flight = round(80 * (dc1 if member.endpoint.datacenter == "dc1" else 1 - dc1) / 4)
        laid.measure()
    assert 0.45 <= shares(laid.lay_out(endpoints))["dc1"] <= 0.55
    sharing = topology(Failover(order=ORDER, mode="active_active", max_in_flight=10), clock=clock)
    sharing.lay_out(endpoints)
    for member in endpoints:
        member.in_flight = 8 if member.endpoint.datacenter == "dc1" else 0
    for _ in range(60):
        clock.advance(1)
        sharing.measure()
    assert shares(sharing.lay_out(endpoints))["dc1"] == pytest.approx(0.2 / 1.2, abs=0.01)


# -- which tier


def test_a_tier_without_endpoints_is_shown_and_passed_over() -> None:
    layout = topology(Failover(order=("dc0", *ORDER))).lay_out(two())
    assert shares(layout) == {"dc0": 0.0, "dc1": 1.0, "dc2": 0.0}
    assert layout.tiers[0].reason == "no endpoints"
    assert [group.name for group in layout.groups] == ["dc1", "dc2"]
    nobody = topology(Failover(order=ORDER)).lay_out([])
    assert shares(nobody) == {"dc1": 0.0, "dc2": 0.0}
    assert nobody.groups == ()
    assert nobody.needed == 3  # more than there are


def test_everybody_in_maintenance() -> None:
    endpoints = [Member(Endpoint("10.0.0.1", 80, datacenter="dc1", status=Status.MAINTENANCE)), *two()]
    layout = topology(Failover(order=ORDER)).lay_out(endpoints[:1])
    assert layout.groups == ()
    layout = topology(Failover(order=ORDER)).lay_out([endpoints[0], *endpoints[5:]])
    assert shares(layout) == {"dc1": 0.0, "dc2": 1.0}


def tier_names(failover: Failover, endpoints: list[Member], place: Place | None = None) -> list[str]:
    laid = topology(failover)
    if place is not None:
        laid.place = place
    layout = laid.lay_out(endpoints)
    return [layout.tiers[layout.tier_of[member]].name for member in endpoints]


def one(**fields: Any) -> Member:
    return members(1, **fields)[0]


def test_what_makes_a_tier() -> None:
    endpoints = [one(datacenter="dc1", zone="a", region="eu"), one(datacenter="dc2", zone="b", region="us"), one()]
    assert tier_names(Failover(order=ORDER), endpoints) == ["dc1", "dc2", "other"]
    assert tier_names(Failover(by="zone", order=["b"]), endpoints) == ["other", "b", "other"]
    assert tier_names(Failover(by="region", order=["us", "eu"]), endpoints) == ["eu", "us", "other"]
    here = Place(datacenter="dc2", zone="a", region="eu")
    assert tier_names(Failover(), endpoints, here) == ["other", "dc2", "other"]
    assert tier_names(Failover(by="zone"), endpoints, here) == ["a", "other", "other"]
    assert tier_names(Failover(by="region"), endpoints) == ["other"] * 3  # where we are is not known: one tier
    tagged = [one(tags=("spare", "x")), one(tags=("main",)), one()]
    assert tier_names(Failover(by="tag", order=["main", "spare"]), tagged) == ["spare", "main", "other"]
    assert tier_names(Failover(by="tag:x"), tagged) == ["x", "other", "other"]


def test_the_rest_may_come_before_the_last() -> None:
    endpoints = [one(zone="a"), one(zone="b"), one(zone="c")]
    layout = topology(Failover(by="zone", order=["a", "*", "c"])).lay_out(endpoints)
    assert [tier.name for tier in layout.tiers] == ["a", "other", "c"]


def test_numbers_by_size_then_texts_then_those_without() -> None:
    endpoints = [one(meta={"tier": value}) for value in ("10", "9", "spare", "nan")] + [one()]
    layout = topology(Failover(by="meta:tier")).lay_out(endpoints)
    assert [tier.name for tier in layout.tiers] == ["9", "10", "nan", "spare", "unknown"]


def test_a_function_of_the_programs_own(caplog: pytest.LogCaptureFixture) -> None:
    def tier(endpoint: Endpoint) -> int:
        return {"a": 1, "b": 0}[endpoint.zone]

    endpoints = [one(zone="a"), one(zone="b"), one(zone="?"), one(zone="!")]
    layout = topology(Failover(by=tier)).lay_out(endpoints)
    assert [tier.name for tier in layout.tiers] == ["0", "1", "unknown"]
    assert len(caplog.records) == 1
    assert "KeyError" in caplog.text


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"by": "planet"}, "by"),
        ({"by": 3}, "by"),
        ({"by": "meta:"}, "by"),
        ({"by": "distance"}, "by"),
        ({"by": "tag"}, "order"),
        ({"order": "dc1"}, "order"),
        ({"order": ["a", "a"]}, "order"),
        ({"order": [1]}, "order"),
        ({"datacenters": ["a", "b"], "by": "zone"}, "datacenters"),
        ({"datacenters": ["a"], "order": ["a"]}, "datacenters"),
        ({"mode": "passive"}, "mode"),
        ({"prefetch": 1}, "prefetch"),
        ({"minimum_healthy": 2}, "minimum_healthy"),
        ({"failback_delay": -1}, "failback_delay"),
        ({"failback_healthy": "0.5"}, "failback_healthy"),
        ({"ramp": float("nan")}, "ramp"),
        ({"weights": {"a": 1}}, "weights"),
        ({"mode": "active_active", "weights": {"a": -1}}, "weights"),
        ({"mode": "active_active", "weights": {"a": 0}}, "weights"),
        ({"mode": "active_active", "weights": {}}, "weights"),
        ({"overprovisioning": 0.9}, "overprovisioning"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_ejection_percent": 101}, "max_ejection_percent"),
    ],
)
def test_wrong_options(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Failover\.{field}"):
        Failover(**options)


# -- zones


def zoned(**counts: int) -> list[Member]:
    return flat(*[members(count, zone=zone) for zone, count in counts.items()])


def test_zone_aware_by_capacity() -> None:
    laid = topology(zones=Zones(zone="a", peers="web"))
    laid.peers_changed([one(zone=zone).endpoint for zone in "aabbcd"])
    assert group_shares(laid.lay_out(zoned(a=1, c=3, d=3, e=1))) == {
        "all/a": 0.375,
        "all/c": round(0.625 * 2084 / 5418, 4),
        "all/d": round(0.625 * 2084 / 5418, 4),
        "all/e": round(0.625 * 1250 / 5418, 4),
    }
    assert group_shares(laid.lay_out(zoned(a=3, b=3))) == {"all/a": 1.0, "all/b": 0.0}
    # The zone is lost: its share goes elsewhere, and zones do not matter any more.
    assert group_shares(laid.lay_out(flat(members(3, down=3, zone="a"), zoned(b=3, c=3)))) == {"all": 1.0}


def test_zones_are_ignored() -> None:
    laid = topology(zones=Zones(zone="a", peers="web"))
    assert group_shares(laid.lay_out(zoned(a=3, b=3))) == {"all": 1.0}  # nothing is known of the callers
    assert not laid.peers_changed([])
    assert laid.peers_changed([one(zone="a").endpoint, one(zone="b").endpoint, one(zone="c", down=1).endpoint])
    assert laid.peers == {"a": 1, "b": 1}
    assert group_shares(laid.lay_out(zoned(a=2, b=3))) == {"all": 1.0}  # fewer than six
    assert group_shares(laid.lay_out(zoned(a=6))) == {"all": 1.0}
    panicking = laid.lay_out(flat(members(4, down=3, zone="a"), members(4, down=2, zone="b")))
    assert group_shares(panicking) == {"all": 1.0}
    assert panicking.judged.panic


def test_zones_within_each_tier() -> None:
    laid = topology(Failover(order=ORDER, mode="spill"), Zones(zone="a", force_local=True, min_cluster_size=2))
    endpoints = flat(
        members(2, down=1, datacenter="dc1", zone="a"),
        members(2, down=1, datacenter="dc1", zone="b"),
        members(4, datacenter="dc2", zone="c"),
    )
    assert group_shares(laid.lay_out(endpoints)) == {"dc1/a": 0.7, "dc1/b": 0.0, "dc2": 0.3}


def test_zones_by_weight_and_health() -> None:
    laid = topology(zones=Zones(weights={"a": 1, "b": 2}))
    assert group_shares(laid.lay_out(zoned(a=5, b=5))) == {"all/a": 0.3333, "all/b": 0.6667}
    sick = flat(members(4, down=2, zone="a"), members(4, zone="b"))
    assert group_shares(laid.lay_out(sick))["all/a"] == pytest.approx(0.7 / 2.7, abs=1e-4)
    assert group_shares(laid.lay_out(zoned(a=5, b=5, c=5)))["all/c"] == 0.25


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "peers"),
        ({"peers": 3}, "peers"),
        ({"zone": 3, "peers": "web"}, "zone"),
        ({"peers": "web", "min_cluster_size": -1}, "min_cluster_size"),
        ({"force_local": 1}, "force_local"),
        ({"weights": {"a": 1}, "peers": "web"}, "weights"),
        ({"weights": ["a"]}, "weights"),
        ({"peers": "web", "overprovisioning": 0}, "overprovisioning"),
    ],
)
def test_wrong_zones(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Zones\.{field}"):
        Zones(**options)


# -- whatever the set


@given(
    st.lists(
        st.builds(
            lambda datacenter, zone, status, is_open: Member(
                Endpoint("10.0.0.1", 80, datacenter=datacenter, zone=zone, status=status), is_open=is_open
            ),
            st.sampled_from(["dc1", "dc2", "dc3", ""]),
            st.sampled_from(["a", "b", ""]),
            st.sampled_from(Status),
            st.booleans(),
        ),
        max_size=14,
    ),
    st.sampled_from(["active_passive", "active_active", "spill"]),
    st.sampled_from([None, Zones(zone="a", force_local=True, min_cluster_size=0), Zones(weights={"a": 2})]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_rules(endpoints: list[Member], mode: str, zones: Zones | None, threshold: float) -> None:
    layout = topology(Failover(order=ORDER, mode=mode), zones, panic_threshold=threshold).lay_out(endpoints)
    eligible = layout.judged.eligible
    assert len(set(eligible)) == len(eligible)
    assert set(layout.tier_of) == set(endpoints)
    for tier in layout.tiers:
        parts = [group for group in layout.groups if layout.tiers[group.tier] is tier]
        assert sum(group.share for group in parts) == pytest.approx(tier.share)
    if eligible:
        assert sum(group.share for group in layout.groups) == pytest.approx(1.0)
    for group in layout.groups:
        assert group.members
        for member in group.members:
            assert member.endpoint.status is not Status.MAINTENANCE
            assert group.panic or (member.endpoint.status is not Status.CRITICAL and not member.is_open)
    if threshold and any(member.endpoint.status is not Status.MAINTENANCE for member in endpoints):
        assert eligible
