"""An endpoint's breaker, and its place among the ejected."""

from __future__ import annotations

import gc

import pytest

from meshlb import Breaker, Outcome
from meshlb.model import OK
from meshlb.topology import Standing
from tests.core.parts import FAILURE, IGNORED, OVERLOAD, Bench, assert_adds_up, half_opened, opened

# -- the breaker and the places among the ejected


def test_failures_in_a_row_open_the_breaker_and_take_a_place() -> None:
    bench = Bench(Breaker(consecutive_failures=3, jitter=0))
    bench.call(FAILURE, 2)
    bench.call(OK)
    bench.call(FAILURE, 3)
    assert bench.owner.told == ["opened for 1"]
    assert (bench.node.standing, bench.node.ejected, bench.cap.out) == (Standing.OPEN, True, 1)
    assert bench.node.begin() is None
    assert bench.node.last_failure == "503"


def test_overload_and_ignored_never_open_it_nor_interrupt_a_row() -> None:
    bench = Bench(Breaker(consecutive_failures=3, failure_rate=None, jitter=0))
    bench.call(OVERLOAD, 50)
    bench.call(IGNORED, 50)
    assert bench.owner.told == []
    bench.call(FAILURE)
    bench.call(OVERLOAD)
    bench.call(FAILURE)
    bench.call(IGNORED)
    bench.call(FAILURE)
    assert bench.owner.told == ["opened for 1"]


def test_a_reached_cap_leaves_it_closed_until_there_is_a_place() -> None:
    bench = Bench(Breaker(consecutive_failures=2, jitter=0), endpoints=1)
    bench.cap.take()
    bench.call(FAILURE, 5)
    assert bench.node.standing is Standing.READY
    bench.cap.give_back()
    bench.call(FAILURE)
    assert bench.node.standing is Standing.OPEN


def test_a_good_probe_closes_it_and_gives_the_place_back() -> None:
    bench = half_opened()
    probe = bench.begin()
    assert bench.node.begin() is None
    assert bench.cap.out == 1
    probe.close()
    assert bench.owner.told == ["closed"]
    assert (bench.node.standing, bench.node.ejected, bench.cap.out) == (Standing.READY, False, 0)
    bench.call(OK, 3)


@pytest.mark.parametrize("outcome", [FAILURE, OVERLOAD], ids=["failure", "overload"])
def test_a_bad_probe_opens_it_again_and_keeps_the_one_place(outcome: Outcome) -> None:
    bench = half_opened()
    bench.call(outcome)
    assert bench.owner.told == ["opened for 2"]
    assert (bench.node.standing, bench.cap.out) == (Standing.OPEN, 1)


def test_an_ignored_probe_gives_its_place_to_the_next() -> None:
    bench = half_opened()
    bench.call(IGNORED, 20)
    assert bench.node.standing is Standing.HALF_OPEN
    bench.call(OK)
    assert bench.node.standing is Standing.READY


def test_a_collected_probe_gives_its_place_to_the_next() -> None:
    bench = half_opened()
    bench.begin()
    gc.collect()
    assert bench.node.begin() is None
    bench.owner.abandoned.pop().close(IGNORED)
    assert bench.begin().close()
    assert bench.node.standing is Standing.READY


def test_a_streaming_probe_closes_it_with_its_first_answer() -> None:
    bench = half_opened(Breaker(jitter=0, half_open_calls=2))
    for standing in (Standing.HALF_OPEN, Standing.READY):
        stream = bench.begin()
        stream.answered()
        assert stream.close()  # counted once, not twice
        assert bench.node.standing is standing
    assert bench.owner.told == ["closed"]
    assert (bench.node.standing, bench.cap.out) == (Standing.READY, 0)


def test_an_answer_that_is_not_healthy_closes_nothing() -> None:
    bench = half_opened()
    probe = bench.begin()
    probe.answered(healthy=False)
    assert bench.node.standing is Standing.HALF_OPEN
    probe.close(FAILURE)
    assert bench.node.standing is Standing.OPEN


def test_panic_passes_the_breaker_by_and_proves_nothing() -> None:
    bench = opened()
    forced = bench.node.begin(force=True)
    assert forced is not None
    forced.close(OK)
    assert bench.node.standing is Standing.OPEN
    bench.clock.advance(2)
    bench.node.poll_breaker()
    probe = bench.node.begin(force=True)  # this one gets the probe's place
    extra = bench.node.begin(force=True)
    assert probe is not None
    assert extra is not None
    extra.close(FAILURE)
    assert bench.node.standing is Standing.HALF_OPEN
    probe.close(OK)
    assert bench.node.standing is Standing.READY
    assert_adds_up([bench.node])


def test_without_a_breaker_failures_are_only_counted() -> None:
    bench = Bench(None)
    bench.call(FAILURE, 50)
    assert bench.node.standing is Standing.READY
    assert not bench.node.poll_breaker()
    assert bench.node.failures == 50
