"""An attempt that is one call of a function, in which no lease is made."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest

from meshlb import Breaker, Lease
from meshlb.model import OK
from meshlb.node import REFUSED, Node
from meshlb.topology import Standing
from tests.core.parts import FAILURE, Bench, assert_adds_up, half_opened, opened


class Resource:
    closed = False


class Interrupted(BaseException):
    """Comes from outside, anywhere, as KeyboardInterrupt does."""


def unexpected(lease: Lease, error: BaseException, *arguments: Any) -> Any:
    raise AssertionError("no call has failed") from error


def run(bench: Bench, call: Any, *arguments: Any, failed: Any = unexpected, resource: Any = Resource) -> Any:
    return bench.node.run(bench.clock(), resource, failed, call, *arguments)


def test_a_success_counts_as_that_of_a_lease_does() -> None:
    ran, leased = Bench(), Bench()
    for seconds in (0.1, 0.4, 0.05, 0.7):  # the last one is looked at more closely

        def call(text: str, seconds: float = seconds) -> str:
            assert ran.node.in_flight == 1
            ran.clock.advance(seconds)
            assert ran.node.oldest_wait(ran.clock()) == pytest.approx(seconds)
            return text.upper()

        assert run(ran, call, "done") == "DONE"
        lease = leased.begin()
        leased.clock.advance(seconds)
        lease.close()
        for bench in (ran, leased):
            assert_adds_up([bench.node])
        for name in ("calls", "successes", "in_flight", "last_picked"):
            assert getattr(ran.node, name) == getattr(leased.node, name)
        assert ran.node.latency.value == leased.node.latency.value
    assert not ran.node._waiting
    assert ran.owner.told == []


def test_a_failure_is_handed_on_with_an_open_lease() -> None:
    bench = Bench(Breaker(consecutive_failures=2, jitter=0))
    error = ConnectionError("gone")
    seen = []

    def call(number: int) -> None:
        bench.clock.advance(0.25)
        raise error

    def failed(lease: Lease, failure: BaseException, number: int) -> str:
        assert failure is error
        assert (bench.node.in_flight, lease.closed, lease.started) == (1, False, bench.clock() - 0.25)
        assert sys.exc_info() == (None, None, None)  # or what it raises would have the failure as its context
        seen.append(number)
        assert lease.close(FAILURE)
        return "another one's answer"

    assert [run(bench, call, number, failed=failed) for number in (1, 2)] == ["another one's answer"] * 2
    assert seen == [1, 2]
    assert bench.node.standing is Standing.OPEN
    assert_adds_up([bench.node])


def test_the_failure_is_of_the_generation_in_which_the_attempt_began() -> None:
    bench = Bench(Breaker(consecutive_failures=1, open_time=5, jitter=0))

    def call() -> None:
        bench.call(FAILURE)
        bench.clock.advance(6)
        assert bench.node.poll_breaker()
        bench.call(OK)  # the probe closes the breaker again
        assert bench.node.standing is Standing.READY
        raise ConnectionError("of before that")

    run(bench, call, failed=lambda lease, error: lease.close(FAILURE))
    assert bench.node.standing is Standing.READY  # one failure would open it
    assert_adds_up([bench.node])


@pytest.mark.parametrize("bench", [opened(), half_opened()], ids=["open", "half open"])
def test_what_needs_a_decision_is_refused(bench: Bench) -> None:
    assert run(bench, unexpected) is REFUSED
    assert_adds_up([bench.node])


def test_a_retired_endpoint_refuses() -> None:
    bench = Bench()
    bench.node.retire()
    assert run(bench, unexpected) is REFUSED
    assert_adds_up([bench.node])


def test_a_closed_resource_is_asked_for_when_the_attempt_counts() -> None:
    bench = Bench()
    in_flight = []

    class Closed:
        @property
        def closed(self) -> bool:
            in_flight.append(bench.node.in_flight)
            return True

    assert run(bench, unexpected, resource=Closed()) is REFUSED
    assert in_flight == [1]
    assert (bench.node.ignored, bench.node.in_flight) == (1, 0)
    assert_adds_up([bench.node])


def test_a_call_within_a_call_on_the_same_endpoint() -> None:
    bench = Bench()

    def inner() -> str:
        assert bench.node.in_flight == 2
        assert len(bench.node._waiting) == 2
        return "inner"

    assert run(bench, lambda: run(bench, inner)) == "inner"
    assert_adds_up([bench.node])
    assert not bench.node._waiting


def test_the_end_of_the_last_attempt_of_a_retired_endpoint_is_told() -> None:
    bench = Bench()
    assert run(bench, bench.node.retire) is False
    assert bench.owner.told == ["drained"]
    assert_adds_up([bench.node])


@pytest.mark.parametrize("how", ["well", "slowly", "badly"])
def test_an_exception_from_outside_leaves_nothing_counted(how: str) -> None:
    """At each of the places where a signal handler may run: as a Python function begins, and after a C function."""
    places = 0
    for place in range(200):
        bench = Bench()
        left = place

        def call(bench: Bench = bench) -> str:
            bench.clock.advance(0.9 if how == "slowly" else 0.1)
            if how == "badly":
                raise ConnectionError
            return "answer"

        def failed(lease: Lease, error: BaseException, *arguments: Any) -> str:
            lease.close(FAILURE)
            raise error

        def interrupt(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            if event not in ("call", "c_return") or frame.f_code.co_filename != Node.run.__code__.co_filename:
                return
            if left == 0:
                sys.setprofile(None)
                left = -1
                raise Interrupted
            left -= 1

        sys.setprofile(interrupt)
        try:
            run(bench, call, failed=failed)
        except (Interrupted, ConnectionError):
            pass
        finally:
            sys.setprofile(None)
        gc.collect()
        for lease in bench.owner.abandoned:
            lease.close(FAILURE)
        assert bench.node.in_flight == 0, place
        assert not bench.node._waiting, place
        assert not bench.node.lock.locked()
        if left >= 0:
            break
        places += 1
    assert places > 5
    assert left >= 0  # it has been tried at the last place, too


def test_many_threads() -> None:
    bench = Bench()
    go = threading.Barrier(8)

    def work() -> None:
        go.wait()
        for number in range(500):
            if number % 50:
                run(bench, int, "1")
            else:
                run(bench, int, "one", failed=lambda lease, error, text: lease.close(OK))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (bench.node.calls, bench.node.successes, bench.node.in_flight) == (4000, 4000, 0)
    assert_adds_up([bench.node])
    assert not bench.node._waiting
