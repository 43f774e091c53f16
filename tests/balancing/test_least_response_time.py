from __future__ import annotations

import heapq
import math
from collections import Counter
from itertools import count, pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.balancing import LeastResponseTime
from meshlb.balancing.least_response_time import LeastResponseTimePicker, response_time_cost, scale_to_mean
from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick, shares


def call(picker: Any, clock: FakeClock) -> FakeCandidate:
    """What the node does when a lease begins."""
    picked = pick(picker)
    picked.in_flight += 1
    picked.last_picked = clock.now
    return picked


def answer(picked: FakeCandidate, clock: FakeClock, latency: float) -> None:
    picked.in_flight -= 1
    picked.latency.observe(latency, clock.now)


def test_the_faster_of_two_is_picked_until_its_queue_outweighs_its_speed() -> None:
    members = candidates(2, latency=0.1)
    members[0].latency.observe(0.31, 0.0)
    picker = build(LeastResponseTime(), members)
    assert pick(picker) is members[1]
    members[1].in_flight = 2  # 0.1 * 3 against 0.31: a tie within 10 %, neither ever picked
    members[1].last_picked = 0.0
    assert pick(picker) is members[0]
    members[1].in_flight = 4
    assert pick(picker) is members[0]


def test_near_equal_costs_go_round_by_the_last_pick() -> None:
    members = candidates(2, latency=0.1)
    members[0].latency.observe(0.105, 0.0)
    clock = FakeClock()
    picker = build(LeastResponseTime(), members, clock=clock)
    picks = []
    for step in range(10):
        clock.now = step * 1e-4
        picks.append(call(picker, clock))
        picks[-1].in_flight -= 1
    assert all(a is not b for a, b in pairwise(picks))


def test_below_the_floor_latency_does_not_count_and_calls_in_flight_do() -> None:
    members = candidates(2, latency=0.0001)
    members[0].latency.observe(0.0009, 0.0)
    members[0].last_picked = -5.0
    members[1].last_picked = 0.0
    picker = build(LeastResponseTime(), members)
    assert pick(picker) is members[0]
    members[0].in_flight = 1
    assert pick(picker) is members[1]
    assert pick(build(LeastResponseTime(tie_floor=0.0, force_pick_after=None), members)) is members[1]


def test_failing_fast_attracts_nothing() -> None:
    members = candidates(2, latency=0.05)
    members[0].latency.penalize(0.0)
    members[0].latency.observe(0.05, 0.0)
    members[0].latency.penalize(0.0)
    picker = build(LeastResponseTime(), members)
    members[1].in_flight = 20
    assert pick(picker) is members[1]


def test_a_hung_endpoint_is_seen_before_it_answers() -> None:
    members = candidates(2, latency=0.01)
    members[0].in_flight = members[1].in_flight = 1
    members[0].oldest = 0.5
    members[1].oldest = 0.005
    assert shares(build(LeastResponseTime(force_pick_after=None), members), 50) == {members[1]: 50}


def test_an_endpoint_without_history_is_probed_at_once_and_only_once() -> None:
    members = candidates(3, latency=0.01)
    fresh = FakeCandidate(candidates(4)[3].endpoint)
    clock = FakeClock(1.0)
    picker = build(LeastResponseTime(), [*members, fresh], clock=clock)
    counts: Counter[FakeCandidate] = Counter()
    for _ in range(1000):  # all at once: no answer in between
        counts[call(picker, clock)] += 1
    assert counts[fresh] == 1
    clock.now = 1.5
    answer(fresh, clock, 0.01)
    for _ in range(100):
        counts[call(picker, clock)] += 1
    assert counts[fresh] > 30


def test_when_all_are_unknown_a_burst_is_spread_evenly() -> None:
    members = candidates(10)
    clock = FakeClock()
    picker = build(LeastResponseTime(), members, clock=clock)
    for _ in range(1000):
        call(picker, clock)
    assert max(member.in_flight for member in members) <= 105


def test_a_loser_is_tried_again_after_a_second_once() -> None:
    members = candidates(2, latency=0.01)
    slow, fast = members
    slow.latency.observe(1.0, 0.0)
    clock = FakeClock()
    slow.last_picked = 0.0
    picker = build(LeastResponseTime(), members, clock=clock)
    picked = []
    for step in range(250):
        clock.now = step * 0.01
        got = call(picker, clock)
        picked.append(got)
        if got is fast:
            answer(got, clock, 0.01)
    assert [step for step, got in enumerate(picked) if got is slow] == [101]  # still unanswered: no second one
    answer(slow, clock, 0.01)  # it has answered: a second later it may be tried again
    clock.now = fast.last_picked = clock.now + 1.01
    assert pick(picker) is slow


def test_at_low_traffic_forced_picks_do_not_turn_the_order_round() -> None:
    members = candidates(2, latency=0.01)
    slow = members[0]
    clock = FakeClock()
    picker = build(LeastResponseTime(), members, clock=clock)
    counts: Counter[FakeCandidate] = Counter()
    for step in range(400):  # a call in three seconds
        clock.now = step * 3.0
        got = call(picker, clock)
        counts[got] += 1
        answer(got, clock, 2.0 if got is slow else 0.01)
    assert 0 < counts[slow] <= 60


def test_a_retry_after_is_waited_for() -> None:
    members = candidates(2, latency=0.01)
    busy, other = members
    clock = FakeClock(100.0)
    busy.latency.penalize(100.0, 30.0)
    busy.last_picked = 100.0
    picker = build(LeastResponseTime(), members, clock=clock)
    for now, expected in ((102.0, other), (129.0, other), (130.5, busy)):
        clock.now = other.last_picked = now
        assert pick(picker) is expected
    busy.latency.observe(0.01, 100.0)
    busy.latency.penalize(100.0)  # no hint: a second is enough
    clock.now = other.last_picked = 102.0
    assert pick(picker) is busy


def test_forced_picks_can_be_switched_off() -> None:
    members = candidates(2, latency=0.01)
    members[0].latency.observe(1.0, 0.0)
    members[0].last_picked = 0.0
    members[1].last_picked = 50.0
    clock = FakeClock(50.0)
    assert pick(build(LeastResponseTime(), members, clock=clock)) is members[0]
    assert pick(build(LeastResponseTime(force_pick_after=None), members, clock=clock)) is members[1]


@pytest.mark.parametrize("in_flight", [1, 200])
def test_shares_follow_weights_at_every_load(in_flight: int) -> None:
    """A closed loop of equal servers: one call at a time, and two hundred."""
    weights = [1.0, 2.0, 5.0]
    members = candidates(3, weights)
    clock = FakeClock()
    picker = build(LeastResponseTime(), members, clock=clock)
    random = Random(7)
    running: list[tuple[float, int, float, FakeCandidate]] = []
    counts: Counter[FakeCandidate] = Counter()
    sequence = count()
    for _ in range(16_000):
        if len(running) >= in_flight:
            clock.now, _, began, done = heapq.heappop(running)
            answer(done, clock, clock.now - began)
        got = call(picker, clock)
        counts[got] += 1
        heapq.heappush(running, (clock.now + random.uniform(0.009, 0.011), next(sequence), clock.now, got))
    assert [counts[member] for member in members] == pytest.approx([2000, 4000, 10_000], rel=0.12)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.floats(1e-4, 10), st.floats(0, 5), st.booleans(), st.booleans(), st.floats(0, 3)
        ),
        min_size=2,
        max_size=2,
    ),
    st.sampled_from([(1.0, 1.0), (1.0, 3.0)]),
)
def test_the_written_out_cost_of_a_pick_is_the_cost_function(
    states: list[tuple[int, float, float, bool, bool, float]], weights: tuple[float, float]
) -> None:
    members = candidates(2, weights)
    for member, (in_flight, latency, stamp, known, failed, age) in zip(members, states, strict=True):
        member.in_flight = in_flight
        member.oldest = age
        if known:
            member.latency.observe(latency, stamp)
        if failed:
            member.latency.penalize(stamp)
    policy = LeastResponseTime(force_pick_after=None, tie=0.0)
    picked = pick(build(policy, members, clock=FakeClock(5.0)))
    scaled = scale_to_mean(weights)
    costs = {
        member: response_time_cost(member, weight, 5.0, policy.tie_floor)
        for member, weight in zip(members, scaled, strict=True)
    }
    assert costs[picked] <= min(costs.values()) * (1 + 1e-9)


def test_policy_options_reach_the_estimators() -> None:
    members = candidates(2)
    build(LeastResponseTime(decay=3.0, peak=False), members)
    assert [(member.latency.decay, member.latency.peak) for member in members] == [(3.0, False)] * 2


def test_none_one_and_excluded() -> None:
    assert build(LeastResponseTime(), []).pick(NO_CONTEXT) is None
    members = candidates(3, latency=0.01)
    assert pick(build(LeastResponseTime(), members[:1])) is members[0]
    members[1].latency.observe(9.0, 0.0)
    picker = build(LeastResponseTime(force_pick_after=None), members)
    assert isinstance(picker, LeastResponseTimePicker)
    assert {pick(picker, excluded={members[0]}) for _ in range(20)} == {members[2]}
    assert pick(picker, excluded={members[0], members[2]}) is members[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decay", 0), ("decay", -1), ("decay", math.nan), ("decay", "10s"), ("peak", 1), ("tie", -0.1), ("tie", 2),
        ("tie_floor", -1), ("tie_floor", math.inf), ("force_pick_after", 0), ("force_pick_after", True),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"LeastResponseTime\.{field}"):
        LeastResponseTime(**{field: value})
