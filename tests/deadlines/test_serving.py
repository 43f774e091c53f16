"""What surrounds a call, by itself: deadlines, the request being served, and a budget that retries pass through."""

from __future__ import annotations

import asyncio
import threading

import pytest

import meshlb
from meshlb import ConfigError, DeadlineExceeded, Mesh, ServiceConfig
from meshlb.call import Call, Safety
from meshlb.discovery import StaticDiscovery
from meshlb.model import NO_CONTEXT, Outcome, OutcomeKind, Sent
from meshlb.resilience import Retry, RetryBudget
from meshlb.resilience.budget import TokenBudget
from meshlb.serving import (
    ServedRequest,
    note_in_vain,
    parse_attempts,
    parse_milliseconds,
    serving,
    surroundings,
)
from meshlb.testing import FakeClock, LocalMesh


def left(timeout: float | None = None) -> float | None:
    around = surroundings()
    return timeout if around is None else around.limited(timeout)


def test_nothing_surrounds_a_program():
    assert surroundings() is None


def test_the_earlier_deadline_holds_and_none_lifts_it():
    with meshlb.deadline(50):
        assert 0 < left() <= 50
        assert left(1.0) == 1.0
        with meshlb.deadline(100):
            assert left() <= 50
        with meshlb.deadline(10):
            assert left() <= 10
        with meshlb.deadline(None):
            assert left() is None
            assert left(3.0) == 3.0
        assert 10 < left() <= 50
    assert surroundings() is None


@pytest.mark.parametrize("seconds", ["1", float("nan"), float("inf"), True])
def test_a_deadline_that_is_none(seconds: object):
    with pytest.raises(ConfigError, match="deadline"), meshlb.deadline(seconds):  # type: ignore[arg-type]
        pass


def test_it_goes_where_context_variables_go():
    async def main() -> tuple[float | None, float | None, list[float | None]]:
        with meshlb.deadline(50):
            task = asyncio.create_task(asyncio.to_thread(left))
            own: list[float | None] = []
            thread = threading.Thread(target=lambda: own.append(left()))
            thread.start()
            thread.join()
            return await task, left(), own

    in_thread, here, own = asyncio.run(main())
    assert 0 < in_thread <= 50 and 0 < here <= 50
    assert own == [None]


def test_serving_keeps_the_request_within_a_deadline():
    with serving(timeout=5, previous_attempts=2) as request:
        with meshlb.deadline(1):
            assert surroundings().request is request
            assert surroundings().previous_attempts == 2
            note_in_vain()
        assert left() > 1
    assert request.in_vain


def test_an_outer_deadline_bounds_the_served_request():
    with meshlb.deadline(1), serving(timeout=50):
        assert left() <= 1
    with meshlb.deadline(1), serving():
        assert left() <= 1


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        *((None, None), ("1500", 1.5), (" 20 ", 0.02), ("0", None), ("-5", None), ("soon", None), ("", None)),
        *(("99999999999", 86_400.0), ("9" * 400, None), ("\u0661", None)),
    ],
)
def test_milliseconds(value: str | None, parsed: float | None):
    assert parse_milliseconds(value) == parsed


@pytest.mark.parametrize(
    ("value", "first", "previous"),
    [(None, 1, 0), ("1", 1, 0), ("3", 1, 2), ("3", 0, 3), ("-3", 0, 0), ("x", 0, 0), ("9" * 15, 0, 1_000_000)],
)
def test_attempts(value: str | None, first: int, previous: int):
    assert parse_attempts(value, first=first) == previous


def test_a_lease_is_not_begun_when_no_time_is_left():
    with Mesh(StaticDiscovery({"orders": ["127.0.0.1:1"]})) as mesh:
        cluster = mesh.cluster("orders")
        with meshlb.deadline(0), pytest.raises(DeadlineExceeded, match="orders"), cluster.lease():
            pass
        with meshlb.deadline(10), cluster.lease() as lease:
            assert lease.endpoint.port == 1

        async def lease_async() -> None:
            with meshlb.deadline(-1):
                async with cluster.lease():
                    pass

        with pytest.raises(DeadlineExceeded, match="orders"):
            asyncio.run(lease_async())
        assert all(entry["in_flight"] == 0 for entry in cluster.snapshot()["endpoints"])


# -- retries of retries --------------------------------------------------------------------------------------------


def test_a_call_for_a_retry_takes_the_place_of_a_retry():
    budget = TokenBudget(RetryBudget(ratio=0.2, min_per_second=0), FakeClock())
    for _ in range(100):
        budget.deposit(1_000.0)
    assert budget.balance == 20
    for _ in range(20):  # calls that are made for retries: deposited as any, and charged
        budget.deposit(1_000.0)
        budget.charge()
    assert budget.balance == 0
    assert not budget.try_withdraw()


def test_the_extra_load_of_two_layers_together_is_that_of_one():
    """100 calls, of which the layer above retries 20 %: whatever fails, 120 attempts reach the layer below."""
    budget = TokenBudget(RetryBudget(ratio=0.2, min_per_second=0), FakeClock())
    attempts = 0
    for call in range(120):
        attempts += 1
        budget.deposit(1_000.0)
        if call % 6 == 5:
            budget.charge()
        elif budget.try_withdraw():
            attempts += 1
    while budget.try_withdraw():
        attempts += 1
    assert attempts <= 121  # a retry may come before the charge of the call after it


FAILED = Outcome(OutcomeKind.FAILURE, retryable=True, reason="503")
UNREACHED = Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason="ConnectError")


def give_up(outcome: Outcome, *, retry: Retry | None, safety: Safety = Safety.IDEMPOTENT) -> bool:
    """Whether a call of whose attempts all end like this says that it was in vain."""
    with LocalMesh({"orders": ["10.0.0.1:80", "10.0.0.2:80"]}, defaults=ServiceConfig(retry=retry)) as mesh:
        cluster = mesh.cluster("orders")
        served = ServedRequest()
        lease = cluster.start()
        call = Call(cluster, NO_CONTEXT, lease.started, None, served=served)
        while call.after(lease, outcome, safety) is not None:
            assert not served.in_vain
            further = call.again()
            if further is None:
                break
            lease = further
        return served.in_vain


def test_when_a_call_was_in_vain():
    assert give_up(FAILED, retry=Retry())
    assert give_up(FAILED, retry=Retry(max_attempts=1))
    assert give_up(FAILED, retry=Retry(budget=RetryBudget(ratio=0, min_per_second=0)))
    assert give_up(Outcome(OutcomeKind.FAILURE, retryable=True, retry_after=-1.0, reason="503"), retry=Retry())


def test_when_it_was_not():
    assert not give_up(FAILED, retry=None), "who does not retry leaves that to his caller"
    assert not give_up(FAILED, retry=Retry(), safety=Safety.UNSENT_ONLY)
    assert not give_up(Outcome(OutcomeKind.FAILURE, reason="500"), retry=Retry())
    assert not give_up(UNREACHED, retry=Retry(max_attempts=1)), "nobody was reached: it may be this instance alone"
