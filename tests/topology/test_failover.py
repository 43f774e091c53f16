"""A cluster with tiers and zones: what calls, retries, timers and the snapshot make of them."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest

from meshlb import (
    Cluster,
    ConfigError,
    Endpoint,
    Failover,
    Mesh,
    Outcome,
    OutcomeKind,
    Sent,
    ServiceConfig,
    Status,
    Zones,
)
from meshlb.discovery import StaticDiscovery
from meshlb.model import CallContext
from meshlb.place import Coordinate, NetworkCoordinates, Place
from meshlb.testing import FakeClock, LocalMesh
from tests.core.fork_programs import run
from tests.support.wait import eventually

FAILURE = Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason="503")


def instances(datacenter: str, count: int = 2, **fields: Any) -> list[Endpoint]:
    number = int(datacenter[-1])
    return [Endpoint(f"10.{number}.0.{i + 1}", 80, datacenter=datacenter, **fields) for i in range(count)]


def make(clock: FakeClock | None = None, **settings: Any) -> tuple[LocalMesh, Cluster]:
    settings.setdefault("failover", Failover(datacenters=["dc1", "dc2"], failback_delay=30, ramp=10))
    settings.setdefault("policy", "round_robin")
    mesh = LocalMesh(
        {"orders": [*instances("dc1"), *instances("dc2")]}, defaults=ServiceConfig(**settings), clock=clock
    )
    return mesh, mesh.cluster("orders")


def calls(cluster: Cluster, count: int = 40) -> dict[str, int]:
    """Where so many calls go, by datacenter."""
    counts: Counter[str] = Counter()
    for _ in range(count):
        with cluster.lease() as lease:
            counts[lease.endpoint.datacenter] += 1
    return dict(counts)


def tiers(cluster: Cluster) -> dict[str, float]:
    return {tier["name"]: tier["share"] for tier in cluster.snapshot()["tiers"]}


def test_failing_over_by_breakers_and_back_by_timers() -> None:
    mesh, cluster = make()
    assert calls(cluster) == {"dc1": 40}
    while tiers(cluster)["dc1"]:
        lease = cluster.try_start()
        assert lease is not None
        assert lease.endpoint.datacenter == "dc1"
        lease.close(FAILURE)
        mesh.clock.advance()
    assert calls(cluster) == {"dc2": 40}
    row = cluster.snapshot()["endpoints"][0]
    assert (row["datacenter"], row["tier"], row["eligible"]) == ("dc1", 0, False)
    # The breakers let probes through again, and the tier is good from then on: the delay runs.
    mesh.clock.advance(5)
    assert calls(cluster) == {"dc2": 40}
    reason = cluster.snapshot()["tiers"][0]["reason"]
    assert reason.startswith("good again; gets the load back in ")
    mesh.clock.advance(27)
    share = tiers(cluster)["dc1"]
    assert 0 < share < 1
    spread = calls(cluster, 100)
    assert abs(spread["dc1"] - 100 * share) <= 3
    mesh.clock.advance(10)
    assert calls(cluster) == {"dc1": 40}


def test_all_endpoints_of_a_tier_may_be_held_out() -> None:
    """Although that is more than half of all: the other tier is there for that."""
    mesh, cluster = make()
    mesh.update("orders", [*instances("dc1", 9), *instances("dc2", 1)])
    for _ in range(200):
        lease = cluster.try_start()
        assert lease is not None
        lease.close(FAILURE if lease.endpoint.datacenter == "dc1" else Outcome(OutcomeKind.OK))
        mesh.clock.advance()
        if lease.endpoint.datacenter == "dc2":
            break
    assert calls(cluster) == {"dc2": 40}
    limited = Failover(order=["dc1", "dc2"], max_ejection_percent=50)
    _, cluster = make(failover=limited)
    for node in cluster.nodes:
        for _ in range(5):
            node.begin(True).close(FAILURE)  # type: ignore[union-attr]  # not retired
    assert sum(node.is_open for node in cluster.nodes) == 2


def test_a_flapping_registry_moves_nothing_back() -> None:
    mesh, cluster = make()
    down = [*instances("dc1", status=Status.CRITICAL), *instances("dc2")]
    up = [*instances("dc1"), *instances("dc2")]
    for _ in range(60):
        mesh.update("orders", down)
        assert calls(cluster, 10) == {"dc2": 10}
        mesh.clock.advance(5)
        mesh.update("orders", up)
        assert calls(cluster, 10) == {"dc2": 10}
        mesh.clock.advance(5)
    mesh.clock.advance(25)
    assert tiers(cluster)["dc1"] > 0
    mesh.update("orders", down)
    assert calls(cluster, 10) == {"dc2": 10}


def test_a_retry_goes_to_the_same_tier_first_and_then_to_the_next() -> None:
    _, cluster = make()
    tried: list[Any] = []
    for _ in range(4):
        lease = cluster.try_again(CallContext(excluded=tuple(tried)))
        assert lease is not None
        tried.append(lease.node)
        lease.close(FAILURE)
    assert [node.endpoint.datacenter for node in tried] == ["dc1", "dc1", "dc2", "dc2"]


def test_panic_is_a_tiers_own() -> None:
    mesh, cluster = make(failover=Failover(order=["dc1", "dc2"], mode="spill"))
    weak = [*instances("dc1", 9, status=Status.CRITICAL), *instances("dc1", 10)[9:]]
    mesh.update("orders", [*weak, *instances("dc2", 5), *instances("dc2", 10, status=Status.CRITICAL)[5:]])
    assert cluster.view.panic
    assert [tier["panic"] for tier in cluster.snapshot()["tiers"]] == [True, False]
    forced = {node.endpoint.datacenter: cluster.view.forces(node) for node in cluster.nodes}
    assert forced == {"dc1": True, "dc2": False}
    spread = {lease.endpoint.status for lease in (cluster.try_start() for _ in range(60)) if lease is not None}
    assert spread == {Status.CRITICAL, Status.PASSING}


def test_active_active() -> None:
    weights = {"dc1": 3.0, "dc2": 1.0}
    mesh, cluster = make(failover=Failover(order=["dc1", "dc2"], mode="active_active", weights=weights))
    assert calls(cluster, 400)["dc1"] == pytest.approx(300, abs=3)
    mesh.update("orders", [*instances("dc1", status=Status.CRITICAL), *instances("dc2")])
    assert calls(cluster) == {"dc2": 40}


def test_one_datacenter_that_was_asked_for_by_name() -> None:
    mesh, _ = make()
    only = mesh.cluster("orders", datacenter="dc2")
    assert calls(only) == {"dc2": 40}


def test_no_tiers_no_cost() -> None:
    _, cluster = make(failover=None)
    assert type(cluster.view.picker).__name__ == "RoundRobinPicker"
    assert cluster.snapshot()["tiers"] == []
    # Nor with tiers, while there is only one of them.
    mesh, cluster = make()
    mesh.update("orders", instances("dc1"))
    assert type(cluster.view.picker).__name__ == "RoundRobinPicker"
    assert tiers(cluster) == {"dc1": 1.0, "dc2": 0.0}


@pytest.mark.parametrize("policy", ["consistent_hash", "ip_hash"])
def test_keys_stay_within_their_tier(policy: str) -> None:
    mesh, cluster = make(policy=policy)
    where = {}
    for i in range(60):
        with cluster.lease(key=f"10.9.8.{i}") as lease:
            where[i] = lease.endpoint
    assert {endpoint.datacenter for endpoint in where.values()} == {"dc1"}
    mesh.update("orders", [*instances("dc1"), *instances("dc2", 7)])  # what the other tier does moves no key
    for i in range(60):
        with cluster.lease(key=f"10.9.8.{i}") as lease:
            assert lease.endpoint == where[i]


@pytest.mark.parametrize("policy", ["least_response_time", "prequal", "client_weighted_round_robin", "random"])
def test_every_policy_in_groups(policy: str) -> None:
    _, cluster = make(policy=policy, failover=Failover(order=["dc1", "dc2"], mode="active_active"))
    spread = calls(cluster, 200)
    assert abs(spread["dc1"] - spread["dc2"]) <= 4


def test_nobody_and_then_somebody() -> None:
    mesh, cluster = make()
    mesh.update("orders", [])
    assert cluster.try_start() is None
    assert tiers(cluster) == {"dc1": 0.0, "dc2": 0.0}
    mesh.update("orders", instances("dc2"))
    assert calls(cluster) == {"dc2": 40}
    mesh.update("orders", instances("dc1", status=Status.MAINTENANCE))
    assert cluster.try_start() is None


def test_zones_with_peers_from_the_registry() -> None:
    config = ServiceConfig(policy="round_robin", zones=Zones(zone="a", peers="web"))
    web = [Endpoint("10.7.0.1", 80, zone="a"), Endpoint("10.7.0.2", 80, zone="a"), Endpoint("10.7.0.3", 80, zone="b")]
    orders = [Endpoint(f"10.8.0.{i}", 80, zone="a" if i <= 2 else "b") for i in range(1, 7)]
    mesh = LocalMesh({"orders": orders, "web": web}, configs={"orders": config})
    cluster = mesh.cluster("orders")
    mesh.clock.advance()
    # Two thirds of the callers and a third of the endpoints are here: half of the calls can stay.
    counts: Counter[str] = Counter()
    for _ in range(400):
        with cluster.lease() as lease:
            counts[lease.endpoint.zone] += 1
    assert counts["a"] == pytest.approx(200, abs=3)
    mesh.update("web", web[1:])
    mesh.clock.advance()
    assert [round(group.share, 2) for group in cluster.view.layout.groups] == [0.67, 0.33]  # type: ignore[union-attr]
    mesh.update("orders", orders[2:])  # the zone is lost
    assert calls(cluster, 10) == {"": 10}


def test_the_place_may_be_learnt_later() -> None:
    _, cluster = make(failover=Failover(by="nearest"))
    assert tiers(cluster) == {"unknown": 1.0}

    def at(seconds: float) -> Coordinate:
        return Coordinate((seconds, 0.0))

    servers = {"dc1": (at(0.0),), "dc2": (at(0.03),)}
    coordinates = NetworkCoordinates(at(0.0), {"": at(0.001)}, servers)
    cluster.place_changed(Place("dc1", "me", coordinates=coordinates))
    assert tiers(cluster) == {"up to 2 ms": 1.0, "up to 50 ms": 0.0}
    assert calls(cluster) == {"dc1": 40}


def test_busy_tiers_spill_by_the_clock() -> None:
    mesh, cluster = make(failover=Failover(order=["dc1", "dc2"], mode="spill", max_in_flight=2))
    held = [cluster.try_start() for _ in range(16)]
    assert {lease.endpoint.datacenter for lease in held if lease is not None} == {"dc1"}
    mesh.clock.advance(60)
    assert 0 < tiers(cluster)["dc1"] < 0.5
    for lease in held:
        assert lease is not None
        lease.close()
    mesh.clock.advance(60)
    assert tiers(cluster)["dc1"] == 1.0


def test_settings() -> None:
    for name in ("failover", "zones"):
        with pytest.raises(ConfigError, match=rf"ServiceConfig\.{name}"):
            ServiceConfig(**{name: "dc2"})  # type: ignore[arg-type]


def test_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "meshlb.toml"
    path.write_text(
        """
        [static.services]
        orders = [{ address = "10.1.0.1:80", datacenter = "dc1" }, { address = "10.2.0.1:80", region = "us" }]

        [services.orders.failover]
        datacenters = ["dc1", "dc2"]
        mode = "active_active"
        weights = { dc1 = 3, dc2 = 1 }

        [services.orders.zones]
        zone = "a"
        peers = "web"

        [services.stock]
        failover = { by = { name = "region", table = { eu = ["us"] }, region = "eu" }, max_in_flight = false }

        [services.far]
        failover = { by = { name = "distance", steps = [10, 100] } }

        [services.near]
        failover = { by = "nearest" }
        """
    )
    with Mesh.from_file(path) as mesh:
        orders = mesh.config_of("orders")
        assert orders.failover == Failover(
            datacenters=["dc1", "dc2"], mode="active_active", weights={"dc1": 3, "dc2": 1}
        )
        assert orders.zones == Zones(zone="a", peers="web")
        stock = mesh.config_of("stock").failover
        assert stock is not None
        assert stock.nearest is not None
        assert stock.mode == "spill"
        assert mesh.config_of("far").failover is not None
        assert mesh.config_of("near").failover == Failover(by="nearest")
    for wrong, message in (
        ('failover = { by = "planet" }', "Failover.by"),
        ('failover = { by = { name = "planet" } }', "rtt, region, distance"),
        ('failover = { by = { name = "rtt", step = 3 } }', "did you mean 'steps'"),
        ("zones = {}", "Zones.peers"),
        ("zones = { peer = 3 }", "did you mean 'peers'"),
    ):
        path.write_text(f"[services.orders]\n{wrong}\n")
        with pytest.raises(ConfigError, match=message):
            Mesh.from_file(path)


def test_a_mesh_that_is_dropped_goes_away_with_all_its_watches() -> None:
    discovery = StaticDiscovery({"orders": [*instances("dc1"), *instances("dc2")], "web": ["10.0.0.1:80"]})
    failover = Failover(datacenters=["dc1", "dc2"], prefetch=True, max_in_flight=5, mode="spill")
    config = ServiceConfig(failover=failover, zones=Zones(peers="web"))
    mesh = Mesh(discovery, services={"orders": config})
    mesh.cluster("orders").wait_ready(20)
    reference = weakref.ref(mesh)
    del mesh

    def gone() -> bool:
        gc.collect()
        return reference() is None

    eventually(gone, timeout=20)


def test_a_child_of_a_fork_fails_back_by_timers_of_its_own() -> None:
    run(
        """
        from meshlb import Failover
        def instances(down):
            status = "critical" if down else "passing"
            first = [Endpoint(f"127.0.0.{i}", 80, datacenter="dc1", status=status) for i in (1, 2)]
            return first + [Endpoint("127.0.0.3", 80, datacenter="dc2")]
        discovery = StaticDiscovery({"orders": instances(False)})
        failover = Failover(datacenters=["dc1", "dc2"], failback_delay=0.3, ramp=0.2)
        mesh = Mesh(discovery, defaults=ServiceConfig(failover=failover))
        cluster = mesh.cluster("orders")
        cluster.wait_ready(10)
        share = lambda: cluster.snapshot()["tiers"][0]["share"]
        assert share() == 1.0
        discovery.update("orders", instances(True))
        eventually(lambda: share() == 0.0)  # once the second datacenter has been asked
        discovery.update("orders", instances(False))  # the delay begins in the parent

        def child():
            assert cluster.start().close()
            eventually(lambda: share() == 1.0)
            discovery.update("orders", instances(True))
            eventually(lambda: share() == 0.0)
            discovery.update("orders", instances(False))
            eventually(lambda: share() == 1.0)
            mesh.close()

        end(in_child(child))
        eventually(lambda: share() == 1.0)
        mesh.close()
        assert threading.active_count() == 1
        """
    )
