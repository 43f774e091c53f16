"""Which endpoints of a large service one process uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import ConfigError, DeterministicAperture, Endpoint, RendezvousSubset, Status
from meshlb.topology.peers import Place, PlaceUnknown, is_own_address, own_place
from meshlb.topology.subsetting import Subset, Subsetting


@dataclass(eq=False)
class Server:
    number: int
    up: bool = True

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"10.1.{self.number // 250}.{self.number % 250 + 1}", 80)

    def __repr__(self) -> str:
        return f"s{self.number}"


def servers(n: int) -> tuple[Server, ...]:
    return tuple(Server(number) for number in range(n))


def healthy(members: Sequence[Server]) -> Collection[Server]:
    return [member for member in members if member.up]


def choose(subsetting: Subsetting[Server], members: tuple[Server, ...], threshold: float = 0.5) -> Subset[Server]:
    return subsetting.choose([members], healthy, threshold)


def peers(n: int, **fields: Any) -> list[Endpoint]:
    return [Endpoint("10.9.0.1", 1000 + number, id=f"me-{number:03}", **fields) for number in range(n)]


def aperture(instance: int, instances: int, size: int) -> Subsetting[Server]:
    subsetting: Subsetting[Server] = Subsetting(
        DeterministicAperture("shop", size=size, instance_id=f"me-{instance:03}"), Random(instance)
    )
    assert subsetting.peers_changed(peers(instances))
    return subsetting


# --- gRFC A68


@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 2**64 - 1), st.data())
def test_an_endpoint_that_joins_or_leaves_changes_one_member_at_most(
    n: int, size: int, seed: int, data: st.DataObject
) -> None:
    members = servers(n)
    subsetting: Subsetting[Server] = Subsetting(RendezvousSubset(size, seed), Random(1))
    whole = set(choose(subsetting, members).members)
    assert len(whole) == min(size, n)
    gone = data.draw(st.sampled_from(members))
    fewer = set(choose(subsetting, tuple(member for member in members if member is not gone)).members)
    assert len(whole - fewer) == (gone in whole)
    assert set(choose(subsetting, members).members) == whole


def test_every_process_draws_its_own_and_a_seed_keeps_it() -> None:
    members = servers(100)

    def subset(options: RendezvousSubset, random: int) -> tuple[Server, ...]:
        return choose(Subsetting(options, Random(random)), members).members

    assert subset(RendezvousSubset(10), 1) != subset(RendezvousSubset(10), 2)
    assert subset(RendezvousSubset(10, seed=7), 1) == subset(RendezvousSubset(10, seed=7), 2)
    assert subset(RendezvousSubset(10, seed=7), 1) != subset(RendezvousSubset(10, seed=8), 1)
    load = Counter(server for seed in range(1000) for server in subset(RendezvousSubset(10), seed))
    assert len(load) == 100
    assert max(load.values()) < 1.5 * 100
    assert min(load.values()) > 0.5 * 100


def test_the_child_of_a_fork_draws_anew() -> None:
    members, random = servers(100), Random(1)
    subsetting: Subsetting[Server] = Subsetting(RendezvousSubset(10), random)
    parents = choose(subsetting, members).members
    subsetting.reseed(random)
    assert choose(subsetting, members).members != parents
    given: Subsetting[Server] = Subsetting(RendezvousSubset(10, seed=7), random)
    parents = choose(given, members).members
    given.reseed(random)
    assert choose(given, members).members == parents


# --- Finagle's deterministic aperture


@pytest.mark.parametrize(("clients", "n", "size"), [(12, 24, 12), (7, 10, 3), (3, 100, 12), (50, 7, 3), (10, 11, 4)])
def test_together_the_apertures_cover_every_server_evenly(clients: int, n: int, size: int) -> None:
    members = servers(n)
    load: Counter[Server] = Counter()
    for instance in range(clients):
        subset = choose(aperture(instance, clients, size), members)
        assert len(subset.members) >= min(size, n)
        for member in subset.members:
            load[member] += subset.fractions.get(member, 1.0)  # type: ignore[assignment]  # parts of a server add up
    assert len(load) == n
    assert [load[member] for member in members] == pytest.approx([load[members[0]]] * n)


def test_the_window_of_finagles_example() -> None:
    """finagle ApertureTest.scala: instance 0 of 12 covers 12 of 24 servers whole, instance 1 begins two further on."""
    members = servers(24)
    first, second = (choose(aperture(instance, 12, 12), members) for instance in (0, 1))
    assert len(first.members) == 12
    assert not first.fractions
    assert first.members[2:] == second.members[:10]


def test_neighbours_on_the_ring_are_not_those_of_the_list() -> None:
    """Lists come host by host and zone by zone."""
    members = servers(100)
    window = [member.number for member in choose(aperture(0, 10, 12), members).members]
    assert window != sorted(window)
    assert max(window) - min(window) > 40


def test_a_window_is_part_of_a_server_at_its_edges() -> None:
    subset = choose(aperture(1, 3, 2), servers(5))  # two arcs of 5/3 servers: from 5/3 to 5
    assert len(subset.members) == 4
    assert [subset.fractions.get(member, 1.0) for member in subset.members] == pytest.approx([1 / 3, 1, 1, 1])


def test_a_single_client_uses_all() -> None:
    members = servers(30)
    subset = choose(aperture(0, 1, 12), members)
    assert set(subset.members) == set(members)
    assert not subset.fractions


def test_until_the_place_is_known_the_subset_is_a_rendezvous() -> None:
    members = servers(60)
    subsetting: Subsetting[Server] = Subsetting(DeterministicAperture("shop", size=5, instance_id="me-001"), Random(1))
    fallback = choose(subsetting, members).members
    assert len(fallback) == 5
    assert subsetting.describe() == {
        "method": "rendezvous",
        "endpoints": 5,
        "of": 60,
        "widened": 0,
        "instance": None,
        "instances": None,
        "reason": "the registry has not told of 'shop' yet",
    }
    assert not subsetting.peers_changed([])
    assert choose(subsetting, members).members == fallback
    assert subsetting.describe()["reason"] == "'shop': none of the 0 that take part is with id or address 'me-001'"
    assert subsetting.peers_changed(peers(12))
    window = choose(subsetting, members).members
    assert window != fallback
    assert subsetting.describe() == {
        "method": "deterministic_aperture",
        "endpoints": 5,
        "of": 60,
        "widened": 0,
        "instance": 1,
        "instances": 12,
        "reason": "",
    }
    assert not subsetting.peers_changed(peers(12)[::-1])
    assert subsetting.peers_changed(peers(13))
    assert subsetting.peers_changed([])  # out of the registry: on with the choice of before
    assert choose(subsetting, members).members == fallback


def test_each_tier_has_a_subset() -> None:
    members = servers(60)
    near, far = members[:20], members[20:]
    subsetting: Subsetting[Server] = Subsetting(RendezvousSubset(5), Random(1))
    subset = set(subsetting.choose([near, far], healthy, 0.5).members)
    assert (len(subset & set(near)), len(subset & set(far))) == (5, 5)
    assert {key: subsetting.describe()[key] for key in ("endpoints", "of", "widened")} == {
        "endpoints": 10,
        "of": 60,
        "widened": 0,
    }
    for member in far:
        member.up = False
    assert subset & set(near) == set(subsetting.choose([near, far], healthy, 0.5).members) & set(near)
    assert subsetting.describe()["widened"] == 35


# --- a subset that falls ill


def test_a_few_ill_ones_move_nobody() -> None:
    members = servers(60)
    subsetting: Subsetting[Server] = Subsetting(RendezvousSubset(10), Random(1))
    before = choose(subsetting, members).members
    for member in before[:5]:
        member.up = False
    assert choose(subsetting, members).members == before
    assert subsetting.describe()["widened"] == 0


@pytest.mark.parametrize("subsetting", [Subsetting(RendezvousSubset(10), Random(1)), aperture(3, 12, 10)])
def test_below_the_panic_threshold_it_is_widened_until_enough_are_healthy(subsetting: Subsetting[Server]) -> None:
    members = servers(60)
    before = choose(subsetting, members).members
    for member in before[:6]:
        member.up = False
    wider = choose(subsetting, members).members
    assert wider[:10] == before
    assert len(wider) == 16
    assert len(healthy(wider)) == 10
    assert subsetting.describe()["widened"] == 6
    assert choose(subsetting, members, threshold=0).members == before  # no panic, no widening
    for member in before[:6]:
        member.up = True
    assert choose(subsetting, members).members == before


def test_it_is_widened_by_everybody_at_most_and_keeps_two_whatever_the_threshold() -> None:
    members = servers(30)
    subsetting: Subsetting[Server] = Subsetting(RendezvousSubset(5), Random(1))
    before = choose(subsetting, members, threshold=0).members
    for member in before[:4]:
        member.up = False
    assert len(healthy(choose(subsetting, members, threshold=0).members)) == 5  # a retry needs somewhere to go
    for member in members:
        member.up = False
    assert set(choose(subsetting, members).members) == set(members)


@given(st.lists(st.booleans(), max_size=40), st.integers(2, 12), st.floats(0, 1), st.integers(0, 11))
def test_rules(ups: list[bool], size: int, threshold: float, instance: int) -> None:
    members = tuple(Server(number, up) for number, up in enumerate(ups))
    for subsetting in (Subsetting[Server](RendezvousSubset(size), Random(instance)), aperture(instance, 12, size)):
        subset = choose(subsetting, members, threshold)
        assert len(set(subset.members)) == len(subset.members)
        assert set(subset.members) <= set(members)
        assert len(subset.members) >= min(size, len(members))
        assert all(0 < fraction < 1 for fraction in subset.fractions.values())
        wanted = min(size, len(members))
        up, all_up = len(healthy(subset.members)), len(healthy(members))
        assert up >= min(wanted * threshold, all_up)
        assert up >= min(2, all_up)


# --- this process among its peers


def find(instances: Sequence[Endpoint], instance_id: str | None = None, own: Collection[str] = ()) -> Place:
    return own_place(instances, instance_id, host_name="pod-7", is_own_address=lambda host: host in own)


def test_the_order_is_the_same_whatever_the_order_of_the_list() -> None:
    instances = [*peers(5), Endpoint("10.9.0.2", 1, id="me-000", node="other")]
    assert find(instances, "me-003") == find(instances[::-1], "me-003")
    assert {find(instances, f"10.9.0.1:100{number}").instance for number in range(5)} < set(range(6))


def test_by_id_by_address_by_host_name_by_own_address() -> None:
    assert find(peers(5), "me-003") == Place(3, 5)
    assert find(peers(5), "10.9.0.1:1002") == Place(2, 5)
    named = [*peers(3), Endpoint("10.9.0.2", 1, id="pod-7")]
    assert find(named, own={"10.9.0.2"}) == Place(3, 4)
    several = [Endpoint(f"10.9.0.{number}", 80, id=f"i{number}") for number in range(4)]
    assert find(several, own={"10.9.0.2"}) == Place(2, 4)


def test_who_is_critical_or_in_maintenance_takes_no_part() -> None:
    instances = [
        Endpoint(f"10.9.0.{number}", 80, id=f"i{number}", status=status) for number, status in enumerate(Status)
    ]
    assert find(instances, "i1") == Place(1, 2)
    with pytest.raises(PlaceUnknown, match="none of the 2 that take part"):
        find(instances, "i3")


@pytest.mark.parametrize(
    ("instance_id", "own", "message"),
    [
        ("me-009", (), "none of the 3 that take part is with id or address 'me-009'"),
        (None, (), "none of the 3 that take part is with id 'pod-7', or at an address of this host; say which one"),
        (None, ("10.9.0.1",), "3 of the 3 that take part is with id 'pod-7', or at an address of this host; say which"),
    ],
)
def test_why_the_place_is_unknown(instance_id: str | None, own: Collection[str], message: str) -> None:
    with pytest.raises(PlaceUnknown, match=message):
        find(peers(3), instance_id, own)


def test_an_own_address_can_be_bound() -> None:
    assert is_own_address("127.0.0.1")
    assert not is_own_address("192.0.2.1")  # TEST-NET-1
    assert not is_own_address("2001:db8::1")
    assert not is_own_address("localhost")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RendezvousSubset(1), r"RendezvousSubset\.size"),
        (lambda: RendezvousSubset(20, seed=-1), r"RendezvousSubset\.seed"),
        (lambda: RendezvousSubset(20, seed=2**64), r"RendezvousSubset\.seed"),
        (lambda: DeterministicAperture(""), r"DeterministicAperture\.peers"),
        (lambda: DeterministicAperture("shop", size=1), r"DeterministicAperture\.size"),
        (lambda: DeterministicAperture("shop", instance_id=7), r"DeterministicAperture\.instance_id"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
