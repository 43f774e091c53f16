from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from meshlb import (
    Breaker,
    CallContext,
    DiscoveryError,
    Status,
)
from meshlb.judged_set import ABANDONED_FOR_EACH
from meshlb.model import OK, Outcome
from meshlb.node import Lease, Node
from meshlb.testing import FakeClock
from meshlb.topology import Standing
from tests.core.parts import FAILURE, Nothing, Noting, assert_adds_up, bare, endpoint, make_cluster

# -- picking


def test_a_pick_past_refusing_endpoints() -> None:
    mesh, cluster = make_cluster(4, breaker=Breaker(consecutive_failures=1, jitter=0), panic_threshold=0)
    for _ in range(2):
        cluster.start().close(FAILURE)
    mesh.clock.advance(1.5)
    half_open = [node for node in cluster.nodes if node.standing is Standing.HALF_OPEN]
    assert len(half_open) == 2
    leases = [cluster.start() for _ in range(12)]
    assert {lease.node for lease in leases} == set(cluster.nodes)
    assert [node.in_flight for node in half_open] == [1, 1]  # a probe each, however many calls wait
    for lease in leases:
        lease.close()
    mesh.close()


def test_excluded_endpoints_are_not_picked_and_need_not_be_in_the_set() -> None:
    mesh, cluster = make_cluster(3)
    gone = cluster.nodes[2]
    mesh.update("orders", [endpoint(0), endpoint(1)])
    context = CallContext(excluded={gone, cluster.nodes[0]})
    for _ in range(5):
        lease = cluster.try_again(context)
        assert lease is not None
        assert lease.node is cluster.nodes[1]
        lease.close()
    assert cluster.try_again(CallContext(excluded=set(cluster.nodes))) is None
    mesh.close()


def test_a_pick_from_an_old_view_finds_its_way_to_the_new_one() -> None:
    mesh, cluster = make_cluster(1)
    old = cluster.view

    class Slow:
        """Hands out the old endpoint after everything has been replaced, as a thread that was stopped in between."""

        def pick(self, call: CallContext) -> Any:
            picked = picker.pick(call)
            if cluster.view is old:
                mesh.update("orders", [endpoint(7)])
            return picked

    picker, old.picker = old.picker, Slow()
    lease = cluster.start()
    assert lease.endpoint == endpoint(7)
    lease.close()
    mesh.close()


def test_a_retry_from_an_old_view_finds_its_way_too() -> None:
    mesh, cluster = make_cluster(2)
    old = cluster.view

    class Slow:
        def pick(self, call: CallContext) -> Any:
            if cluster.view is old:
                mesh.update("orders", [endpoint(7)])
            return picker.pick(call)

    picker, old.picker = old.picker, Slow()
    lease = cluster.try_again(CallContext())
    assert lease is not None
    assert lease.endpoint == endpoint(7)
    lease.close()
    mesh.close()


def test_a_picker_that_ignores_what_is_excluded_does_not_hang_the_call() -> None:
    mesh, cluster = make_cluster(2)
    only = cluster.nodes[0]

    class Stubborn:
        def pick(self, call: CallContext) -> Any:
            return only

    cluster.view.picker = Stubborn()
    assert cluster.try_again(CallContext(excluded={only})) is None
    mesh.close()


def test_a_policy_that_cannot_build_costs_nobody_the_service(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name: ClassVar[str] = "broken"

        def build(self, candidates: Sequence[Any], environment: Any, previous: Any) -> Any:
            raise ZeroDivisionError("mine")

    mesh, cluster = make_cluster(2, policy=Broken())
    assert {cluster.start().node for _ in range(2)} == set(cluster.nodes)
    assert "ZeroDivisionError: mine" in caplog.text
    mesh.close()


def test_a_new_view_carries_on_where_the_old_picker_stood() -> None:
    mesh, cluster = make_cluster(4)
    first = [cluster.start().node for _ in range(2)]
    mesh.update("orders", [endpoint(i, weight=2) for i in range(4)])
    second = [cluster.start().node for _ in range(2)]
    assert set(first) | set(second) == set(cluster.nodes)
    gc.collect()
    mesh.close()


# -- breakers, by time


def test_an_opened_endpoint_is_out_probed_and_back() -> None:
    mesh, cluster = make_cluster(4, breaker=Breaker(consecutive_failures=1, open_time=2, jitter=0))
    bad = cluster.nodes[1]
    lease = bad.begin()
    assert lease is not None
    lease.close(FAILURE)
    mesh.clock.advance()
    assert bad not in cluster.view.nodes
    mesh.clock.advance(1.9)
    assert bad not in cluster.view.nodes
    mesh.clock.advance(0.2)
    assert bad in cluster.view.nodes
    probe = bad.begin()
    assert probe is not None
    probe.close(OK)
    mesh.clock.advance()
    assert bad.standing is Standing.READY
    assert cluster.ejections == 1
    mesh.close()


def test_a_timer_that_comes_early_is_set_again() -> None:
    clock, background = FakeClock(), Noting()
    cluster = bare(clock, background, breaker=Breaker(consecutive_failures=1, open_time=2, jitter=0))
    cluster.update([endpoint(0), endpoint(1)])
    lease = cluster.start()
    lease.close(FAILURE)
    [(delay, fire)] = background.timers
    assert delay == 2
    clock.advance(1.5)
    fire()  # half a second early, as if by another clock
    assert lease.node.is_open
    [_, (delay, fire)] = background.timers
    assert delay == 0.5
    fire()
    assert background.timers[2][0] == 0.5
    clock.advance(0.5)
    background.timers[2][1]()
    assert lease.node in cluster.view.nodes
    background.timers[0][1]()  # however late, and however often
    assert len(background.timers) == 3


def test_panic_does_not_wait_for_the_control_loop() -> None:
    """The control loop is busy: what it was asked to do after the breaker opened has not been done yet."""

    class Busy(Nothing):
        def call_soon(self, callback: Any, *args: Any) -> bool:
            return True

    cluster = bare(background=Busy(), breaker=Breaker(consecutive_failures=1))
    cluster.update([endpoint(0)])
    cluster.start().close(FAILURE)
    assert not cluster.view.panic
    cluster.start().close()
    assert cluster.view.panic


def test_panic_does_not_wait_for_a_busy_control_loop() -> None:
    class Busy(Nothing):
        def call_soon(self, callback: Any, *args: Any) -> bool:
            return True  # some time, but not now

    cluster = bare(background=Busy(), breaker=Breaker(consecutive_failures=1, open_time=60, max_open_time=60))
    cluster.update([endpoint(0)])
    cluster.start().close(FAILURE)
    assert cluster.nodes[0].is_open
    assert cluster.start().close()
    assert cluster.view.panic


def test_panic_uses_all_but_maintenance_and_ends_by_itself() -> None:
    mesh, cluster = make_cluster(3, breaker=Breaker(consecutive_failures=1, jitter=0), max_ejection_percent=100)
    mesh.update("orders", [*(endpoint(i) for i in range(3)), endpoint(3, status=Status.MAINTENANCE)])
    for node in cluster.nodes[:2]:
        lease = node.begin()
        assert lease is not None
        lease.close(FAILURE)
    mesh.clock.advance()
    assert cluster.view.panic
    leases = [cluster.start() for _ in range(9)]
    assert {lease.node for lease in leases} == set(cluster.nodes[:3])
    for lease in leases:
        lease.close(OK)
    mesh.clock.advance(2)
    assert not cluster.view.panic
    for _ in range(6):
        cluster.start().close()
    assert {node.standing for node in cluster.nodes[:3]} == {Standing.READY}
    assert_adds_up(cluster.nodes)
    mesh.close()


def test_no_more_than_the_share_is_ejected() -> None:
    mesh, cluster = make_cluster(10, breaker=Breaker(consecutive_failures=1, jitter=0), max_ejection_percent=30)
    for node in cluster.nodes:
        lease = node.begin()
        assert lease is not None
        lease.close(FAILURE)
    assert sum(node.ejected for node in cluster.nodes) == 3
    mesh.close()


def test_a_thousand_openings_are_a_few_lines_of_log(caplog: pytest.LogCaptureFixture) -> None:
    mesh, cluster = make_cluster(1000, breaker=Breaker(consecutive_failures=1, jitter=0), max_ejection_percent=100)
    with caplog.at_level(logging.INFO, "meshlb.cluster"):
        for node in cluster.nodes:
            lease = node.begin()
            assert lease is not None
            lease.close(FAILURE)
        version = cluster.view.version
        mesh.clock.advance()
        assert cluster.view.version == version + 1  # built once, not a thousand times
        assert len(caplog.records) == 20
        assert "is out for 1.0 s: 1 consecutive failures (503)" in caplog.text
        mesh.clock.advance(20)
        lease = cluster.nodes[0].begin()
        assert lease is not None
        lease.close()
        mesh.clock.advance()
    assert "980 changes before this one were not logged" in caplog.text
    mesh.close()


# -- abandoned leases


def test_an_abandoned_lease_is_closed_as_ignored() -> None:
    mesh, cluster = make_cluster(1)
    cluster.start()
    gc.collect()
    [node] = cluster.nodes
    mesh.clock.advance()
    assert (node.in_flight, node.ignored) == (0, 1)
    mesh.close()


def test_without_a_control_loop_a_snapshot_closes_abandoned_leases() -> None:
    cluster = bare()
    cluster.update([endpoint(0)])
    cluster.start()
    gc.collect()
    assert cluster.snapshot()["endpoints"][0]["in_flight"] == 0


def test_closing_closes_abandoned_leases() -> None:
    cluster = bare()
    cluster.update([endpoint(0)])
    [node] = cluster.nodes
    cluster.start()
    gc.collect()
    assert node.in_flight == 1
    cluster.close()
    assert (node.in_flight, node.ignored) == (0, 1)


def test_abandoned_leases_are_closed_once_however_many_look() -> None:
    cluster = bare()
    cluster.update([endpoint(0)])
    leases = [cluster.start() for _ in range(500)]
    leases.clear()
    threads = [threading.Thread(target=cluster._close_abandoned) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [node] = cluster.nodes
    assert (node.in_flight, node.ignored) == (0, 500)


def test_new_calls_close_abandoned_leases_faster_than_they_come() -> None:
    cluster = bare()  # its control loop is as good as none, as among many busy threads
    cluster.update([endpoint(0)])
    leases = [cluster.start() for _ in range(100)]
    leases.clear()
    for _ in range(100):
        cluster.start()
    assert len(cluster._abandoned) <= ABANDONED_FOR_EACH


def test_closing_abandoned_leases_ends_however_fast_they_come() -> None:
    cluster = bare()
    cluster.update([endpoint(0)])
    [node] = cluster.nodes
    finish = Node.finish
    closed: list[Outcome] = []

    def finish_and_drop_another(node: Node, lease: Lease, outcome: Outcome) -> bool:
        closed.append(outcome)
        if len(closed) < 1000:
            node.begin()
        return finish(node, lease, outcome)

    leases = [node.begin() for _ in range(3)]
    leases.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Node, "finish", finish_and_drop_another)
        cluster._close_abandoned()
    assert len(closed) == 3
    assert len(cluster._abandoned) == 3
    cluster.close()
    assert (node.in_flight, node.ignored) == (0, 6)


def test_the_control_loop_is_asked_once_and_closes_abandoned_leases_by_turns() -> None:
    mesh, cluster = make_cluster(1)
    [node] = cluster.nodes
    leases = [cluster.start() for _ in range(250)]
    asked: list[Callable[..., object]] = []
    call_soon = mesh.call_soon
    with pytest.MonkeyPatch.context() as patch:

        def noted(callback: Callable[..., object], *args: Any) -> bool:
            asked.append(callback)
            return call_soon(callback, *args)

        patch.setattr(mesh, "call_soon", noted)
        leases.clear()
        assert len(asked) == 1
        mesh.clock.advance()
    assert (node.in_flight, node.ignored) == (0, 250)
    assert len(asked) == 3
    mesh.close()


# -- reading


def test_age_and_snapshot() -> None:
    clock = FakeClock()
    cluster = bare(clock)
    assert cluster.age is None
    assert cluster.snapshot()["age"] is None
    cluster.update([endpoint(0, zone="b", status=Status.WARNING, status_reason="disk: 91 %")])
    clock.advance(3)
    lease = cluster.start()
    clock.advance(2)
    snapshot = cluster.snapshot()
    assert snapshot["service"] == "orders"
    assert snapshot["policy"] == "round_robin"
    assert snapshot["age"] == 5.0
    [row] = snapshot["endpoints"]
    assert row["address"] == "10.0.0.1:80"
    assert (row["state"], row["reason"]) == ("ready", "disk: 91 %")
    assert (row["in_flight"], row["oldest_wait"], row["latency"]) == (1, 2.0, None)
    lease.close()
    cluster.failed(DiscoveryError("down"))
    assert cluster.snapshot()["last_error"] == "down"
    cluster.update([endpoint(0)])
    assert cluster.snapshot()["last_error"] is None


def test_retries_are_counted_by_many_threads() -> None:
    cluster = bare()
    threads = [threading.Thread(target=lambda: [cluster.count_retry() for _ in range(2000)] and None) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cluster.retries == 8000
