from __future__ import annotations

import sys
import threading
from collections import Counter
from itertools import pairwise

from meshlb.balancing import RoundRobin
from meshlb.model import NO_CONTEXT
from tests.balancing.fakes import FakeCandidate, build, candidates, pick, shares


def test_every_endpoint_in_turn() -> None:
    members = candidates(3)
    picker = build(RoundRobin(), members)
    picks = [members.index(pick(picker)) for _ in range(7)]
    assert all((b - a) % 3 == 1 for a, b in pairwise(picks))


def test_clients_start_at_different_endpoints() -> None:
    members = candidates(10)
    assert len({pick(build(RoundRobin(), members, seed=seed)) for seed in range(100)}) == 10


def test_the_turn_goes_on_when_the_set_changes() -> None:
    members = candidates(1000)
    old = build(RoundRobin(), members)
    counts: Counter[FakeCandidate] = Counter()
    for _ in range(2000):  # a change before every second pick: a restart would pick the same two for ever
        counts.update([pick(old), pick(old)])
        old = build(RoundRobin(), members, previous=old)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_counter_survives_an_empty_set_and_another_policys_picker_is_no_obstacle() -> None:
    members = candidates(3)
    first = build(RoundRobin(), members)
    before = members.index(pick(first))
    empty = build(RoundRobin(), [], previous=first)
    assert empty.pick(NO_CONTEXT) is None
    assert members.index(pick(build(RoundRobin(), members, previous=empty))) == (before + 1) % 3

    class Foreign:
        turn = "left"

        def pick(self, call: object) -> FakeCandidate:
            return members[0]

    assert pick(build(RoundRobin(), members, previous=Foreign())) in members


def test_the_share_of_an_excluded_endpoint_goes_to_all_others() -> None:
    members = candidates(5)
    picker = build(RoundRobin(), members)
    counts: Counter[FakeCandidate] = Counter()
    for _ in range(1000):
        first = pick(picker)
        counts[pick(picker, excluded={first}) if first is members[0] else first] += 1
    assert counts[members[0]] == 0
    assert max(counts[member] for member in members[1:]) <= 252


def test_threads_share_one_turn_without_losing_any() -> None:
    members = candidates(7)
    picker = build(RoundRobin(), members)
    counts: list[Counter[FakeCandidate]] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=lambda: counts.append(shares(picker, 700))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert set(sum(counts, Counter()).values()) == {800}
