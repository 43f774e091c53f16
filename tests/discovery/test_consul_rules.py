"""The rules of a blocking query, by tables and with a clock of the test's own."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.discovery.consul_rules import (
    BACKOFF_CAP,
    BACKOFF_FLOOR,
    READ_MARGIN,
    Backoff,
    EmptyGuard,
    RefreshLimiter,
    first_delay,
    is_early,
    next_index,
    parse_index,
    read_timeout,
)


@pytest.mark.parametrize(
    ("previous", "received", "expected"),
    [
        (0, 42, 42),
        (42, 43, 43),
        (100, 100, 100),  # a time-out
        (100, 50, 0),  # backwards
        (0, 0, 1),  # below 1
        (5, 0, 0),
        (1, 1, 1),
        (0, None, 0),  # no header
        (7, None, 0),
    ],
)
def test_next_index(previous, received, expected):
    assert next_index(previous, received) == expected


@pytest.mark.parametrize(
    ("previous", "received", "expected"), [(100, 100, 0), (100, 101, 101), (100, 50, 0), (0, 7, 7), (0, 0, 1)]
)
def test_an_equal_index_before_the_time_is_over_is_forgotten(previous, received, expected):
    assert next_index(previous, received, early=True) == expected


@pytest.mark.parametrize(("elapsed", "expected"), [(0.0, True), (27.0, True), (54.9, False), (58.4, False)])
def test_is_early(elapsed, expected):
    assert is_early(elapsed, 55.0) is expected


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**63)), max_size=20))
def test_an_index_never_goes_backwards_without_a_query_that_does_not_block(received):
    index = 0
    for one in received:
        new = next_index(index, one)
        assert new == 0 or new >= max(index, 1)
        index = new


@pytest.mark.parametrize(
    ("header", "expected"),
    [("17", 17), ("0", 0), (None, None), ("", None), ("abc", None), ("-1", None), ("1.5", None), ("١٢", None)],
)
def test_parse_index(header, expected):
    assert parse_index(header) == expected


def test_read_timeout_leaves_room_for_the_jitter_of_consul():
    assert read_timeout(300) == 318.75 + READ_MARGIN


def test_backoff_doubles_up_to_the_cap_and_starts_again_after_success():
    backoff = Backoff(lambda: 1.0)
    assert [backoff.next() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    backoff.reset()
    assert backoff.next() == 1


def test_backoff_counts_too_many_requests_twice():
    backoff = Backoff(lambda: 1.0)
    assert [backoff.next(throttled=True) for _ in range(4)] == [2, 8, 30, 30]


def test_backoff_is_fully_jittered_but_never_hot():
    assert Backoff(lambda: 0.0).next() == BACKOFF_FLOOR
    backoff = Backoff(random.Random(1).random)
    for _ in range(10):
        backoff.next()
    pauses = [backoff.next() for _ in range(2000)]
    assert all(BACKOFF_FLOOR <= pause <= BACKOFF_CAP for pause in pauses)
    assert min(pauses) < 1 and max(pauses) > 29, "spread over the whole range"


def test_backoff_survives_a_long_outage():
    backoff = Backoff(lambda: 1.0)
    for _ in range(100_000):
        pause = backoff.next()
    assert pause == BACKOFF_CAP


def test_limiter_lets_the_first_changes_through_then_one_per_interval():
    limiter = RefreshLimiter(2.0)
    assert [limiter.delay(100.0) for _ in range(5)] == [0, 0, 0, 0, 0]
    assert limiter.delay(100.0) == 2.0
    assert limiter.delay(102.0) == 2.0
    assert limiter.delay(104.0) == 2.0


def test_limiter_recovers_while_it_is_quiet():
    limiter = RefreshLimiter(1.0)
    for _ in range(6):
        limiter.delay(0.0)
    assert limiter.delay(1000.0) == 0.0
    assert [limiter.delay(1000.0) for _ in range(5)] == [0, 0, 0, 0, 1.0]


def test_limiter_bounds_endless_churn():
    limiter, now, refreshes = RefreshLimiter(1.0), 0.0, 0
    while now < 60:
        now += limiter.delay(now) + 0.001  # the next change comes a millisecond later
        refreshes += 1
    assert 60 <= refreshes <= 66


def test_limiter_can_be_off():
    limiter = RefreshLimiter(0)
    assert [limiter.delay(0.0) for _ in range(100)] == [0] * 100


def test_an_empty_answer_is_believed_at_once_if_nothing_was_known():
    guard = EmptyGuard(10)
    assert guard.accepts(empty=True, known=False, now=0)
    assert guard.remaining(0) is None


def test_an_empty_answer_after_instances_is_believed_only_after_the_grace():
    guard = EmptyGuard(10)
    assert not guard.accepts(empty=True, known=True, now=100)
    assert guard.remaining(100) == 10
    assert not guard.accepts(empty=True, known=True, now=109.9)
    assert guard.remaining(109.9) == pytest.approx(0.1)
    assert guard.accepts(empty=True, known=True, now=110)
    assert guard.remaining(110) is None


def test_instances_that_come_back_within_the_grace_start_it_anew():
    guard = EmptyGuard(10)
    assert not guard.accepts(empty=True, known=True, now=0)
    assert guard.accepts(empty=False, known=True, now=5)
    assert guard.remaining(5) is None
    assert not guard.accepts(empty=True, known=True, now=11)
    assert guard.remaining(11) == 10


def test_no_grace_means_at_once():
    assert EmptyGuard(0).accepts(empty=True, known=True, now=0)


@pytest.mark.parametrize(("recent", "expected"), [(0, 0), (15, 0), (16, 0.01), (115, 1.0), (315, 3.0)])
def test_only_many_first_queries_are_spread(recent, expected):
    assert first_delay(recent, lambda: 1.0) == pytest.approx(expected)
    assert first_delay(recent, lambda: 0.0) == 0
