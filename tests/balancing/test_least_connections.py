from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from meshlb.balancing import LeastConnections
from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick, shares


def test_with_two_endpoints_the_busier_one_is_never_picked() -> None:
    members = candidates(2)
    members[0].in_flight = 1
    assert shares(build(LeastConnections(), members), 1000) == {members[1]: 1000}


@pytest.mark.parametrize("weights", [(), (3.0, 1.0, 1.0, 1.0, 1.0, 1.0)])
def test_the_busiest_endpoint_is_never_picked_since_two_different_ones_are_compared(weights: tuple[float, ...]) -> None:
    members = candidates(6, weights)
    members[0].in_flight = 100
    counts = shares(build(LeastConnections(), members), 5000)
    assert counts[members[0]] == 0
    assert all(counts[member] > 800 for member in members[1:])


def test_balls_in_bins() -> None:
    """n = m = 20,000: random leaves a bin with 8 balls or so, two choices one with 3 (ln n / ln ln n, log2 ln n)."""
    members = candidates(20_000)
    picker = build(LeastConnections(), members, seed=3)
    for _ in range(20_000):
        pick(picker).in_flight += 1
    assert max(member.in_flight for member in members) <= 4


@pytest.mark.parametrize("policy", [LeastConnections(), LeastConnections(choices=3), LeastConnections(full_scan=True)])
def test_weights_rule_the_shares_when_idle_and_the_calls_in_flight_when_loaded(policy: LeastConnections) -> None:
    weights = [1.0, 2.0, 5.0, 8.0]
    members = candidates(4, weights)
    picker = build(policy, members)
    idle = shares(picker, 16_000)
    assert [idle[member] for member in members] == pytest.approx([1000 * weight for weight in weights], rel=0.15)
    for _ in range(16_000):
        pick(picker).in_flight += 1
    loaded = [member.in_flight for member in members]
    assert loaded == pytest.approx([1000 * weight for weight in weights], rel=0.05)


def test_full_scan_finds_the_one_idle_endpoint_and_spreads_ties() -> None:
    members = candidates(100)
    for member in members:
        member.in_flight = 1
    members[57].in_flight = 0
    picker = build(LeastConnections(full_scan=True), members)
    assert pick(picker) is members[57]
    members[57].in_flight = 1
    counts = shares(picker, 4000)
    assert min(counts[member] for member in members) >= 15


@pytest.mark.parametrize("choices", [2, 3, 10])
def test_more_choices_find_the_idle_endpoint_more_often(choices: int) -> None:
    members = candidates(20)
    for member in members[1:]:
        member.in_flight = 1
    counts = shares(build(LeastConnections(choices=choices), members), 20_000)
    assert counts[members[0]] == pytest.approx(20_000 * choices / 20, rel=0.08)  # the chance to be among them


def test_a_retry_goes_elsewhere_and_still_to_the_less_busy() -> None:
    for weights in ((), (1.0, 2.0, 3.0, 4.0)):
        members = candidates(4, weights)
        members[1].in_flight = 50
        picker = build(LeastConnections(), members)
        counts = Counter(pick(picker, excluded={members[0]}) for _ in range(500))
        assert counts[members[0]] == counts[members[1]] == 0


def test_none_and_one() -> None:
    assert build(LeastConnections(), []).pick(NO_CONTEXT) is None
    members = candidates(1)
    assert pick(build(LeastConnections(), members)) is members[0]


@pytest.mark.parametrize("choices", [0, 1, 11, 2.0, True, "2", None])
def test_wrong_choices_are_refused(choices: Any) -> None:
    with pytest.raises(ConfigError, match=r"LeastConnections\.choices"):
        LeastConnections(choices=choices)


def test_wrong_full_scan_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LeastConnections\.full_scan"):
        LeastConnections(full_scan="yes")  # type: ignore[arg-type]


def test_an_endpoint_that_answers_slower_gets_less_in_a_closed_loop() -> None:
    members = candidates(3)
    picker = build(LeastConnections(), members)
    random = Random(5)
    running: list[tuple[float, FakeCandidate]] = []
    counts: Counter[FakeCandidate] = Counter()
    now = 0.0
    for _ in range(6000):
        if len(running) >= 12:
            running.sort(key=lambda entry: entry[0])
            now, done = running.pop(0)
            done.in_flight -= 1
        picked = pick(picker)
        picked.in_flight += 1
        counts[picked] += 1
        running.append((now + random.expovariate(1.0) * (4.0 if picked is members[0] else 1.0), picked))
    assert counts[members[0]] < 0.5 * counts[members[1]]


@pytest.mark.parametrize("policy", [LeastConnections(), LeastConnections(choices=3), LeastConnections(full_scan=True)])
@pytest.mark.parametrize("weights", [(), (2.0, 1.0, 1.0, 1.0)])
def test_an_endpoint_that_fails_fast_attracts_nothing_and_is_tried_again(
    policy: LeastConnections, weights: tuple[float, ...]
) -> None:
    members = candidates(4, weights)
    for member in members[1:]:
        member.in_flight = 5
    clock = FakeClock(100.0)
    members[0].latency.penalize(100.0)
    picker = build(policy, members, clock=clock)
    assert shares(picker, 200)[members[0]] == 0
    clock.now = 105.1
    assert shares(picker, 200)[members[0]] > 50
    for member in members:
        member.latency.penalize(clock.now)
    assert shares(picker, 200)[members[0]] > 50  # when all fail, it is the load that counts
