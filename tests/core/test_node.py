from __future__ import annotations

import gc
import math
import threading

import pytest

from meshlb import Breaker, Endpoint, Lease, Outcome, Status
from meshlb.model import OK
from meshlb.topology import Standing
from tests.core.parts import FAILURE, IGNORED, OVERLOAD, Bench, assert_adds_up, endpoint, half_opened, opened

# -- counting


@pytest.mark.parametrize(
    ("outcome", "counter"),
    [(OK, "successes"), (FAILURE, "failures"), (OVERLOAD, "overloads"), (IGNORED, "ignored")],
)
def test_every_outcome_is_counted_once(outcome: Outcome, counter: str) -> None:
    bench = Bench()
    lease = bench.begin()
    assert (bench.node.in_flight, bench.node.calls) == (1, 1)
    assert lease.close(outcome)
    assert not lease.close(OK)
    assert not lease.close(FAILURE)
    assert bench.node.in_flight == 0
    counts = {name: getattr(bench.node, name) for name in ("successes", "failures", "overloads", "ignored")}
    assert counts == {name: int(name == counter) for name in counts}
    assert_adds_up([bench.node])


def test_a_lease_that_is_closed_by_several_threads_counts_once() -> None:
    bench = Bench()
    for _ in range(200):
        lease = bench.begin()
        start = threading.Barrier(4)
        closed: list[bool] = []

        def close(lease: Lease = lease, start: threading.Barrier = start, closed: list[bool] = closed) -> None:
            start.wait()
            closed.append(lease.close(OK))

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(closed) == [False, False, False, True]
    assert (bench.node.in_flight, bench.node.successes) == (0, 200)


def test_a_dropped_lease_is_handed_to_the_owner_and_only_once() -> None:
    bench = Bench()
    bench.begin()
    gc.collect()
    [lease] = bench.owner.abandoned
    assert bench.node.in_flight == 1  # nothing was locked, so nothing was changed
    lease.close(IGNORED)
    bench.owner.abandoned.clear()
    del lease
    gc.collect()
    assert bench.owner.abandoned == []
    assert bench.node.in_flight == 0


def test_a_lease_that_was_never_counted_is_never_handed_over() -> None:
    bench = Bench()
    lease = object.__new__(Lease)  # as an exception from outside leaves it, before the node has filled it in
    del lease
    lease = object.__new__(Lease)  # and before it counts
    lease.node, lease.closed = bench.node, True
    assert not lease.close(OK)
    del lease
    bench.node.retire()
    assert bench.node.begin() is None
    gc.collect()
    assert bench.owner.abandoned == []
    assert_adds_up([bench.node])


def test_a_lease_may_be_collected_within_its_nodes_critical_section() -> None:
    bench = Bench()
    lease = bench.begin()
    with bench.node.lock:  # would never return, if dropping a lease took the lock
        del lease
        gc.collect()
    assert len(bench.owner.abandoned) == 1


# -- latency


def test_latency_is_the_time_to_the_end_or_to_the_answer() -> None:
    bench = Bench()
    lease = bench.begin()
    bench.clock.advance(0.25)
    lease.close()
    assert lease.latency == pytest.approx(0.25)
    assert bench.node.latency.value == pytest.approx(0.25)

    stream = bench.begin()
    bench.clock.advance(0.5)
    stream.answered()
    stream.answered()
    bench.clock.advance(3600)
    stream.close()
    assert stream.latency == pytest.approx(0.5)
    assert bench.node.latency.value == pytest.approx(0.5)


def test_an_unhealthy_answer_is_no_sample() -> None:
    bench = Bench()
    lease = bench.begin()
    bench.clock.advance(0.001)
    lease.answered(healthy=False)
    lease.close(FAILURE)
    assert bench.node.latency.value == 0.0
    assert bench.node.latency.at(bench.clock()) == 5.0


def test_an_answer_after_the_end_changes_nothing() -> None:
    bench = Bench()
    lease = bench.begin()
    lease.close(IGNORED)
    bench.clock.advance(9)
    lease.answered()
    assert lease.latency is None
    assert not bench.node.latency.has_history


def test_the_oldest_wait_is_that_of_the_oldest_unanswered_attempt() -> None:
    bench = Bench()
    assert bench.node.oldest_wait(bench.clock()) == 0.0
    first, second = bench.begin(), None
    bench.clock.advance(2)
    second = bench.begin()
    bench.clock.advance(1)
    assert bench.node.oldest_wait(bench.clock()) == 3.0
    first.answered()
    assert bench.node.oldest_wait(bench.clock()) == 1.0
    second.close()
    assert bench.node.oldest_wait(bench.clock()) == 0.0
    first.close()


@pytest.mark.parametrize("hint", [math.nan, -1.0, 0.0, 1e9])
def test_a_servers_odd_hint_leaves_a_usable_estimate(hint: float) -> None:
    bench = Bench()
    bench.begin().close(Outcome(OVERLOAD.kind, retry_after=hint))
    assert 5.0 <= bench.node.latency.at(bench.clock()) <= 300.0


def test_a_clock_that_goes_back_makes_no_negative_latency() -> None:
    times = iter([100.0, 40.0])
    bench = Bench()
    bench.node._clock = lambda: next(times)
    bench.begin().close()
    assert bench.node.latency.value == 0.0


# -- leaving and coming back


def test_a_retired_node_ends_with_its_last_attempt_and_takes_no_new_one() -> None:
    bench = Bench()
    first, second = bench.begin(), bench.begin()
    assert not bench.node.retire()
    assert bench.node.begin() is None
    assert bench.node.begin(force=True) is None
    assert bench.node.standing is Standing.DRAINING
    first.close()
    assert bench.owner.told == []
    second.close(FAILURE)
    assert bench.owner.told == ["drained"]


def test_retiring_gives_the_place_back_whatever_happens_afterwards() -> None:
    bench = Bench(Breaker(consecutive_failures=1, jitter=0))
    late = [bench.begin() for _ in range(3)]
    bench.call(FAILURE)
    assert bench.cap.out == 1
    bench.node.retire()
    assert (bench.cap.out, bench.node.ejected) == (0, False)
    for lease in late:
        lease.close(FAILURE)
    assert (bench.cap.out, bench.node.ejected) == (0, False)


def test_a_failing_node_that_is_retired_first_takes_no_place() -> None:
    bench = Bench(Breaker(consecutive_failures=1, jitter=0))
    lease = bench.begin()
    bench.node.retire()
    lease.close(FAILURE)
    assert (bench.cap.out, bench.node.ejected) == (0, False)


def test_a_node_that_comes_back_open_takes_a_place_again() -> None:
    bench = opened()
    bench.node.retire()
    bench.node.restore(endpoint(0, weight=7))
    assert (bench.node.weight, bench.node.standing) == (7, Standing.OPEN)
    assert (bench.cap.out, bench.node.ejected) == (1, True)
    bench.node.poll_breaker(now_at_once=True)
    bench.call(OK)
    assert (bench.cap.out, bench.node.ejected) == (0, False)


def test_standing_names_the_registrys_word_first() -> None:
    bench = opened()
    for status, standing in (
        (Status.MAINTENANCE, Standing.MAINTENANCE),
        (Status.CRITICAL, Standing.CRITICAL),
        (Status.WARNING, Standing.OPEN),
    ):
        bench.node.restore(endpoint(0, status=status))
        assert bench.node.standing is standing


# -- the child of a fork


def test_the_heir_has_what_was_learnt_and_none_of_the_attempts() -> None:
    bench = half_opened()
    bench.node.latency.observe(0.2, bench.clock())
    probe, forced = bench.begin(), bench.node.begin(force=True)
    bench.node.lock.acquire()  # by a thread that the child has not
    bench.cap.give_back()
    heir = bench.node.reborn(bench.cap)
    assert (heir.in_flight, heir.calls, heir.standing) == (0, 0, Standing.HALF_OPEN)
    assert (heir.ejected, bench.cap.out) == (True, 1)
    assert heir.latency.value == 0.2
    fresh = heir.begin()  # the parent's probe holds no place here
    assert fresh is not None
    probe.close(OK)  # the parent's own leases end without consequences
    assert forced is not None
    forced.close(FAILURE)
    assert heir.standing is Standing.HALF_OPEN
    assert heir.in_flight == 1
    fresh.close(OK)
    assert heir.standing is Standing.READY
    assert_adds_up([heir])


def test_repr_names_the_address() -> None:
    bench = Bench()
    lease = bench.begin()
    assert "10.0.0.1:80" in repr(bench.node)
    assert "open" in repr(lease)
    lease.close()
    assert "closed" in repr(lease)
    assert lease.endpoint == endpoint(0)
    assert isinstance(lease.endpoint, Endpoint)
