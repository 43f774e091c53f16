"""Reconciling by identity: whatever comes in whatever order, the sums add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshlb import Breaker, Endpoint, Lease, Status
from meshlb.model import OK
from meshlb.node import Node
from meshlb.resilience import BreakerState
from tests.core.parts import FAILURE, IGNORED, OVERLOAD, assert_adds_up, endpoint, make_cluster


class Removed:
    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def endpoint_removed(self, node: Node) -> None:
        self.nodes.append(node)


def test_state_survives_updates_of_the_set() -> None:
    mesh, cluster = make_cluster(2)
    kept = cluster.nodes[0]
    kept.latency.observe(0.5, mesh.clock())
    lease = kept.begin()
    mesh.update("orders", [endpoint(0, weight=3, tags=("new",)), endpoint(5)])
    assert cluster.nodes[0] is kept
    assert (kept.weight, kept.endpoint.tags, kept.in_flight, kept.latency.value) == (3, ("new",), 1, 0.5)
    assert lease is not None
    lease.close()
    mesh.close()


def test_an_equal_update_builds_no_new_view() -> None:
    mesh, cluster = make_cluster(3)
    before = cluster.view
    mesh.update("orders", [endpoint(i) for i in range(3)])
    assert cluster.view is before
    mesh.close()


def test_an_endpoint_without_calls_is_let_go_at_once() -> None:
    mesh, cluster = make_cluster(2)
    removed = Removed()
    cluster.add_listener(removed)
    gone = cluster.nodes[1]
    mesh.update("orders", [endpoint(0)])
    mesh.clock.advance()
    assert removed.nodes == [gone]
    assert cluster._members.draining == ()
    mesh.close()


def test_an_endpoint_with_calls_is_let_go_after_the_last_one() -> None:
    mesh, cluster = make_cluster(1)
    removed = Removed()
    cluster.add_listener(removed)
    lease = cluster.start()
    mesh.update("orders", [])
    mesh.clock.advance(5)
    assert removed.nodes == []
    assert [row["state"] for row in cluster.snapshot()["endpoints"]] == ["draining"]
    lease.close()
    mesh.clock.advance()
    assert removed.nodes == [lease.node]
    mesh.clock.advance(100)
    assert len(removed.nodes) == 1
    mesh.close()


def test_an_endpoint_whose_calls_do_not_end_is_let_go_after_the_drain_timeout() -> None:
    mesh, cluster = make_cluster(1, drain_timeout=30)
    removed = Removed()
    cluster.add_listener(removed)
    lease = cluster.start()
    mesh.update("orders", [])
    mesh.clock.advance(29)
    assert removed.nodes == []
    mesh.clock.advance(2)
    assert removed.nodes == [lease.node]
    lease.close()
    mesh.clock.advance()
    assert len(removed.nodes) == 1
    mesh.close()


def test_no_drain_timeout_lets_go_at_once() -> None:
    mesh, cluster = make_cluster(1, drain_timeout=0)
    removed = Removed()
    cluster.add_listener(removed)
    lease = cluster.start()
    mesh.update("orders", [])
    mesh.clock.advance()
    assert removed.nodes == [lease.node]
    lease.close()
    mesh.close()


def test_the_timer_of_a_first_leaving_does_not_cut_the_second_one_short() -> None:
    mesh, cluster = make_cluster(1, drain_timeout=30)
    removed = Removed()
    cluster.add_listener(removed)
    lease = cluster.start()
    mesh.update("orders", [])
    mesh.clock.advance(10)
    mesh.update("orders", [endpoint(0)])
    assert cluster.nodes == (lease.node,)
    mesh.clock.advance(15)
    mesh.update("orders", [])
    mesh.clock.advance(20)  # 45 s after the first, 20 s after the second
    assert removed.nodes == []
    mesh.clock.advance(11)
    assert removed.nodes == [lease.node]
    lease.close()
    mesh.close()


def test_a_predecessors_end_does_not_let_go_of_its_successor() -> None:
    mesh, cluster = make_cluster(1, drain_timeout=30)
    removed = Removed()
    cluster.add_listener(removed)
    old = cluster.start()
    mesh.update("orders", [])
    mesh.clock.advance(31)  # the old one has been let go with its call still open
    mesh.update("orders", [endpoint(0)])
    new = cluster.start()
    assert new.node is not old.node
    mesh.update("orders", [])
    old.close()
    mesh.clock.advance()
    assert removed.nodes == [old.node]
    new.close()
    mesh.clock.advance()
    assert removed.nodes == [old.node, new.node]
    mesh.close()


def test_a_leaving_that_is_taken_back_before_it_is_noticed() -> None:
    mesh, cluster = make_cluster(1)
    removed = Removed()
    cluster.add_listener(removed)
    mesh.update("orders", [])
    mesh.update("orders", [endpoint(0)])  # the news of the leaving has not been handled yet
    lease = cluster.start()
    mesh.clock.advance(100)
    assert removed.nodes == []
    lease.close()
    mesh.close()


def test_the_news_of_a_first_leaving_does_not_end_the_second_one() -> None:
    mesh, cluster = make_cluster(1)
    removed = Removed()
    cluster.add_listener(removed)
    mesh.update("orders", [])  # without calls, so it may be let go: the news is on its way
    mesh.update("orders", [endpoint(0)])
    lease = cluster.start()
    mesh.update("orders", [])
    mesh.clock.advance()
    assert removed.nodes == []
    lease.close()
    mesh.clock.advance()
    assert removed.nodes == [lease.node]
    mesh.close()


def test_the_same_endpoint_twice_in_one_answer_is_one_endpoint() -> None:
    mesh, cluster = make_cluster(1)
    cluster.update([endpoint(0), endpoint(1), endpoint(1, weight=4), endpoint(0)])
    assert [node.weight for node in cluster.nodes] == [1, 4]
    lease = cluster.nodes[0].begin()
    cluster.update([])
    cluster.update([endpoint(0), endpoint(0)])
    assert lease is not None
    assert cluster.nodes == (lease.node,)
    lease.close()
    mesh.close()


def test_what_is_no_endpoint_changes_nothing() -> None:
    mesh, cluster = make_cluster(2)
    wrong: Any = [endpoint(0, weight=9), "10.0.0.9:80"]
    with pytest.raises(AttributeError):
        cluster.update(wrong)
    assert [node.endpoint for node in cluster.nodes] == [endpoint(0), endpoint(1)]
    mesh.close()


@pytest.mark.parametrize("way", ["critical", "gone"])
def test_news_that_an_endpoint_is_back_ends_its_time_out(way: str) -> None:
    mesh, cluster = make_cluster(2, breaker=Breaker(consecutive_failures=1, open_time=30, jitter=0))
    node = cluster.nodes[0]
    lease = node.begin()
    assert lease is not None
    held = node.begin()  # keeps it from being let go at once
    lease.close(FAILURE)
    assert node.is_open
    mesh.update("orders", [endpoint(1)] if way == "gone" else [endpoint(0, status=Status.CRITICAL), endpoint(1)])
    mesh.update("orders", [endpoint(0), endpoint(1)])
    assert node.breaker is not None
    assert node.breaker.state is BreakerState.HALF_OPEN
    assert node in cluster.view.nodes
    assert held is not None
    held.close()
    mesh.close()


def test_a_listener_that_raises_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def endpoint_removed(self, node: Node) -> None:
            raise ValueError("mine")

    mesh, cluster = make_cluster(2)
    listeners = [Broken(), Removed(), Broken(), Removed()]
    for listener in listeners:
        cluster.add_listener(listener)
    mesh.update("orders", [])
    mesh.clock.advance()
    assert [len(listener.nodes) for listener in listeners if isinstance(listener, Removed)] == [2, 2]
    assert caplog.text.count("ValueError: mine") == 4
    mesh.close()


def test_a_dropped_listener_is_forgotten() -> None:
    mesh, cluster = make_cluster(1)
    cluster.add_listener(Removed())
    assert len(cluster._listeners) == 0
    mesh.close()


class Life(RuleBasedStateMachine):
    """Any sequence of updates, calls and time. The invariants are what the rest of the program relies on."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh, self.cluster = make_cluster(
            3, breaker=Breaker(consecutive_failures=1, open_time=2, jitter=0), drain_timeout=20
        )
        self.leases: list[Lease] = []
        self.removed = Removed()
        self.seen: dict[int, Node] = {}
        self.cluster.add_listener(self.removed)

    @rule(
        members=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(Status), st.sampled_from([1, 2])), max_size=7),
    )
    def update(self, members: list[tuple[int, Status, float]]) -> None:
        self.cluster.update([endpoint(number, status=status, weight=weight) for number, status, weight in members])

    @rule(count=st.integers(1, 4))
    def start(self, count: int) -> None:
        for _ in range(count):
            lease = self.cluster.try_start()
            if lease is not None:
                self.leases.append(lease)

    @rule(data=st.data(), outcomes=st.lists(st.sampled_from([OK, FAILURE]), min_size=1, max_size=3))
    def probe(self, data: st.DataObject, outcomes: list[Any]) -> None:
        """One endpoint again and again, each time after its time out."""
        nodes = self.cluster.nodes
        node = nodes[data.draw(st.integers(0, len(nodes) - 1))] if nodes else None
        for outcome in outcomes:
            if node is not None and (lease := node.begin()) is not None:
                lease.close(outcome)
                self.sums_add_up()
            self.mesh.clock.advance(40)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), outcome=st.sampled_from([OK, FAILURE, FAILURE, FAILURE, OVERLOAD, IGNORED]))
    def end(self, data: st.DataObject, outcome: Any) -> None:
        self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))).close(outcome)

    @precondition(lambda self: self.leases)
    @rule()
    def drop(self) -> None:
        self.leases.pop()

    @precondition(lambda self: self.leases)
    @rule(healthy=st.booleans())
    def answer(self, healthy: bool) -> None:
        self.leases[-1].answered(healthy=healthy)

    @rule(seconds=st.sampled_from([0, 0.5, 3, 25]))
    def wait(self, seconds: float) -> None:
        self.mesh.clock.advance(seconds)

    @invariant()
    def sums_add_up(self) -> None:
        cluster = self.cluster
        nodes = cluster.nodes
        for node in (*nodes, *cluster._members.draining):
            self.seen[id(node)] = node
        assert_adds_up(self.seen.values())
        waiting = len(cluster._abandoned)
        assert sum(node.in_flight for node in self.seen.values()) == len(self.leases) + waiting
        # Those out of rotation are exactly those that hold a place among the ejected.
        out = {node for node in nodes if node.breaker and node.breaker.state is not BreakerState.CLOSED}
        assert out == {node for node in nodes if node.ejected}
        assert cluster._members.cap.out == len(out)
        assert not any(node.ejected for node in cluster._members.draining)
        # Nobody is let go who is in the set, and nobody twice.
        assert len(self.removed.nodes) == len(set(map(id, self.removed.nodes)))
        assert not set(map(id, self.removed.nodes)) & set(map(id, nodes))
        assert set(cluster.view.nodes) <= set(nodes)

    def teardown(self) -> None:
        while self.leases:
            self.leases.pop().close()
        self.cluster.update([])
        self.mesh.clock.advance(25)
        self.sums_add_up()
        assert all(node.in_flight == 0 for node in self.seen.values())
        assert self.cluster._members.draining == ()
        assert set(map(id, self.removed.nodes)) == set(self.seen)  # nobody is forgotten
        self.mesh.close()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30)


def test_ten_thousand_endpoints_that_keep_changing_leave_nothing_behind() -> None:
    mesh, cluster = make_cluster(0)
    for start in range(0, 20_000, 5_000):
        mesh.update(
            "orders", [endpoint(0)] + [Endpoint("10.0.0.1", 1 + i, id=f"p{i}") for i in range(start, start + 10_000)]
        )
        mesh.clock.advance(1)
    assert len(cluster.nodes) == 10_001
    assert cluster._members.draining == ()
    mesh.close()
