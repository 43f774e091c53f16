from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb import Breaker, Cluster
from meshlb.model import OK
from meshlb.node import Node
from meshlb.resilience import EjectionCap
from meshlb.testing import FakeClock
from tests.core.parts import FAILURE, make_cluster

# Vectors of both sources: gRFC A50 (checked before an ejection) and Envoy (after it, without `always_eject_one_host`).
# Ours is Envoy's with that switch on: at least one, never above.
CAPS = [
    # endpoints, percent, A50, Envoy, ours
    (3, 10, 1, 0, 1),
    (5, 30, 2, 1, 1),
    (10, 10, 1, 1, 1),
    (11, 10, 2, 1, 1),
    (3, 0, 0, 0, 0),
    (2, 1, 1, 0, 1),
    (1, 50, 1, 0, 1),
    (3, 50, 2, 1, 1),
    (4, 50, 2, 2, 2),
    (20, 50, 10, 10, 10),
    (3, 100, 3, 3, 3),
    (0, 100, 0, 0, 0),
]


@pytest.mark.parametrize(("endpoints", "percent", "grpc", "envoy", "out"), CAPS)
def test_how_many_may_be_out(endpoints: int, percent: float, grpc: int, envoy: int, out: int) -> None:
    assert out == (envoy or min(grpc, 1))
    cap = EjectionCap(percent, 0.5)
    cap.resize(endpoints)
    taken = sum(cap.try_take(0.0) for _ in range(endpoints + 2))
    assert taken == out == cap.out


@given(endpoints=st.integers(0, 300), percent=st.floats(0, 100))
def test_at_least_one_and_never_above(endpoints: int, percent: float) -> None:
    cap = EjectionCap(percent, 0.5)
    cap.resize(endpoints)
    out = sum(cap.try_take(0.0) for _ in range(endpoints + 2))
    assert out <= max(1, percent * endpoints / 100)
    assert bool(out) == (endpoints > 0 and percent > 0)
    assert out in (0, 1) or 100 * (out + 1) / endpoints > percent  # and not one less than allowed


def test_a_place_given_back_is_given_out_again() -> None:
    cap = EjectionCap(50, 0.5)
    cap.resize(4)
    assert [cap.try_take(0.0) for _ in range(3)] == [True, True, False]
    cap.give_back()
    assert [cap.try_take(0.0) for _ in range(2)] == [True, False]


def test_who_is_out_already_takes_a_place_beyond_the_cap() -> None:
    cap = EjectionCap(50, 0.5)
    cap.resize(2)
    cap.take()
    cap.take()
    assert cap.out == 2
    assert not cap.try_take(0.0)
    cap.give_back()
    assert not cap.try_take(0.0)


def reached(endpoints: int = 12, percent: float = 50, panic_threshold: float = 0.5) -> EjectionCap:
    """As many out as may be."""
    cap = EjectionCap(percent, panic_threshold)
    cap.resize(endpoints)
    while cap.try_take(0.0):
        pass
    return cap


@pytest.mark.parametrize(
    ("endpoints", "percent", "threshold", "begins_at"),
    [
        # Half of twelve are out. Of the six in rotation, more than half should be.
        (12, 50, 0.5, 4),
        (12, 10, 0.5, 6),
        (12, 50, 0.3, 5),
        (12, 50, 1, 1),
        (12, 50, 0, None),  # never a panic, never a doubt
        (3, 50, 0.5, 2),
        (2, 50, 0.5, 1),
        (12, 0, 0.5, None),  # nothing is ever out
    ],
)
def test_how_many_more_must_fail_for_a_doubt(
    endpoints: int, percent: float, threshold: float, begins_at: int | None
) -> None:
    cap = reached(endpoints, percent, threshold)
    in_rotation = endpoints - cap.out
    began = [count for count in range(1, in_rotation + 1) if cap.count_refused(0.0, 1)]
    assert began == ([] if begins_at is None else [begins_at])  # and it begins once
    assert cap.is_in_doubt(0.0) is (begins_at is not None)


def test_in_doubt_no_more_than_one_is_out() -> None:
    cap = reached()
    assert [cap.count_refused(0.0, 1) for _ in range(4)] == [False, False, False, True]
    for out in range(6, 0, -1):
        assert cap.out == out
        assert not cap.try_take(1.0)
        cap.give_back()
    assert cap.try_take(1.0)
    assert not cap.try_take(1.0)


def test_the_doubt_lasts_for_a_while_after_its_reason() -> None:
    cap = reached()
    for _ in range(6):
        cap.count_refused(0.0, 1)
    cap.give_back()
    for now in (1.0, 2.0, 3.0):
        assert not cap.count_refused(now, -1)
    assert cap.is_in_doubt(12.9)
    assert not cap.try_take(12.9)
    for _ in range(2):
        assert not cap.count_refused(12.9, 1)  # it still is, so it does not begin
    assert cap.is_in_doubt(100.0)
    cap.count_refused(100.0, -1)
    cap.count_refused(100.0, -1)
    assert cap.is_in_doubt(109.9)
    assert not cap.is_in_doubt(110.0)
    assert cap.try_take(110.0)


def test_a_doubt_begins_with_whoever_still_fails_when_others_have_gone() -> None:
    cap = reached(4)
    assert not cap.count_refused(0.0, 1)
    cap.take()  # by hand
    assert cap.count_refused(0.0, 0)


SHORT = Breaker(open_time=1, max_open_time=30, jitter=0)


def fail(cluster: Cluster, clock: FakeClock, who: Callable[[Node], bool], calls: int = 6) -> None:
    """Have everybody in rotation of whom ``who`` says so fail ``calls`` times, the others succeed."""
    for _ in range(calls):
        for node in cluster.view.nodes:
            if (lease := node.begin()) is not None:
                clock.advance(0.001)
                lease.close(FAILURE if who(node) else OK)
    cluster.refresh()


def states(cluster: Cluster) -> list[str]:
    return [row["state"] for row in cluster.snapshot()["endpoints"]]


def test_after_an_overload_everybody_is_back_at_once_and_nobody_is_taken_out_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mesh, cluster = make_cluster(12, breaker=SHORT)
    clock = mesh.clock
    with mesh:
        for _ in range(4):  # a long time out, growing, for those that are out
            fail(cluster, clock, lambda node: True)
            clock.advance(1.0)
            cluster.refresh()
        assert "most of the endpoints in use fail" in caplog.text
        # Who has had time to empty its queue passes when it is probed, and the others have no better place to be in.
        drained = {node for node in cluster.nodes if node.breaker is not None and not node.breaker.lets_all_through}
        for _ in range(3):
            fail(cluster, clock, lambda node: node not in drained)
            clock.advance(1.0)
            cluster.refresh()
        assert states(cluster).count("ready") >= 11
        assert not cluster.view.panic
        fail(cluster, clock, lambda node: False)
        clock.advance(11.0)
        cluster.refresh()
        fail(cluster, clock, lambda node: False)
        assert states(cluster) == ["ready"] * 12


def test_the_dead_stay_out_when_others_fail_too() -> None:
    mesh, cluster = make_cluster(12, breaker=SHORT)
    clock = mesh.clock
    with mesh:
        dead = set(cluster.nodes[:6])
        fail(cluster, clock, lambda node: node in dead)
        assert states(cluster).count("open") == 6
        for _ in range(3):
            fail(cluster, clock, lambda node: True)  # the rest is overloaded
            clock.advance(1.0)
            cluster.refresh()
        assert not cluster.view.panic
        assert states(cluster)[6:] == ["ready"] * 6
        reasons = [row["reason"] for row in cluster.snapshot()["endpoints"][6:]]
        assert all("consecutive failures (503); used all the same" in reason for reason in reasons)
        before = sum(node.calls for node in dead)
        fail(cluster, clock, lambda node: node in dead)
        assert sum(node.calls for node in dead) <= before + 6, "but for a probe each"


def test_what_is_out_in_a_doubt_is_probed_at_once_and_its_time_out_does_not_grow() -> None:
    mesh, cluster = make_cluster(2, breaker=SHORT)
    clock = mesh.clock
    with mesh:
        dead, other = cluster.nodes
        assert dead.breaker is not None
        fail(cluster, clock, lambda node: node is dead)
        for _ in range(3):  # three probes that fail
            clock.advance(20.0)
            cluster.refresh()
            fail(cluster, clock, lambda node: node is dead, 1)
        assert dead.breaker.retry_at > clock() + 6
        fail(cluster, clock, lambda node: node is other)
        assert dead.judged == "half_open"
        for _ in range(3):
            fail(cluster, clock, lambda node: True, 1)
            assert dead.judged == "open"
            assert dead.breaker.retry_at <= clock() + 1
            clock.advance(1.0)
            cluster.refresh()
        assert other.judged == "ready", "somebody has to be"
