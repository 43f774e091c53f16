"""The course of a hedged call, without I/O and under a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from meshlb import Cluster, Hedge, Lease, Outcome, OutcomeKind, Retry, RetryBudget, Sent
from meshlb.call import Call, Safety
from meshlb.hedging import HedgedCall
from meshlb.model import NO_CONTEXT, OK
from meshlb.resilience import RetryThrottle, RetryThrottling
from meshlb.testing import LocalMesh
from tests.core.parts import FAILURE, OVERLOAD, REFUSED, assert_adds_up, make_cluster

FATAL = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, reason="500")


def begin(
    endpoints: int = 4, timeout: float | None = None, throttle: RetryThrottle | None = None, **retry: Any
) -> tuple[LocalMesh, Cluster, Lease, HedgedCall]:
    hedge = retry.pop("hedge", Hedge(delay=1.0, max_attempts=3))
    mesh, cluster = make_cluster(endpoints, retry=Retry(**{"max_attempts": 3, **retry}), breaker=None)
    lease = cluster.start()
    timer = cluster.hedge_timer("", hedge)
    call = HedgedCall(cluster, NO_CONTEXT, lease.started, timeout, hedge=hedge, timer=timer, throttle=throttle)
    call.begun(lease)
    return mesh, cluster, lease, call


def go(mesh: LocalMesh, call: HedgedCall, seconds: float) -> Lease | None:
    mesh.clock.advance(seconds)
    lease = call.next()
    if lease is not None:
        call.begun(lease)
    return lease


def test_one_more_at_each_delay_elsewhere_up_to_the_limit() -> None:
    mesh, cluster, first, call = begin()
    assert call.due() == 1.0
    assert go(mesh, call, 0.9) is None
    second = go(mesh, call, 0.1)
    assert second is not None
    third = go(mesh, call, 1.0)
    assert third is not None
    assert len({first.node, second.node, third.node}) == 3
    assert call.due() is None
    assert go(mesh, call, 10) is None
    call.won(third)
    third.close()
    assert all(node.in_flight == 0 for node in cluster.nodes)
    assert [lease.node.ignored for lease in (first, second, third)] == [1, 1, 0]
    assert (call.attempts, cluster.retries) == (3, 2)
    mesh.close()


def test_a_loser_is_known_to_be_slow() -> None:
    mesh, _cluster, first, call = begin()
    second = go(mesh, call, 1.0)
    assert second is not None
    mesh.clock.advance(0.5)
    call.won(second)
    assert first.node.latency.at(mesh.clock()) == 1.5
    assert first.node.failures == 0
    mesh.close()


def test_a_failure_brings_the_next_forward_and_a_pushback_moves_it() -> None:
    mesh, _cluster, first, call = begin()
    assert not call.failed(first, FAILURE, Safety.IDEMPOTENT)
    assert call.due() == 0
    second = go(mesh, call, 0)
    assert second is not None
    hint = Outcome(OutcomeKind.OVERLOAD, retryable=True, retry_after=7.0, hint_binds=True)
    assert not call.failed(second, hint, Safety.IDEMPOTENT)
    assert call.due() == 7.0
    third = go(mesh, call, 7.0)
    assert third is not None
    assert call.failed(third, FAILURE, Safety.IDEMPOTENT), "attempts are used up"
    assert call.is_over
    mesh.close()


def test_a_pushback_that_forbids_ends_the_sending_but_not_what_is_under_way() -> None:
    mesh, _cluster, first, call = begin()
    second = go(mesh, call, 1.0)
    assert second is not None
    no = Outcome(OutcomeKind.FAILURE, retryable=True, retry_after=-1.0, hint_binds=True)
    assert not call.failed(first, no, Safety.IDEMPOTENT)
    assert call.due() is None
    assert not call.is_over
    assert call.failed(second, no, Safety.IDEMPOTENT)
    mesh.close()


def test_what_another_attempt_would_not_change_is_the_end() -> None:
    mesh, cluster, first, call = begin()
    go(mesh, call, 1.0)
    assert call.failed(first, FATAL, Safety.IDEMPOTENT)
    call.won(None)
    assert all(node.in_flight == 0 for node in cluster.nodes)
    mesh.close()


def test_hedges_are_paid_for_and_what_was_not_sent_is_paid_back() -> None:
    mesh, cluster, first, call = begin(budget=RetryBudget(0, 0.2))
    budget = cluster.budget
    assert budget is not None
    second = go(mesh, call, 1.0)
    assert second is not None
    assert budget.balance == 1
    assert not call.failed(second, FAILURE, Safety.IDEMPOTENT)
    assert budget.balance == 0, "the next one has been paid for"
    call.won(first)
    assert budget.balance == 1
    call.won(first)
    assert budget.balance == 1
    mesh.close()


def test_no_money_no_hedge() -> None:
    mesh, cluster, _first, call = begin(budget=RetryBudget(0, 0))
    assert go(mesh, call, 1.0) is None
    assert call.due() is None
    assert not call.is_over
    assert cluster.retries == 0
    mesh.close()


def test_nobody_else_no_hedge() -> None:
    mesh, _cluster, first, call = begin(1)
    assert go(mesh, call, 1.0) is None
    assert not call.failed(first, FAILURE, Safety.IDEMPOTENT), "a retry of the only endpoint, after a pause"
    mesh.close()


def test_throttled_no_hedge() -> None:
    throttle = RetryThrottle(RetryThrottling(4, 1))
    throttle.failed()
    mesh, _cluster, first, call = begin(throttle=throttle)
    throttle.failed()
    assert go(mesh, call, 1.0) is None
    call.won(first)
    assert throttle.tokens == 3
    mesh.close()


def test_two_failures_at_once_pay_for_one_attempt() -> None:
    mesh, cluster, first, call = begin(budget=RetryBudget(0, 1), max_attempts=5)
    budget = cluster.budget
    assert budget is not None
    second = go(mesh, call, 1.0)
    assert second is not None
    assert not call.failed(first, FAILURE, Safety.IDEMPOTENT)
    assert not call.failed(second, FAILURE, Safety.IDEMPOTENT)
    assert budget.balance == 8
    assert go(mesh, call, 0) is not None
    call.won(None)
    assert budget.balance == 8
    mesh.close()


def test_no_hedge_after_the_deadline() -> None:
    mesh, _cluster, _first, call = begin(timeout=0.5)
    assert go(mesh, call, 1.0) is None
    mesh.close()


@given(
    endpoints=st.integers(1, 5),
    max_attempts=st.integers(1, 5),
    side_by_side=st.integers(2, 4),
    budget=st.sampled_from([None, RetryBudget(0, 0), RetryBudget(0, 0.3)]),
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([None, OK, FAILURE, REFUSED, OVERLOAD, FATAL])), max_size=40
    ),
)
def test_every_lease_is_closed_once_and_every_call_ends(
    endpoints: int, max_attempts: int, side_by_side: int, budget: RetryBudget | None, steps: list[Any]
) -> None:
    hedge = Hedge(delay=0.5, max_attempts=side_by_side)
    retry = {"max_attempts": max_attempts, "budget": budget, "wait": tenacity.wait_fixed(0.1)}
    mesh, cluster, first, call = begin(endpoints, hedge=hedge, **retry)
    flying, paid, over = [first], 0, False
    for which, outcome in steps:
        if outcome is None or not flying:
            if (lease := go(mesh, call, 0.5)) is not None:
                flying.append(lease)
                paid += 1
            elif call.is_over:
                over = True
                break
            continue
        lease = flying.pop(which % len(flying))
        if outcome is OK:
            call.won(lease)
            lease.close()
            over = True
            break
        if call.failed(lease, outcome, Safety.IDEMPOTENT):
            over = True
            break
    call.won(None)
    assert all(node.in_flight == 0 for node in cluster.nodes)
    assert_adds_up(cluster.nodes)
    assert call.attempts <= max_attempts + endpoints
    assert over or call.is_over
    assert cluster.retries == call.attempts - 1
    if budget is not None:
        assert cluster.budget is not None
        assert 0 <= cluster.budget.balance <= 3
    mesh.close()


def test_a_retry_that_is_given_up_is_paid_back_once() -> None:
    mesh, cluster = make_cluster(1, retry=Retry(budget=RetryBudget(0, 1)))
    lease = cluster.start()
    call = Call(cluster, NO_CONTEXT, lease.started, None)
    budget = cluster.budget
    assert budget is not None
    call.give_up()
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) is not None
    assert budget.balance == 9
    call.give_up()
    call.give_up()
    assert budget.balance == 10
    mesh.close()


def test_throttling_tells_calls_apart_by_how_they_end() -> None:
    throttle = RetryThrottle(RetryThrottling(10, 1))
    mesh, cluster = make_cluster(3, retry=Retry(budget=None), breaker=None)
    expected = {REFUSED: 10, FATAL: 10, FAILURE: 9, OVERLOAD: 8}
    for outcome, tokens in expected.items():
        lease = cluster.start()
        Call(cluster, NO_CONTEXT, lease.started, None, throttle=throttle).after(lease, outcome, Safety.IDEMPOTENT)
        assert throttle.tokens == tokens
    forbidden = Outcome(OutcomeKind.FAILURE, retry_after=-1.0, reason="INTERNAL")
    lease = cluster.start()
    Call(cluster, NO_CONTEXT, lease.started, None, throttle=throttle).after(lease, forbidden, Safety.IDEMPOTENT)
    assert throttle.tokens == 7
    mesh.close()


@pytest.mark.parametrize("retry", [None, Retry(max_attempts=1)])
def test_a_methods_own_retry_holds(retry: Retry | None) -> None:
    mesh, cluster = make_cluster(3)
    lease = cluster.start()
    call = Call(cluster, NO_CONTEXT, lease.started, None, retry=retry)
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) is None
    mesh.close()
