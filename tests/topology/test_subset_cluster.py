"""Subsets in a cluster: who is called, whose connections go, what is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshlb import (
    Cluster,
    ConfigError,
    DeterministicAperture,
    Endpoint,
    Failover,
    RendezvousSubset,
    ServiceConfig,
    SlowStart,
    Status,
)
from meshlb.balancing import policy_names
from meshlb.config_file import read_settings
from meshlb.model import NO_CONTEXT, OK, CallContext
from meshlb.node import Node
from meshlb.resources import EndpointResources
from meshlb.testing import LocalMesh
from tests.core.fork_programs import run
from tests.core.parts import FAILURE, assert_adds_up, endpoint


def peers(n: int) -> list[Endpoint]:
    return [Endpoint("192.0.2.1", 1000 + number, id=f"shop-{number:02}") for number in range(n)]


@contextmanager
def service(endpoints: int, subset: Any, *, seed: int = 1, **settings: Any) -> Iterator[tuple[LocalMesh, Cluster]]:
    settings.setdefault("policy", "round_robin")
    config = ServiceConfig(subset=subset, **settings)
    services = {"orders": [endpoint(i) for i in range(endpoints)], "shop": peers(4)}
    with LocalMesh(services, defaults=config, seed=seed) as mesh:
        cluster = mesh.cluster("orders")
        mesh.clock.advance()
        yield mesh, cluster


def members(cluster: Cluster) -> set[str]:
    return {node.endpoint.id for node in cluster.nodes if not node.out_of_subset}


def called(cluster: Cluster, calls: int = 500) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in range(calls):
        lease = cluster.start(CallContext(f"10.0.{number % 9}.{number}") if cluster.hashes else NO_CONTEXT)
        counts[lease.endpoint.id] += 1
        lease.close()
    return counts


def states(cluster: Cluster) -> Counter[str]:
    return Counter(row["state"] for row in cluster.snapshot()["endpoints"])


@pytest.mark.parametrize("policy", policy_names())
def test_only_the_subset_is_called(policy: str) -> None:
    with service(60, RendezvousSubset(10), policy=policy) as (_, cluster):
        assert len(members(cluster)) == 10
        assert set(called(cluster)) == members(cluster)
        assert states(cluster) == {"ready": 10, "out_of_subset": 50}


def test_every_mesh_has_its_own() -> None:
    with service(60, RendezvousSubset(10), seed=1) as (_, one), service(60, RendezvousSubset(10), seed=2) as (_, two):
        assert members(one) != members(two)


def test_the_snapshot_says_which_part_it_is() -> None:
    with service(60, RendezvousSubset(10)) as (_, cluster):
        snapshot = cluster.snapshot()
        assert snapshot["subset"] == {
            "method": "rendezvous",
            "endpoints": 10,
            "of": 60,
            "widened": 0,
            "instance": None,
            "instances": None,
            "reason": "",
        }
        outside = next(row for row in snapshot["endpoints"] if row["state"] == "out_of_subset")
        assert (outside["reason"], outside["eligible"]) == ("not in the subset that this process uses", False)
    with service(3, None) as (_, cluster):
        assert cluster.snapshot()["subset"] is None


def test_a_member_that_goes_is_replaced_by_one() -> None:
    with service(60, RendezvousSubset(10)) as (mesh, cluster):
        before = members(cluster)
        gone = next(iter(before))
        mesh.update("orders", [endpoint(i) for i in range(60) if f"i{i}" != gone])
        assert len(members(cluster) - before) == 1
        assert before - members(cluster) == {gone}
        mesh.update("orders", [endpoint(i) for i in range(60)])
        assert members(cluster) == before


def test_it_is_widened_when_it_is_ill_and_shrinks_again() -> None:
    with service(60, RendezvousSubset(10)) as (mesh, cluster):
        before = members(cluster)
        ill = set(sorted(before)[:7])

        def instances(status: Status) -> list[Endpoint]:
            return [endpoint(i, status=status if f"i{i}" in ill else Status.PASSING) for i in range(60)]

        mesh.update("orders", instances(Status.CRITICAL))
        snapshot = cluster.snapshot()
        assert (snapshot["subset"]["endpoints"], snapshot["subset"]["widened"], snapshot["panic"]) == (17, 7, False)
        assert len(called(cluster)) == 10
        assert not ill & set(called(cluster))
        mesh.update("orders", instances(Status.PASSING))
        assert members(cluster) == before
        mesh.update("orders", [endpoint(i, status=Status.CRITICAL) for i in range(60)])
        assert cluster.view.panic  # all of them: nothing is left to be widened to
        assert len(cluster.view.nodes) == 60


def test_open_breakers_make_it_ill_too() -> None:
    with service(60, RendezvousSubset(4), panic_threshold=0, max_ejection_percent=100) as (mesh, cluster):
        before = members(cluster)
        for _ in range(40):
            if (lease := cluster.try_start()) is not None:
                lease.close(FAILURE if lease.endpoint.id in before else OK)
            mesh.clock.advance(0.001)
        assert set(called(cluster)) & before == set()
        assert cluster.snapshot()["subset"]["widened"] >= 3


def test_failover_tiers_have_a_subset_each() -> None:
    failover = Failover(by="zone", order=("a", "b"))
    with service(0, RendezvousSubset(5), failover=failover) as (mesh, cluster):
        near = [endpoint(i, zone="a") for i in range(20)]
        far = [endpoint(20 + i, zone="b") for i in range(40)]
        mesh.update("orders", [*far, *near])
        mesh.clock.advance()
        assert len(members(cluster)) == 10
        served = called(cluster)
        assert len(served) == 5
        assert set(served) <= {node.id for node in near}
        mesh.update("orders", [*far, *(endpoint(i, zone="a", status=Status.CRITICAL) for i in range(20))])
        mesh.clock.advance()
        served = called(cluster)
        assert len(served) == 5
        assert set(served) <= {node.id for node in far}


# --- connections


class Held:
    """What an adapter holds for endpoints."""

    def __init__(self, cluster: Cluster) -> None:
        self.open: set[str] = set()
        self.resources = EndpointResources(cluster, self._make, self._close)

    def _make(self, node: Node) -> str:
        self.open.add(node.endpoint.id)
        return node.endpoint.id

    def _close(self, resource: str) -> None:
        self.open.remove(resource)


def test_connections_are_closed_when_their_endpoint_leaves_the_subset_and_is_idle() -> None:
    with service(12, DeterministicAperture("shop", size=3, instance_id="shop-01")) as (mesh, cluster):
        held = Held(cluster)
        leases = [cluster.start() for _ in range(6)]
        for lease in leases:
            held.resources.get(lease.node)
        before = members(cluster)
        assert held.open == before
        mesh.update("shop", peers(2))  # another place, another window
        mesh.clock.advance()
        assert before - members(cluster)
        assert held.open == before  # their calls go on, however long
        mesh.clock.advance(cluster.config.drain_timeout + 1)
        assert held.open == before
        for lease in leases:
            lease.close()
        mesh.clock.advance()
        assert held.open == before & members(cluster)
        assert_adds_up(cluster.nodes)
        # Back in it, they are used again.
        mesh.update("shop", peers(4))
        mesh.clock.advance()
        assert members(cluster) == before
        assert set(called(cluster)) == before


def test_idle_ones_are_closed_at_once() -> None:
    with service(12, DeterministicAperture("shop", size=3, instance_id="shop-01")) as (mesh, cluster):
        held = Held(cluster)
        for node in cluster.view.nodes:
            held.resources.get(node)
        before = members(cluster)
        mesh.update("shop", peers(2))
        mesh.clock.advance()
        assert held.open == before & members(cluster) != before


def test_one_that_is_in_it_again_by_then_keeps_its_connection() -> None:
    with service(12, DeterministicAperture("shop", size=3, instance_id="shop-01")) as (mesh, cluster):
        held = Held(cluster)
        for node in cluster.view.nodes:
            held.resources.get(node)
        before = members(cluster)
        mesh.update("shop", peers(2))
        cluster.refresh()
        mesh.update("shop", peers(4))
        cluster.refresh()
        mesh.clock.advance()
        assert held.open == before == members(cluster)


# --- the aperture


def apertures(size: int, instances: int, servers: int, **settings: Any) -> Counter[str]:
    """What every server gets from all instances together, each of which makes the same number of calls."""
    load: Counter[str] = Counter()
    for number in range(instances):
        subset = DeterministicAperture("shop", size=size, instance_id=f"shop-{number:02}")
        with service(servers, subset, seed=number, **settings) as (mesh, cluster):
            mesh.update("shop", peers(instances))
            mesh.clock.advance()
            assert cluster.snapshot()["subset"]["instance"] == number
            load += called(cluster, 2000)
    return load


@pytest.mark.parametrize("policy", ["round_robin", "weighted_round_robin", "random", "least_connections"])
def test_together_the_instances_load_every_server_evenly(policy: str) -> None:
    load = apertures(3, 6, 10, policy=policy)  # windows of 10/3 servers
    assert len(load) == 10
    for server in load.values():
        assert server == pytest.approx(6 * 2000 / 10, rel=0.1)


def test_the_edges_are_fractions_of_a_weight() -> None:
    with service(5, DeterministicAperture("shop", size=2, instance_id="shop-01"), policy="random") as (mesh, cluster):
        mesh.update("shop", peers(3))  # from 5/3 to 5
        mesh.clock.advance()
        rows = [row for row in cluster.snapshot()["endpoints"] if row["state"] == "ready"]
        assert sorted(row["weight"] for row in rows) == pytest.approx([1 / 3, 1, 1, 1])
        assert sorted(node.weight for node in cluster.view.nodes) == pytest.approx([1 / 3, 1, 1, 1])
        mesh.update("orders", [endpoint(i, weight=3) for i in range(5)])
        assert sorted(node.weight for node in cluster.view.nodes) == pytest.approx([1, 3, 3, 3])


def test_a_rendezvous_until_the_place_is_known() -> None:
    with service(30, DeterministicAperture("shop", size=5, instance_id="shop-09")) as (mesh, cluster):
        described = cluster.snapshot()["subset"]
        assert (described["method"], described["endpoints"]) == ("rendezvous", 5)
        assert described["reason"] == "'shop': none of the 4 that take part is with id or address 'shop-09'"
        before = members(cluster)
        mesh.update("shop", peers(10))
        mesh.clock.advance()
        described = cluster.snapshot()["subset"]
        assert (described["method"], described["instance"], described["instances"]) == ("deterministic_aperture", 9, 10)
        assert members(cluster) != before


def test_clusters_share_one_watch_of_the_peers() -> None:
    aperture = DeterministicAperture("shop", size=3, instance_id="shop-02")
    services = {name: [endpoint(i) for i in range(9)] for name in ("orders", "stock")}
    with LocalMesh({**services, "shop": peers(4)}, defaults=ServiceConfig(subset=aperture)) as mesh:
        clusters = [mesh.cluster(name) for name in ("orders", "stock", "shop")]  # its own service, too
        mesh.clock.advance()
        assert len(mesh._instances._watches) == 4
        for cluster in clusters:
            assert cluster.snapshot()["subset"]["instance"] == 2
        mesh.update("shop", peers(4)[1:])
        mesh.clock.advance()
        for cluster in clusters:
            assert (described := cluster.snapshot()["subset"])["instance"] == 1, described


def test_entering_the_subset_is_no_start() -> None:
    aperture = DeterministicAperture("shop", size=3, instance_id="shop-01")
    with service(12, aperture, slow_start=SlowStart(window=60)) as (mesh, cluster):
        mesh.clock.advance(10)
        before = members(cluster)
        mesh.update("shop", peers(2))
        mesh.clock.advance()
        assert members(cluster) != before
        assert {row["slow_start"] for row in cluster.snapshot()["endpoints"]} == {1.0}
        mesh.update("orders", [endpoint(i) for i in range(13)])
        assert [row["id"] for row in cluster.snapshot()["endpoints"] if row["slow_start"] < 1] == ["i12"]


def test_the_child_of_a_fork_has_a_subset_of_its_own() -> None:
    run("""
        from meshlb import RendezvousSubset
        instances = [Endpoint("127.0.0.1", 80 + i) for i in range(100)]
        mesh = Mesh(StaticDiscovery({"orders": instances}), defaults=ServiceConfig(subset=RendezvousSubset(10)))
        cluster = mesh.cluster("orders")
        cluster.wait_ready(20)

        def members():
            return {node.endpoint.port for node in cluster.nodes if not node.out_of_subset}

        before = members()

        def child():
            cluster.wait_ready(20)
            assert len(members()) == 10 and members() != before
            for _ in range(30):
                lease = cluster.start()
                assert lease.endpoint.port in members()
                lease.close()
            adds_up(cluster)
            mesh.close()

        end(in_child(child))
        assert members() == before
        mesh.close()
    """)


# --- configuration


def settings(tmp_path: Path, toml: str) -> ServiceConfig:
    (tmp_path / "meshlb.toml").write_text(toml)
    config: ServiceConfig = read_settings(tmp_path / "meshlb.toml")["services"]["orders"]
    return config


@pytest.mark.parametrize(
    ("line", "subset"),
    [
        ('subset = "rendezvous"', RendezvousSubset()),
        ('subset = { name = "rendezvous", size = 30, seed = 7 }', RendezvousSubset(30, 7)),
        ('subset = { name = "deterministic_aperture", peers = "shop" }', DeterministicAperture("shop")),
        (
            'subset = { name = "deterministic_aperture", peers = "shop", size = 20, instance_id = "shop-1" }',
            DeterministicAperture("shop", 20, "shop-1"),
        ),
        ("subset = false", None),
    ],
)
def test_a_subset_is_read_from_a_file(tmp_path: Path, line: str, subset: Any) -> None:
    assert settings(tmp_path, f"[services.orders]\n{line}\n").subset == subset


def test_slow_start_is_read_from_a_file(tmp_path: Path) -> None:
    read = settings(tmp_path, "[defaults]\nslow_start.window = 30\n[services.orders]\nslow_start.aggression = 2\n")
    assert read.slow_start == SlowStart(window=30, aggression=2)
    assert settings(tmp_path, "[services.orders]\nslow_start = true\n").slow_start == SlowStart()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("subset = { size = 3 }", r"\[services.orders\] subset: .* is not a table with a 'name' out of rendezvous"),
        ('subset = "aperture"', r"\[services.orders\] subset: 'aperture' is not a table with a 'name'"),
        (
            'subset = { name = "rendezvous", sizes = 3 }',
            r"\[services.orders.subset\] sizes: unknown; did you mean 'size'",
        ),
        ('subset = { name = "deterministic_aperture" }', r"\[services.orders.subset\] .*'peers'"),
        ('subset = { name = "rendezvous", size = 1 }', r"RendezvousSubset.size: 1 must be at least 2"),
        ("slow_start = { windows = 3 }", r"\[services.orders.slow_start\] windows: unknown; did you mean 'window'"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, f"[services.orders]\n{line}\n")


@pytest.mark.parametrize("field", ["slow_start", "subset"])
def test_options_of_another_kind_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"ServiceConfig\.{field}: 20 is not a "):
        ServiceConfig(**{field: 20})  # type: ignore[arg-type]
