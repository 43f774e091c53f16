"""Every policy ramps, and only while somebody is in slow start."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from meshlb import (
    Breaker,
    Cluster,
    ConsistentHash,
    IPHash,
    LeastConnections,
    ServiceConfig,
    SlowStart,
    Status,
)
from meshlb.balancing import Picker, PolicyEnvironment, policy_names
from meshlb.balancing.base import CandidateT
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.partial import PartialPicker
from meshlb.model import NO_CONTEXT, CallContext
from meshlb.testing import LocalMesh
from tests.core.fork_programs import run
from tests.core.parts import FAILURE, assert_adds_up, endpoint

WINDOW = 60.0
CALLS = 4000


@contextmanager
def service(endpoints: int, policy: Any = "round_robin", **settings: Any) -> Iterator[tuple[LocalMesh, Cluster]]:
    settings.setdefault("slow_start", SlowStart(window=WINDOW))
    config = ServiceConfig(policy=policy, **settings)
    with LocalMesh({"orders": [endpoint(i) for i in range(endpoints)]}, defaults=config) as mesh:
        yield mesh, mesh.cluster("orders")


def grow(mesh: LocalMesh, endpoints: int) -> None:
    mesh.update("orders", [endpoint(i) for i in range(endpoints)])


def context(cluster: Cluster, number: int) -> CallContext:
    return CallContext(f"10.{number % 250}.{number // 250}.9") if cluster.hashes else NO_CONTEXT


def called(cluster: Cluster, calls: int = CALLS) -> Counter[str]:
    """Who gets calls, one after the other, each with a key of its own."""
    counts: Counter[str] = Counter()
    for number in range(calls):
        lease = cluster.start(context(cluster, number))
        counts[lease.endpoint.id] += 1
        lease.close()
    return counts


def row(cluster: Cluster, id: str) -> dict[str, Any]:
    return next(row for row in cluster.snapshot()["endpoints"] if row["id"] == id)


class Head:
    """A policy of somebody's own, which knows nothing of weights or parts: always the first that is left."""

    name: ClassVar[str] = "head"

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        class HeadPicker:
            def pick(self, call: CallContext) -> CandidateT | None:
                return next((candidate for candidate in candidates if candidate not in call.excluded), None)

        return HeadPicker()


POLICIES: list[Any] = [
    *policy_names(),
    *(ConsistentHash(table=table) for table in ("ring", "maglev")),
    ConsistentHash(bounded_load=1.25),
    IPHash(ipv4_prefix=24),
    LeastConnections(full_scan=True),
    LeastConnections(choices=3),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("endpoints", [2, 5])
def test_the_share_grows_from_a_part_to_the_whole(policy: Any, endpoints: int) -> None:
    with service(endpoints - 1, policy) as (mesh, cluster):
        mesh.clock.advance(1)
        grow(mesh, endpoints)
        new, shares = f"i{endpoints - 1}", []
        for _ in range(4):
            shares.append(called(cluster)[new] / CALLS)
            mesh.clock.advance(20)
        fair = 1 / endpoints
        assert 0 < shares[0] < 0.25 * fair
        assert shares[0] < shares[1] < shares[2] < shares[3]
        assert shares[3] == pytest.approx(fair, rel=0.3)  # hashes: of 4,000 keys
        assert not isinstance(cluster.view.picker, PartialPicker)
        assert len({node.weight for node in cluster.nodes}) == 1


@pytest.mark.parametrize("policy", ["round_robin", "weighted_round_robin", "random", "client_weighted_round_robin"])
def test_shares_are_those_of_weights(policy: str) -> None:
    """Envoy: slow start is a weight. At a third of it, one of three endpoints gets one call in seven."""
    with service(2, policy) as (mesh, cluster):
        grow(mesh, 3)
        mesh.clock.advance(20)
        cluster.refresh()
        counts = called(cluster)
        assert counts["i2"] / CALLS == pytest.approx(1 / 7, rel=0.15)
        assert counts["i0"] / CALLS == pytest.approx(3 / 7, rel=0.1)


def test_one_that_is_idle_and_fast_is_not_rushed_to() -> None:
    """By weight alone, least_response_time would send every call to it."""
    with service(1, "least_response_time") as (mesh, cluster):
        grow(mesh, 2)
        new = 0
        for _ in range(2000):
            lease = cluster.start()
            new += lease.endpoint.id == "i1"
            mesh.clock.advance(0.0001 if lease.endpoint.id == "i1" else 0.002)
            lease.close()
        assert new < 0.15 * 2000


@pytest.mark.parametrize("table", ["rendezvous", "ring", "maglev"])
def test_a_key_moves_once_and_to_the_new_endpoint_only(table: Any) -> None:
    with service(4, ConsistentHash(table=table)) as (mesh, cluster):

        def owners() -> list[str]:
            leases = [cluster.start(context(cluster, number)) for number in range(1000)]
            for lease in leases:
                lease.close()
            return [lease.endpoint.id for lease in leases]

        alone = owners()
        grow(mesh, 5)
        history = [owners()]
        for _ in range(13):
            mesh.clock.advance(5)
            history.append(owners())
        for former, later in itertools.pairwise(history):
            moved = [(a, b) for a, b in zip(former, later, strict=True) if a != b]
            assert all(b == "i4" for _, b in moved)
        # Apart from those that the table itself moves at once (a ring has fewer points for each then), nobody moved.
        elsewhere = sum(a != b != "i4" for a, b in zip(alone, history[0], strict=True))
        assert elsewhere <= {"rendezvous": 0, "ring": 200, "maglev": 50}[table]
        assert [owner == "i4" for owner in history[-1]].count(True) == pytest.approx(200, rel=0.4)


def test_two_processes_move_the_same_keys() -> None:
    def owners() -> list[str]:
        with service(4, "consistent_hash") as (mesh, cluster):
            grow(mesh, 5)
            mesh.clock.advance(30)
            return [cluster.start(context(cluster, number)).endpoint.id for number in range(300)]

    assert owners() == owners()


def test_a_retry_goes_elsewhere_also_to_a_new_one_if_need_be() -> None:
    with service(1) as (mesh, cluster):
        grow(mesh, 2)
        old, new = cluster.nodes
        for _ in range(20):
            assert cluster.view.picker.pick(CallContext(excluded={old})) is new
            assert cluster.view.picker.pick(CallContext(excluded={new})) is old
            assert cluster.view.picker.pick(CallContext(excluded={old, new})) is None


def test_a_policy_of_ones_own_ramps_too() -> None:
    with service(2, Head()) as (mesh, cluster):
        mesh.update("orders", [endpoint(9), endpoint(0), endpoint(1)])
        mesh.clock.advance(30)
        counts = called(cluster)
        assert counts["i9"] / CALLS == pytest.approx(0.5, rel=0.1)  # of all calls, which the policy would give it
        assert set(counts) == {"i9", "i0"}
        mesh.clock.advance(30)
        assert set(called(cluster)) == {"i9"}


def test_what_a_picker_offers_besides_is_offered_on() -> None:
    with service(3, "prequal") as (mesh, cluster):
        grow(mesh, 4)
        assert isinstance(cluster.view.picker, PartialPicker)
        for node in cluster.nodes:
            report = LoadReport(named_metrics={"requests_in_flight": 3.0, "latency_seconds": 0.1})
            cluster.observe_report(node, report)
        assert len(cluster.view.picker.probes()) == 4
        mesh.clock.advance(0.5)
        mesh.update("orders", [endpoint(i) for i in (0, 1, 3)])  # a new picker takes them over
        assert len(cluster.view.picker.probes()) == 3


def test_a_tables_former_self_serves_those_who_stay() -> None:
    with service(3, ConsistentHash(table="maglev")) as (mesh, cluster):
        before = cluster.view.picker.table  # type: ignore[attr-defined]
        grow(mesh, 4)
        picker = cluster.view.picker
        assert isinstance(picker, PartialPicker)
        assert picker.others is not None
        assert picker.others.table is before  # type: ignore[attr-defined]
        whole = picker.picker.table  # type: ignore[attr-defined]
        mesh.clock.advance(WINDOW + 1)
        assert cluster.view.picker.table is whole  # type: ignore[attr-defined]


# --- who starts slowly


def slow(cluster: Cluster) -> dict[str, float]:
    rows = cluster.snapshot()["endpoints"]
    return {row["id"]: round(row["slow_start"], 6) for row in rows if row["slow_start"] < 1}


def test_back_from_a_critical_check_from_maintenance_and_from_the_set() -> None:
    with service(4) as (mesh, cluster):
        assert slow(cluster) == {}
        mesh.update(
            "orders",
            [endpoint(0), endpoint(1, status=Status.CRITICAL), endpoint(2, status=Status.MAINTENANCE), endpoint(4)],
        )
        mesh.clock.advance(30)
        assert slow(cluster) == {"i4": 0.5}
        grow(mesh, 4)
        assert slow(cluster) == {"i1": 0.1, "i2": 0.1, "i3": 0.1}


def test_back_from_an_open_breaker_once_it_has_closed() -> None:
    with service(3, breaker=Breaker(consecutive_failures=1, open_time=5, jitter=0)) as (mesh, cluster):
        mesh.clock.advance(WINDOW)
        lease = cluster.start()
        ill = lease.node
        lease.close(FAILURE)
        mesh.clock.advance(4)
        assert ill.is_open
        mesh.clock.advance(3)  # half-open: the breaker itself measures out the calls
        assert slow(cluster) == {}
        called(cluster, 3)
        mesh.clock.advance()
        assert slow(cluster) == {ill.endpoint.id: 0.1}
        assert row(cluster, ill.endpoint.id)["reason"] == "slow start: takes 10% of its share"


def test_not_after_a_total_outage_nor_in_panic() -> None:
    with service(4, panic_threshold=0) as (mesh, cluster):
        mesh.update("orders", [endpoint(i, status=Status.CRITICAL) for i in range(4)])
        assert not cluster.view.nodes
        for up in range(1, 5):
            mesh.update("orders", [endpoint(i, status=Status.PASSING if i < up else Status.CRITICAL) for i in range(4)])
            mesh.clock.advance(1)
            assert len(cluster.view.nodes) == up
            assert slow(cluster) == {}
    with service(4) as (mesh, cluster):
        mesh.update("orders", [endpoint(i, status=Status.CRITICAL if i else Status.PASSING) for i in range(4)])
        assert cluster.view.panic
        grow(mesh, 4)
        assert slow(cluster) == {}


def test_off_by_default() -> None:
    with service(2, slow_start=None) as (mesh, cluster):
        grow(mesh, 3)
        assert slow(cluster) == {}
        assert called(cluster, 300) == {"i0": 100, "i1": 100, "i2": 100}


# --- weights and timers


def test_the_effective_weight_is_the_registrys_times_the_factor() -> None:
    with service(2, "weighted_round_robin") as (mesh, cluster):
        mesh.update("orders", [endpoint(0), endpoint(1), endpoint(2, weight=4)])
        assert row(cluster, "i2")["weight"] == pytest.approx(0.4)
        mesh.clock.advance(30)
        assert (cluster.nodes[2].weight, row(cluster, "i2")["weight"]) == (2.0, 2.0)
        mesh.update("orders", [endpoint(0), endpoint(1), endpoint(2, weight=8)])
        assert cluster.nodes[2].weight == 4.0
        mesh.clock.advance(30)
        assert cluster.nodes[2].weight == 8.0


@pytest.mark.parametrize(("policy", "views"), [("weighted_round_robin", 10), ("least_response_time", 1)])
def test_views_are_built_while_somebody_ramps_and_not_for_nothing(policy: str, views: int) -> None:
    with service(2, policy) as (mesh, cluster):
        version = cluster.view.version
        mesh.clock.advance(10 * WINDOW)
        assert cluster.view.version == version
        grow(mesh, 3)
        version = cluster.view.version
        mesh.clock.advance(10 * WINDOW)
        assert cluster.view.version == version + views


def test_closing_ends_it() -> None:
    with service(2) as (mesh, cluster):
        grow(mesh, 3)
        version = cluster.view.version
    mesh.clock.advance(WINDOW)
    assert cluster.view.version <= version


def test_calls_add_up_while_endpoints_come_and_go() -> None:
    for policy in policy_names():
        with service(3, policy) as (mesh, cluster):
            for step in range(60):
                mesh.update("orders", [endpoint(i) for i in range(9) if (i + step) % 4 or not i])
                leases = [cluster.start(context(cluster, step * 7 + number)) for number in range(7)]
                mesh.clock.advance(5)
                for lease in leases:
                    lease.close()
            assert_adds_up(cluster.nodes)


def test_it_goes_on_in_the_child_of_a_fork() -> None:
    run("""
        now = [1000.0]
        instances = [Endpoint("127.0.0.1", 80 + i) for i in range(3)]
        discovery = StaticDiscovery({"orders": instances})
        from meshlb import SlowStart
        config = ServiceConfig(policy="weighted_round_robin", slow_start=SlowStart(window=10))
        mesh = Mesh(discovery, defaults=config, clock=lambda: now[0])
        cluster = mesh.cluster("orders")
        cluster.wait_ready(20)
        discovery.update("orders", [*instances, Endpoint("127.0.0.1", 90)])
        assert [row["slow_start"] < 1 for row in cluster.snapshot()["endpoints"]] == [False] * 3 + [True]

        def child():
            cluster.start().close()
            assert [node.weight < 1 for node in cluster.nodes] == [False] * 3 + [True]
            now[0] += 20  # the timer that finds out is not the parent's
            eventually(lambda: [node.weight for node in cluster.nodes] == [1.0] * 4)
            mesh.close()

        end(in_child(child))
        now[0] += 20
        eventually(lambda: [node.weight for node in cluster.nodes] == [1.0] * 4)
        mesh.close()
    """)
