"""How much may be under way at once: the account, the queue, and the calls that wait in it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlb
from meshlb import (
    Breaker,
    CircuitOpen,
    Cluster,
    ConfigError,
    Gradient2,
    Lease,
    LimitExceeded,
    Limits,
    MeshClosed,
    Retry,
)
from meshlb.call import Call, Safety
from meshlb.model import NO_CONTEXT
from meshlb.resilience import ConcurrencyLimiter
from meshlb.resilience.limits import Ticket
from meshlb.topology import Standing
from tests.core.parts import FAILURE, IGNORED, assert_adds_up, bare, endpoint, make_cluster
from tests.support.wait import eventually, eventually_async


def limited(endpoints: int = 2, clock: Callable[[], float] = time.monotonic, **limits: Any) -> Cluster:
    limits.setdefault("queue_timeout", 60)
    cluster = bare(clock=clock, limits=Limits(**limits), breaker=None)
    cluster.update([endpoint(number) for number in range(endpoints)])
    return cluster


def limiter_of(cluster: Cluster) -> ConcurrencyLimiter:
    assert cluster.limiter is not None
    return cluster.limiter


def assert_empty(cluster: Cluster) -> None:
    limiter = limiter_of(cluster)
    assert (limiter.in_use, limiter.waiting, limiter._granted) == (0, 0, 0)
    assert_adds_up(cluster.nodes)
    assert sum(node.in_flight for node in cluster.nodes) == 0


# -- without a queue


def test_the_service_has_a_limit() -> None:
    cluster = limited(max_concurrency=3, max_queue=0)
    leases = [cluster.start() for _ in range(3)]
    assert cluster.try_start() is None
    with pytest.raises(
        LimitExceeded, match=r"service 'orders': .* 3 attempts are under way \(Limits.max_concurrency 3"
    ):
        cluster.start()
    leases.pop().close(FAILURE)
    leases.append(cluster.start())
    for lease in leases:
        assert lease.close()
        assert not lease.close()
    assert_empty(cluster)
    assert limiter_of(cluster).rejected == 1


def test_at_its_limit_an_endpoint_is_passed_by() -> None:
    cluster = limited(3, max_concurrency_per_endpoint=2, max_queue=0)
    first: list[Lease] = []
    while len(first) < 2:
        lease = cluster.start()
        if lease.node is cluster.nodes[0]:
            first.append(lease)
        else:
            lease.close()
    leases = [cluster.start() for _ in range(4)]
    assert sorted(node.in_flight for node in cluster.nodes) == [2, 2, 2]
    with pytest.raises(LimitExceeded, match="every endpoint has as many attempts"):
        cluster.start()
    assert isinstance(cluster.unavailable(), LimitExceeded)
    freed = leases.pop()
    freed.close()
    again = cluster.start()
    assert again.node is freed.node
    for lease in [*first, *leases, again]:
        lease.close()
    assert_empty(cluster)


def test_a_refusal_by_the_limits_is_no_open_breaker_and_the_other_way_round() -> None:
    mesh, cluster = make_cluster(1, limits=Limits(max_concurrency=1, max_queue=0), panic_threshold=0)
    with mesh:
        lease = cluster.start()
        with pytest.raises(LimitExceeded):
            cluster.start()
        lease.close()
        for _ in range(5):
            cluster.start().close(FAILURE)
        mesh.clock.advance()
        with pytest.raises(CircuitOpen):
            cluster.start()
        assert_empty(cluster)


def test_a_probe_that_the_limits_refuse_gives_its_place_back() -> None:
    limits = Limits(max_concurrency=1, max_queue=0)
    mesh, cluster = make_cluster(2, limits=limits, breaker=Breaker(jitter=0))
    bad, good = cluster.nodes
    with mesh:
        for _ in range(5):
            lease = bad.begin()
            assert lease is not None
            lease.close(FAILURE)
        mesh.clock.advance(2)
        assert bad.standing is Standing.HALF_OPEN
        other = good.begin()
        assert other is not None
        assert [bad.begin() for _ in range(3)] == [None] * 3
        other.close()
        probe = bad.begin()
        assert probe is not None
        probe.close()
        assert bad.standing is Standing.READY
        assert_empty(cluster)


def test_panic_does_not_pass_the_limits_by() -> None:
    mesh, cluster = make_cluster(1, limits=Limits(max_concurrency_per_endpoint=1, max_queue=0))
    with mesh:
        for _ in range(5):
            cluster.start().close(FAILURE)
        mesh.clock.advance()
        assert cluster.view.panic
        lease = cluster.start()
        with pytest.raises(LimitExceeded):
            cluster.start()
        lease.close()
        assert_empty(cluster)


def test_at_the_limit_a_call_is_not_retried() -> None:
    cluster = limited(2, max_concurrency=2, max_queue=100)
    other = cluster.start()
    lease = cluster.start()
    call = Call(cluster, NO_CONTEXT, lease.started, None)
    lease_taken: list[Lease] = []
    assert call.after(lease, FAILURE, Safety.IDEMPOTENT) == 0.0
    lease_taken.append(cluster.start())  # a new call is worth more than a retry
    assert call.again() is None
    assert cluster.retries == 0
    other.close()
    lease_taken.pop().close()
    assert_empty(cluster)
    assert cluster.budget is not None
    assert cluster.budget.balance == 100  # what it had paid for the retry was given back


def test_the_limits_are_in_the_snapshot() -> None:
    cluster = limited(1, max_concurrency=5, max_concurrency_per_endpoint=2, max_queue=7)
    lease = cluster.start()
    snapshot = cluster.snapshot()
    assert snapshot["limits"] == {"in_use": 1, "max_concurrency": 5, "waiting": 0, "max_queue": 7, "rejected": 0}
    assert snapshot["endpoints"][0]["max_in_flight"] == 2
    lease.close(IGNORED)
    assert_empty(cluster)


# -- waiting


def test_threads_are_served_in_the_order_they_came() -> None:
    cluster = limited(1, max_concurrency=1)
    first = cluster.start()
    order: list[int] = []

    def call(number: int) -> None:
        lease = cluster.start()
        order.append(number)
        lease.close()

    threads = []
    for number in range(20):
        threads.append(threading.Thread(target=call, args=(number,)))
        threads[-1].start()
        eventually(lambda number=number: limiter_of(cluster).waiting == number + 1, 20)
    assert cluster.try_start() is None  # nobody jumps the queue
    first.close()
    for thread in threads:
        thread.join(20)
    assert order == list(range(20))
    assert_empty(cluster)


@pytest.mark.anyio
async def test_tasks_wait_without_blocking_the_loop() -> None:
    cluster = limited(1, max_concurrency=1)
    first = cluster.start()
    order: list[int] = []

    async def call(number: int) -> None:
        lease = await cluster.start_async()
        order.append(number)
        await anyio.sleep(0)
        lease.close()

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(call, number)
            await eventually_async(lambda number=number: limiter_of(cluster).waiting == number + 1, 20)
        assert order == []
        first.close()
    assert order == list(range(20))
    assert_empty(cluster)


@pytest.mark.anyio
async def test_who_is_cancelled_in_the_queue_leaves_no_trace() -> None:
    cluster = limited(1, max_concurrency=1)
    first = cluster.start()
    got: list[str] = []

    async def call(name: str) -> None:
        lease = await cluster.start_async()
        got.append(name)
        lease.close()

    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(call, f"cancelled {number}")
            await eventually_async(lambda: limiter_of(cluster).waiting == 3, 20)
            tasks.cancel_scope.cancel()
        assert limiter_of(cluster).waiting == 0
        others.start_soon(call, "patient")
        await eventually_async(lambda: limiter_of(cluster).waiting == 1, 20)
        first.close()
    assert got == ["patient"]
    assert_empty(cluster)


def test_a_place_granted_to_a_call_that_has_given_up_is_passed_on() -> None:
    limiter = ConcurrencyLimiter(Limits(max_concurrency=1))
    assert limiter.try_take(False)
    gone, waiting = limiter.enter(), limiter.enter()
    assert gone is not None
    assert waiting is not None
    limiter.release()
    assert (gone.granted, waiting.granted) == (True, False)
    limiter.leave(gone)
    assert waiting.granted
    assert waiting.signal.is_set()
    assert not limiter.try_take(False)  # it is promised
    assert limiter.try_take(True)
    limiter.leave(waiting)
    limiter.release()
    assert limiter.try_take(False)


def test_a_full_queue_and_a_long_wait_are_told_apart() -> None:
    cluster = limited(1, max_concurrency=1, max_queue=1, queue_timeout=0.05)
    lease = cluster.start()
    with pytest.raises(LimitExceeded, match=r"as long as it may \(Limits.queue_timeout"):
        cluster.start()
    with pytest.raises(LimitExceeded, match="as long as it may"):
        cluster.start(timeout=0.01)
    ticket = limiter_of(cluster).enter()
    with pytest.raises(LimitExceeded, match=r"1 calls are waiting already \(Limits.max_queue\)"):
        cluster.start(timeout=30)
    assert ticket is not None
    limiter_of(cluster).leave(ticket)
    lease.close()
    assert limiter_of(cluster).rejected == 3
    assert_empty(cluster)


def test_the_calls_own_deadline_ends_the_wait() -> None:
    cluster = limited(1, max_concurrency=1, queue_timeout=1000)
    lease = cluster.start()
    with pytest.raises(LimitExceeded):
        cluster.start(timeout=0.05)
    lease.close()
    assert_empty(cluster)


def test_whoever_waits_for_an_endpoint_goes_to_a_new_one() -> None:
    cluster = limited(1, max_concurrency_per_endpoint=1)
    lease = cluster.start()
    got: list[Lease] = []
    thread = threading.Thread(target=lambda: got.append(cluster.start()))
    thread.start()
    eventually(lambda: limiter_of(cluster).waiting == 1, 20)
    cluster.update([endpoint(0), endpoint(1)])
    thread.join(20)
    assert got[0].node is cluster.nodes[1]
    lease.close()
    got[0].close()
    assert_empty(cluster)


def test_closing_wakes_everybody() -> None:
    cluster = limited(1, max_concurrency=1)
    lease = cluster.start()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            cluster.start()
        except MeshClosed as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(5)]
    for thread in threads:
        thread.start()
    eventually(lambda: limiter_of(cluster).waiting == 5, 20)
    cluster.close()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 5
    lease.close()


def test_if_there_is_nobody_to_call_it_is_not_the_limits_that_say_so() -> None:
    cluster = limited(1, max_concurrency_per_endpoint=1)
    lease = cluster.start()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            cluster.start()
        except meshlb.NoEndpoints as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: limiter_of(cluster).waiting == 1, 20)
    cluster.update([])
    thread.join(20)
    assert len(errors) == 1
    lease.close()


@pytest.mark.parametrize(
    "limits",
    [
        {"max_concurrency": 3},
        {"max_concurrency_per_endpoint": 1},
        {"max_concurrency": 3, "max_concurrency_per_endpoint": 2},
        {"adaptive": Gradient2(min_limit=1, initial_limit=2, max_limit=4)},
    ],
    ids=["service", "endpoints", "both", "adaptive"],
)
def test_under_many_threads_no_limit_is_passed_and_nobody_is_forgotten(limits: dict[str, Any]) -> None:
    cluster = limited(3, **limits, max_queue=1000)
    most, per_endpoint = limits.get("max_concurrency", 1000), limits.get("max_concurrency_per_endpoint", 1000)
    if "adaptive" in limits:
        per_endpoint = 4
    served: list[int] = []
    excesses: list[str] = []

    def call(number: int) -> None:
        chance = random.Random(number)
        for _ in range(60):
            try:
                lease = cluster.start(timeout=60)
            except LimitExceeded:
                continue
            loads = [node.in_flight for node in cluster.nodes]
            if sum(loads) > most + 20 or max(loads) > per_endpoint or limiter_of(cluster).in_use > most:
                excesses.append(f"{loads} {limiter_of(cluster).in_use}")
            if chance.random() < 0.3:
                time.sleep(0)
            lease.close(FAILURE if chance.random() < 0.3 else meshlb.model.OK)
            served.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert excesses == []
    assert len(served) == 20 * 60
    assert_empty(cluster)


@given(st.data())
def test_every_ticket_is_served_or_leaves_whatever_the_order(data: st.DataObject) -> None:
    most = data.draw(st.integers(1, 3))
    limiter = ConcurrencyLimiter(Limits(max_concurrency=most, max_queue=5))
    waiting: list[Ticket] = []
    taken = 0
    for step in data.draw(st.lists(st.sampled_from(["come", "queue", "end", "give up", "try"]), max_size=60)):
        if step == "come":
            taken += limiter.try_take(False)
        elif step == "queue":
            full = limiter.waiting == 5
            ticket = limiter.enter()
            assert (ticket is None) == full
            if ticket is not None:
                waiting.append(ticket)
        elif step == "end" and taken:
            taken -= 1
            limiter.release()
        elif step == "give up" and waiting:
            limiter.leave(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
        elif step == "try":
            for ticket in [ticket for ticket in waiting if ticket.granted]:
                assert limiter.try_take(True)
                taken += 1
                limiter.leave(ticket)
                waiting.remove(ticket)
        assert limiter.in_use == taken <= most
        assert limiter.waiting + limiter._granted == len(waiting)
        if limiter.in_use + limiter._granted < most:
            assert limiter.waiting == 0  # nobody waits while there is a place
    while waiting:
        granted = [ticket for ticket in waiting if ticket.granted]
        for ticket in granted:
            assert limiter.try_take(True)
            limiter.leave(ticket)
            waiting.remove(ticket)
        for _ in range(limiter.in_use):
            limiter.release()
    assert limiter._granted == limiter.waiting == 0


def test_put_back_notices_a_place_that_became_free_meanwhile() -> None:
    limiter = ConcurrencyLimiter(Limits(max_concurrency_per_endpoint=1))
    ticket = limiter.enter()
    assert ticket is not None
    assert ticket.granted  # alone, it may look for itself
    limiter.put_back(ticket)
    assert not ticket.granted
    limiter.nudge()
    assert ticket.granted
    limiter.nudge()
    limiter.put_back(ticket)
    assert ticket.granted  # something changed while it tried
    limiter.put_back(ticket)
    assert not ticket.granted
    limiter.leave(ticket)
    assert (limiter.waiting, limiter._granted) == (0, 0)


def test_an_adaptive_limit_follows_latency() -> None:
    options = Gradient2(min_limit=2, initial_limit=10, max_limit=50, window=1, window_calls=5)
    mesh, cluster = make_cluster(1, limits=Limits(adaptive=options, max_queue=0), retry=Retry(budget=None))
    (node,) = cluster.nodes
    assert node.limit is not None

    def load(seconds: float, rounds: int) -> int:
        for _ in range(rounds):
            leases = []
            while (lease := cluster.try_start()) is not None:
                leases.append(lease)
            mesh.clock.advance(seconds)
            for lease in leases:
                lease.close()
        assert node.limit is not None
        return node.limit.limit

    with mesh:
        grown = load(0.05, 400)
        assert grown > 15
        assert load(0.4, 100) < grown
        assert_empty(cluster)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({}, "max_concurrency"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 1.5}, "max_concurrency"),
        ({"max_concurrency_per_endpoint": -1}, "max_concurrency_per_endpoint"),
        ({"adaptive": True}, "adaptive"),
        ({"max_concurrency": 1, "max_queue": -1}, "max_queue"),
        ({"max_concurrency": 1, "queue_timeout": 0}, "queue_timeout"),
    ],
)
def test_bad_settings(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"Limits\.{field}"):
        Limits(**settings)
