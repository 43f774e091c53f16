from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from meshlb import Breaker, Cluster, Lease, Outcome, OutcomeKind, Retry, RetryBudget, Sent
from meshlb.call import Call, Safety
from meshlb.model import NO_CONTEXT, CallContext
from meshlb.testing import LocalMesh
from tests.core.parts import FAILURE, IGNORED, OVERLOAD, REFUSED, assert_adds_up, endpoint, make_cluster

ANSWERED = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, retryable=True, reason="503")
FATAL = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, reason="500")


def begin(endpoints: int = 3, timeout: float | None = None, **settings: Any) -> tuple[LocalMesh, Cluster, Lease, Call]:
    mesh, cluster = make_cluster(endpoints, **settings)
    lease = cluster.start()
    return mesh, cluster, lease, Call(cluster, NO_CONTEXT, lease.started, timeout)


def again(call: Call) -> Lease:
    lease = call.again()
    assert lease is not None
    return lease


@pytest.mark.parametrize("outcome", [FAILURE, ANSWERED, REFUSED, OVERLOAD, FATAL, IGNORED])
@pytest.mark.parametrize("safety", Safety)
def test_only_what_is_safe_is_sent_again(outcome: Outcome, safety: Safety) -> None:
    mesh, _cluster, lease, call = begin()
    pause = call.after(lease, outcome, safety)
    safe = safety is Safety.IDEMPOTENT or (safety is Safety.UNSENT_ONLY and outcome.sent is Sent.NOT_SENT)
    assert (pause is not None) == (safe and outcome.retryable)
    assert lease.closed
    mesh.close()


def test_each_attempt_goes_to_an_endpoint_that_was_not_tried() -> None:
    mesh, cluster, lease, call = begin(4, retry=Retry(max_attempts=4))
    tried = [lease.node]
    while (pause := call.after(lease, FAILURE, Safety.IDEMPOTENT)) is not None:
        assert pause == 0.0
        lease = again(call)
        tried.append(lease.node)
    assert len(tried) == len(set(tried)) == 4
    assert (call.attempts, cluster.retries) == (4, 3)
    mesh.close()


def test_when_all_were_tried_it_waits_and_tries_any() -> None:
    mesh, _cluster, lease, call = begin(1, retry=Retry(max_attempts=3, wait=tenacity.wait_fixed(0.7)))
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) == 0.7
    assert call.after(again(call), FAILURE, Safety.IDEMPOTENT) == 0.7
    assert call.after(again(call), FAILURE, Safety.IDEMPOTENT) is None
    mesh.close()


def test_transparent_retries_cost_neither_attempts_nor_budget() -> None:
    retry = Retry(max_attempts=1, budget=RetryBudget(0, 0))
    mesh, cluster, lease, call = begin(30, retry=retry, breaker=None)
    attempts = 1
    while call.after(lease, REFUSED, Safety.UNSENT_ONLY) is not None:
        lease = again(call)
        attempts += 1
    assert attempts == 30
    assert {node.calls for node in cluster.nodes} == {1}
    mesh.close()


def test_transparent_retries_end_although_an_untried_endpoint_keeps_refusing() -> None:
    # The other endpoint is half-open and its one probe is under way: it is in the view, and refuses every attempt.
    mesh, cluster = make_cluster(2, breaker=Breaker(consecutive_failures=1, jitter=0), retry=Retry(max_attempts=3))
    half_open, other = cluster.nodes
    lease = half_open.begin()
    assert lease is not None
    lease.close(FAILURE)
    mesh.clock.advance(1.5)
    probe = half_open.begin()
    assert probe is not None
    first = other.begin()
    assert first is not None
    call = Call(cluster, NO_CONTEXT, first.started, None)
    lease = first
    for _ in range(20):
        if call.after(lease, Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, retryable=True), Safety.IDEMPOTENT) is None:
            break
        lease = again(call)
        assert lease.node is other
    else:
        pytest.fail("a call that never ends")
    probe.close()
    mesh.close()


def test_overload_goes_elsewhere_and_waits_for_a_hint_that_binds() -> None:
    mesh, _cluster, lease, call = begin()
    local = Outcome(OutcomeKind.OVERLOAD, retryable=True, retry_after=2.0)
    assert call.after(lease, local, Safety.IDEMPOTENT) == 0.0
    binding = Outcome(OutcomeKind.OVERLOAD, retryable=True, retry_after=2.0, hint_binds=True)
    assert call.after(again(call), binding, Safety.IDEMPOTENT) == 2.0
    mesh.close()


@pytest.mark.parametrize(
    ("hint", "pause"),
    [(0.0, 0.0), (30.0, 30.0), (30.1, None), (1e9, None), (math.inf, None), (-1.0, None), (math.nan, None)],
)
def test_hints(hint: float, pause: float | None) -> None:
    mesh, _cluster, lease, call = begin()
    outcome = Outcome(OutcomeKind.OVERLOAD, retryable=True, retry_after=hint, hint_binds=True)
    assert call.after(lease, outcome, Safety.IDEMPOTENT) == pause
    mesh.close()


def test_a_hint_of_the_only_endpoint_is_waited_for() -> None:
    mesh, _cluster, lease, call = begin(1)
    outcome = Outcome(OutcomeKind.FAILURE, retryable=True, retry_after=3.0)
    assert call.after(lease, outcome, Safety.IDEMPOTENT) == 3.0
    mesh.close()


@pytest.mark.parametrize(("timeout", "retried"), [(None, True), (1.6, True), (1.5, False), (1.0, False), (0.5, False)])
def test_no_sleeping_into_the_deadline(timeout: float | None, retried: bool) -> None:
    mesh, _cluster, lease, call = begin(1, timeout, retry=Retry(wait=tenacity.wait_fixed(0.5)))
    mesh.clock.advance(1.0)
    assert (call.after(lease, FAILURE, Safety.IDEMPOTENT) is not None) == retried
    remaining = call.remaining()
    assert remaining == (None if timeout is None else pytest.approx(timeout - 1.0))
    mesh.close()


def test_no_transparent_retry_after_the_deadline() -> None:
    mesh, _cluster, lease, call = begin(3, 1.0)
    mesh.clock.advance(1.0)
    assert call.after(lease, REFUSED, Safety.IDEMPOTENT) is None
    mesh.close()


def test_stop_strategies_see_the_pause_that_comes() -> None:
    retry = Retry(max_attempts=9, wait=tenacity.wait_fixed(10), stop=tenacity.stop_before_delay(5))
    mesh, _cluster, lease, call = begin(2, retry=retry)
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) == 0.0  # elsewhere, at once: well before 5 s
    assert call.after(again(call), FAILURE, Safety.IDEMPOTENT) is None  # 10 s would be beyond
    mesh.close()


def test_stop_strategies_see_the_time_since_the_calls_start() -> None:
    mesh, _cluster, lease, call = begin(5, retry=Retry(max_attempts=9, stop=tenacity.stop_after_delay(2)))
    mesh.clock.advance(1.9)
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) == 0.0
    mesh.clock.advance(0.2)
    assert call.after(again(call), FAILURE, Safety.IDEMPOTENT) is None
    mesh.close()


def test_a_broken_strategy_ends_the_call_with_the_error_it_has(caplog: pytest.LogCaptureFixture) -> None:
    def broken(state: Any) -> float:
        raise KeyError("mine")

    mesh, _cluster, lease, call = begin(1, retry=Retry(wait=broken))
    with caplog.at_level(logging.ERROR):
        assert call.after(lease, FAILURE, Safety.IDEMPOTENT) is None
    assert "mine" in caplog.text
    assert lease.closed
    mesh.close()


def test_the_budget_is_the_services_and_bounds_all_calls_together() -> None:
    mesh, cluster = make_cluster(3, retry=Retry(budget=RetryBudget(0.2, 0)), breaker=None)
    retries = 0
    for _ in range(100):
        lease = cluster.start()
        call = Call(cluster, NO_CONTEXT, lease.started, None)
        while call.after(lease, FAILURE, Safety.IDEMPOTENT) is not None:
            lease = again(call)
            retries += 1
    assert retries == 20
    mesh.close()


def test_without_a_budget_nothing_bounds_them() -> None:
    mesh, cluster = make_cluster(3, retry=Retry(budget=None), breaker=None)
    assert cluster.budget is None
    lease = cluster.start()
    call = Call(cluster, NO_CONTEXT, lease.started, None)
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) == 0.0
    assert call.after(again(call), FAILURE, Safety.IDEMPOTENT) == 0.0
    assert call.after(again(call), FAILURE, Safety.IDEMPOTENT) is None
    mesh.close()


def test_a_retry_that_finds_nobody_is_paid_back() -> None:
    mesh, cluster, lease, call = begin(1, retry=Retry(budget=RetryBudget(0, 1)))
    assert cluster.budget is not None
    balance = cluster.budget.balance
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) is not None
    assert cluster.budget.balance == balance - 1
    mesh.update("orders", [])
    assert call.again() is None
    assert cluster.budget.balance == balance
    mesh.close()


def test_no_retries_at_all() -> None:
    mesh, _cluster, lease, call = begin(3, retry=None)
    assert call.after(lease, REFUSED, Safety.IDEMPOTENT) is None
    assert lease.closed
    mesh.close()


def test_the_key_goes_along() -> None:
    mesh, cluster = make_cluster(8, policy="consistent_hash")
    context = CallContext(key="user-42", method="Get")
    lease = cluster.start(context)
    call = Call(cluster, context, lease.started, None)
    call.after(lease, FAILURE, Safety.IDEMPOTENT)
    second = again(call)
    assert second.node is not lease.node
    second.close()
    other = cluster.start(context)
    assert other.node is lease.node
    repeated = Call(cluster, context, other.started, None)
    repeated.after(other, FAILURE, Safety.IDEMPOTENT)
    assert again(repeated).node is second.node  # the second best for this key, every time
    mesh.close()


@given(
    endpoints=st.integers(1, 6),
    max_attempts=st.integers(1, 5),
    outcomes=st.lists(st.sampled_from([FAILURE, REFUSED, OVERLOAD, ANSWERED]), min_size=20, max_size=20),
)
def test_every_call_ends(endpoints: int, max_attempts: int, outcomes: list[Outcome]) -> None:
    mesh, cluster = make_cluster(endpoints, retry=Retry(max_attempts=max_attempts))
    lease = cluster.start()
    call = Call(cluster, NO_CONTEXT, lease.started, None)
    attempts = 1
    for outcome in outcomes:
        if call.after(lease, outcome, Safety.IDEMPOTENT) is None:
            break
        lease = again(call)
        attempts += 1
    assert attempts <= endpoints + max_attempts
    assert call.attempts == attempts
    assert cluster.retries == attempts - 1
    assert_adds_up(cluster.nodes)
    assert all(node.in_flight == 0 for node in cluster.nodes)
    mesh.close()


def test_an_endpoint_that_joins_late_is_tried_too() -> None:
    mesh, _cluster, lease, call = begin(1)
    mesh.update("orders", [endpoint(0), endpoint(1)])
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) == 0.0
    assert again(call).endpoint == endpoint(1)
    mesh.close()


def test_free_attempts_go_on_while_breakers_take_endpoints_out() -> None:
    breaker = Breaker(consecutive_failures=1, open_time=600, max_open_time=600)
    retry = Retry(max_attempts=1)
    mesh, cluster, lease, call = begin(3, breaker=breaker, retry=retry, max_ejection_percent=100, panic_threshold=0)
    for left in (2, 1):
        assert call.after(lease, REFUSED, Safety.UNSENT_ONLY) == 0.0
        mesh.clock.advance()
        assert len(cluster.view.nodes) == left
        lease = again(call)
    assert call.after(lease, REFUSED, Safety.UNSENT_ONLY) is None
    mesh.close()


def test_two_who_refuse_have_left_the_view_before_the_second_is_judged() -> None:
    breaker = Breaker(consecutive_failures=1, open_time=600, max_open_time=600)
    retry = Retry(max_attempts=1)
    mesh, cluster, lease, call = begin(3, breaker=breaker, retry=retry, max_ejection_percent=100, panic_threshold=0)
    assert call.after(lease, REFUSED, Safety.UNSENT_ONLY) == 0.0
    second = again(call)
    other = second.node.begin()  # another call fails there meanwhile
    assert other is not None
    other.close(REFUSED)
    mesh.clock.advance()
    assert len(cluster.view.nodes) == 1
    assert call.after(second, REFUSED, Safety.UNSENT_ONLY) == 0.0
    again(call).close()
    mesh.close()
