"""Who is told of an endpoint's ups and downs, and what an operator can do about them."""

from __future__ import annotations

import logging
import threading

import pytest

from meshlb import Breaker, Cluster, ConfigError, Mesh, NoEndpoints, OutlierDetection, ServiceConfig, StateChange
from meshlb.discovery import StaticDiscovery
from meshlb.model import OK
from meshlb.node import Node
from meshlb.testing import LocalMesh
from meshlb.topology import Standing
from tests.core.parts import FAILURE, OVERLOAD, assert_adds_up, make_cluster
from tests.support.wait import eventually


def call(node: Node, outcome: object = OK, times: int = 1) -> None:
    for _ in range(times):
        lease = node.begin(force=True)
        assert lease is not None
        lease.close(outcome)  # type: ignore[arg-type]


def listened(endpoints: int = 4, **settings: object) -> tuple[LocalMesh, Cluster, list[StateChange]]:
    mesh, cluster = make_cluster(endpoints, **settings)
    changes: list[StateChange] = []
    cluster.add_state_listener(changes.append)
    return mesh, cluster, changes


def seen(changes: list[StateChange]) -> list[str]:
    return [f"{change.endpoint.id}: {change.before} -> {change.after}" for change in changes]


def test_listeners_hear_of_every_step_of_a_breaker() -> None:
    mesh, cluster, changes = listened(breaker=Breaker(jitter=0))
    node = cluster.nodes[1]
    call(node, FAILURE, 5)
    assert changes == []  # not on the call's path
    mesh.clock.advance()
    mesh.clock.advance(1)
    call(node, FAILURE)
    mesh.clock.advance(2)
    call(node)
    mesh.clock.advance()
    assert seen(changes) == [
        "i1: ready -> open",
        "i1: open -> half_open",
        "i1: half_open -> open",
        "i1: open -> half_open",
        "i1: half_open -> ready",
    ]
    assert [change.reason for change in changes] == [
        "5 consecutive failures (503)",
        "5 consecutive failures (503)",
        "probe failed (503)",
        "probe failed (503)",
        "",
    ]
    assert {change.service for change in changes} == {"orders"}
    mesh.close()


def test_a_listener_that_raises_is_logged_and_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(change: StateChange) -> None:
        raise RuntimeError("a bug of the program")

    heard: list[StateChange] = []
    mesh, cluster = make_cluster(3, breaker=Breaker(jitter=0, listeners=(broken, heard.append)))
    call(cluster.nodes[0], FAILURE, 5)
    with caplog.at_level(logging.ERROR, "meshlb"):
        mesh.clock.advance()
    assert seen(heard) == ["i0: ready -> open"]
    assert "a bug of the program" in caplog.text
    assert cluster.nodes[0].standing is Standing.OPEN
    cluster.start().close()
    mesh.close()


def test_a_listener_can_be_taken_away() -> None:
    mesh, cluster, changes = listened()
    cluster.remove_state_listener(changes.append)  # another object than the one that was added: ignored
    other = changes.append
    cluster.add_state_listener(other)
    cluster.remove_state_listener(other)
    call(cluster.nodes[0], FAILURE, 5)
    mesh.clock.advance()
    assert len(changes) == 1
    mesh.close()


def test_listeners_run_on_the_control_loop() -> None:
    threads: list[str] = []
    breaker = Breaker(listeners=(lambda change: threads.append(threading.current_thread().name),))
    with Mesh(
        StaticDiscovery({"orders": ["127.0.0.1:1", "127.0.0.1:2"]}), defaults=ServiceConfig(breaker=breaker)
    ) as mesh:
        cluster = mesh.cluster("orders")
        cluster.wait_ready(20)
        call(cluster.nodes[0], FAILURE, 5)
        eventually(lambda: threads, 20)
    assert set(threads) == {"meshlb-control"}


# -- by hand


def test_opened_by_hand_it_is_out_until_it_is_put_back() -> None:
    mesh, cluster, changes = listened(4)
    address = cluster.nodes[2].endpoint.address
    cluster.open_breaker(address, "migration of the disk")
    mesh.clock.advance(1e4)
    row = cluster.snapshot()["endpoints"][2]
    assert (row["state"], row["breaker"], row["eligible"]) == ("open", "forced_open", False)
    assert row["reason"] == "opened by hand: migration of the disk"
    assert cluster.nodes[2].begin(force=True) is None
    assert {cluster.start().node for _ in range(12)} == set(cluster.nodes) - {cluster.nodes[2]}
    cluster.close_breaker(address)
    mesh.clock.advance()
    assert cluster.nodes[2] in {cluster.start().node for _ in range(12)}
    assert seen(changes) == ["i2: ready -> open", "i2: open -> ready"]
    mesh.close()


def test_by_hand_all_can_be_opened_and_panic_uses_none_of_them() -> None:
    mesh, cluster = make_cluster(3)
    for node in cluster.nodes:
        cluster.open_breaker(node.endpoint.address)
    mesh.clock.advance()
    assert (cluster.view.nodes, cluster.view.panic) == ((), False)
    with pytest.raises(NoEndpoints, match="unless opened by hand"):
        cluster.start()
    cluster.reset_breaker(cluster.nodes[0].endpoint.address)
    mesh.clock.advance()
    cluster.start().close()
    assert_adds_up(cluster.nodes)
    mesh.close()


def test_calls_under_way_go_on_and_have_no_say() -> None:
    mesh, cluster = make_cluster(2)
    node = cluster.nodes[0]
    leases = [node.begin() for _ in range(10)]
    cluster.open_breaker(node.endpoint.address)
    for lease in leases:
        assert lease is not None
        assert lease.close(FAILURE)
    cluster.close_breaker(node.endpoint.address)
    assert node.breaker is not None
    assert (node.standing, node.breaker.failures, node.in_flight) == (Standing.READY, 0, 0)
    mesh.close()


def test_disabled_it_never_opens() -> None:
    mesh, cluster, changes = listened()
    node = cluster.nodes[0]
    call(node, FAILURE, 5)
    mesh.clock.advance()
    cluster.disable_breaker(node.endpoint.address, "it is us")
    call(node, FAILURE, 500)
    mesh.clock.advance()
    row = cluster.snapshot()["endpoints"][0]
    assert (row["state"], row["breaker"]) == ("ready", "disabled")
    assert row["reason"] == "breaker disabled by hand: it is us"
    assert cluster._members.cap.out == 0
    cluster.close_breaker(node.endpoint.address)
    call(node, FAILURE, 5)
    mesh.clock.advance()
    assert seen(changes) == ["i0: ready -> open", "i0: open -> ready", "i0: ready -> open"]
    mesh.close()


def test_the_place_among_the_ejected_is_taken_and_returned_once() -> None:
    mesh, cluster = make_cluster(4)
    cap, node = cluster._members.cap, cluster.nodes[0]
    address = node.endpoint.address
    call(node, FAILURE, 5)
    assert cap.out == 1
    for _ in range(2):
        cluster.open_breaker(address)
        assert cap.out == 1
    cluster.close_breaker(address)
    cluster.close_breaker(address)
    assert cap.out == 0
    cluster.open_breaker(address)
    mesh.update("orders", [other.endpoint for other in cluster.nodes[1:]])
    mesh.clock.advance(60)
    assert cap.out == 0
    mesh.close()


def test_mistakes_of_the_operator_say_what_there_is() -> None:
    mesh, cluster = make_cluster(2)
    with pytest.raises(ConfigError, match=r"no endpoint '10.0.0.9:80'; its endpoints: 10.0.0.1:80, 10.0.0.2:80"):
        cluster.open_breaker("10.0.0.9:80")
    mesh.close()
    mesh, cluster = make_cluster(2, breaker=None)
    with pytest.raises(ConfigError, match=r"ServiceConfig\.breaker is None"):
        cluster.close_breaker("10.0.0.1:80")
    mesh.close()


# -- the rate, as a node hands it its counts


def test_half_of_the_calls_failing_opens_an_endpoint_however_they_are_mixed() -> None:
    mesh, cluster = make_cluster(4)
    for number in range(20):
        call(cluster.nodes[0], FAILURE if number % 2 else OK)
    assert cluster.nodes[0].standing is Standing.OPEN
    assert cluster.nodes[0].breaker is not None
    assert cluster.nodes[0].breaker.reason == "failure rate 0.50 (10 of 20 calls) (503)"
    mesh.close()


def test_successes_in_good_times_count_exactly() -> None:
    mesh, cluster = make_cluster(4, breaker=Breaker(consecutive_failures=None, failure_rate=0.2, minimum_calls=100))
    node = cluster.nodes[0]
    for _ in range(9):
        call(node, OK, 9)
        mesh.clock.advance(1)
    call(node, OVERLOAD, 19)
    assert cluster.snapshot()["endpoints"][0]["failure_rate"] == 19 / 100
    call(node, OK)
    assert node.standing is Standing.READY
    call(node, FAILURE, 2)
    assert node.standing is Standing.OPEN
    assert node.breaker is not None
    assert node.breaker.reason == "failure rate 0.20 (21 of 103 calls) (503)"
    mesh.close()


def test_exact_counts_under_threads() -> None:
    mesh, cluster = make_cluster(4, breaker=Breaker(consecutive_failures=None, window=1000, minimum_calls=10**6))
    node = cluster.nodes[0]

    def work(number: int) -> None:
        for step in range(500):
            call(node, FAILURE if (number + step) % 5 == 0 else OK)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert node.breaker is not None
    node.failure_rate()
    window = node.breaker._window
    assert window is not None
    assert (window.calls, window.failures) == (4000, 800)
    assert_adds_up(cluster.nodes)
    mesh.close()


def test_slow_calls_open_it_and_a_stream_is_as_fast_as_its_first_message() -> None:
    breaker = Breaker(slow_call_duration=1.0, minimum_calls=10, window=100, jitter=0)
    mesh, cluster = make_cluster(4, breaker=breaker)
    slow, streaming = cluster.nodes[:2]
    for _ in range(10):
        lease, stream = slow.begin(), streaming.begin()
        assert lease is not None
        assert stream is not None
        stream.answered()
        mesh.clock.advance(1.5)
        lease.close()
        stream.close()
    assert (slow.standing, streaming.standing) == (Standing.OPEN, Standing.READY)
    assert slow.breaker is not None
    assert slow.breaker.reason == "slow-call rate 1.00 (10 of 10 calls)"
    mesh.close()


def test_slow_calls_among_quiet_ones_count_exactly() -> None:
    breaker = Breaker(consecutive_failures=None, slow_call_duration=0.2, minimum_calls=10**6, window=10**6)
    mesh, cluster = make_cluster(2, breaker=breaker)
    node = cluster.nodes[0]
    for number in range(300):
        lease = node.begin()
        assert lease is not None
        if number % 3 == 0:
            lease.answered(healthy=True)  # as fast as the first message
        mesh.clock.advance(0.3 if number % 10 == 1 else 0.1)
        lease.close()
    node.failure_rate()
    assert node.breaker is not None
    window = node.breaker._window
    assert window is not None
    slow = sum(number % 10 == 1 and number % 3 != 0 for number in range(300))
    assert (window.calls, window.failures, window.slow) == (300, 0, slow)
    mesh.close()


# -- outlier detection


def outliers(**settings: object) -> tuple[LocalMesh, Cluster, list[StateChange]]:
    mesh, cluster, changes = listened(5, breaker=None, outlier=OutlierDetection(**settings))  # type: ignore[arg-type]
    for node in cluster.nodes:
        call(node, OK, 100)
    call(cluster.nodes[3], FAILURE, 100)
    return mesh, cluster, changes


def test_an_outlier_is_out_for_its_time_and_the_snapshot_says_why() -> None:
    mesh, cluster, changes = outliers()
    mesh.clock.advance(10)
    row = cluster.snapshot()["endpoints"][3]
    assert (row["state"], row["eligible"]) == ("ejected", False)
    assert row["reason"] == "success rate 0.50, threshold 0.52 over 5 hosts; back in 30.0 s"
    assert cluster.ejections == 1
    assert cluster.nodes[3] not in {cluster.start().node for _ in range(20)}
    mesh.clock.advance(29.9)
    assert cluster.nodes[3].standing is Standing.EJECTED
    mesh.clock.advance(0.2)
    assert cluster.nodes[3] in {cluster.start().node for _ in range(20)}
    assert seen(changes) == ["i3: ready -> ejected", "i3: ejected -> ready"]
    assert changes[0].reason == "success rate 0.50, threshold 0.52 over 5 hosts"
    assert cluster._members.cap.out == 0
    mesh.close()


def test_in_panic_outliers_are_used() -> None:
    mesh, cluster, _ = outliers()
    mesh.update("orders", [node.endpoint for node in cluster.nodes[2:4]])  # one of two left
    mesh.clock.advance(10)
    assert (len(cluster.view.nodes), cluster.view.panic) == (2, False)  # two hosts are too few to compare
    mesh.close()


def test_breakers_and_outlier_detection_share_the_cap_and_a_place() -> None:
    mesh, cluster = make_cluster(5, outlier=OutlierDetection(), max_ejection_percent=20)
    cap = cluster._members.cap
    for node in cluster.nodes:
        call(node, OK, 100)
    call(cluster.nodes[3], FAILURE, 100)
    assert (cluster.nodes[3].standing, cap.out) == (Standing.OPEN, 1)
    mesh.clock.advance(10)  # the detector leaves to the breaker what it has taken out already
    assert cap.out == 1
    assert {node.standing for node in cluster.nodes} - {Standing.OPEN, Standing.HALF_OPEN} == {Standing.READY}
    call(cluster.nodes[0], FAILURE, 100)  # nor is there a place for another one
    assert (cluster.nodes[0].standing, cap.out) == (Standing.READY, 1)
    mesh.close()


def test_an_ejected_endpoint_that_leaves_and_returns_is_judged_anew() -> None:
    mesh, cluster, _ = outliers()
    mesh.clock.advance(10)
    endpoints = [node.endpoint for node in cluster.nodes]
    lease = cluster.nodes[3].begin()  # keeps it from being forgotten
    assert lease is not None
    mesh.update("orders", endpoints[:3] + endpoints[4:])
    assert cluster._members.cap.out == 0
    mesh.update("orders", endpoints)
    mesh.clock.advance(5)
    assert cluster.nodes[3].standing is Standing.READY
    lease.close()
    mesh.clock.advance(100)
    assert cluster._members.cap.out == 0
    mesh.close()


def test_reset_by_hand_ends_an_ejection() -> None:
    mesh, cluster = make_cluster(
        5, breaker=Breaker(consecutive_failures=None, failure_rate=1.0), outlier=OutlierDetection()
    )
    for node in cluster.nodes:
        call(node, OK, 100)
    call(cluster.nodes[3], FAILURE, 100)
    mesh.clock.advance(10)
    assert cluster.nodes[3].standing is Standing.EJECTED
    cluster.close_breaker(cluster.nodes[3].endpoint.address)
    assert cluster.nodes[3].standing is Standing.EJECTED
    cluster.reset_breaker(cluster.nodes[3].endpoint.address)
    assert cluster.nodes[3].standing is Standing.READY
    mesh.clock.advance(10)
    assert cluster._members.cap.out == 0
    mesh.close()
