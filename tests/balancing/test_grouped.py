from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from meshlb.balancing import PolicyEnvironment, resolve_policy
from meshlb.balancing.grouped import GroupedPicker
from meshlb.balancing.orca import LoadReport
from meshlb.model import NO_CONTEXT, CallContext
from tests.balancing.fakes import FakeCandidate, FakeClock, candidates


@dataclass
class Part:
    name: str
    tier: int
    share: float
    members: list[FakeCandidate]


def grouped(
    shares: dict[str, float],
    *,
    size: int = 3,
    policy: str = "round_robin",
    tiers: list[int] | None = None,
    previous: Any = None,
) -> tuple[GroupedPicker[FakeCandidate], list[Part]]:
    everybody = candidates(size * len(shares))
    parts = [
        Part(name, i if tiers is None else tiers[i], share, everybody[i * size : (i + 1) * size])
        for i, (name, share) in enumerate(shares.items())
    ]
    environment = PolicyEnvironment("orders", FakeClock(), Random(1))
    made = resolve_policy(policy)
    pickers = [made.build(part.members, environment, None) for part in parts]
    by_key = getattr(made, "uses_key", False)
    return GroupedPicker(parts, pickers, environment, previous, by_key=by_key), parts


def part_of(parts: list[Part], candidate: FakeCandidate | None) -> str:
    return next(part.name for part in parts if candidate in part.members)


@pytest.mark.parametrize("shares", [{"a": 0.7, "b": 0.3}, {"a": 1, "b": 2, "c": 7}, {"a": 0.0, "b": 0.01, "c": 0.99}])
def test_shares_are_exact_within_a_few_calls(shares: dict[str, float]) -> None:
    picker, parts = grouped(shares)
    total = sum(shares.values())
    counts: Counter[str] = Counter()
    for n in range(1, 3001):
        counts[part_of(parts, picker.pick(NO_CONTEXT))] += 1
        if n % 100 == 0:
            assert all(abs(counts[name] - n * share / total) <= 4 for name, share in shares.items())
    for part in parts:  # and evenly within each
        assert part.share or counts[part.name] == 0


def test_the_turn_goes_on_in_the_next_picker() -> None:
    first, _ = grouped({"a": 0.5, "b": 0.5})
    second, _ = grouped({"a": 0.5, "b": 0.5}, previous=first)
    assert second.turn is first.turn


def test_one_group_with_all_of_it_and_one_to_fall_back_to() -> None:
    picker, (a, b) = grouped({"a": 1.0, "b": 0.0})
    assert {picker.pick(NO_CONTEXT) for _ in range(30)} == set(a.members)
    # A retry goes to the others of the tier, then to the next tier.
    tried: list[FakeCandidate] = []
    for _ in range(6):
        picked = picker.pick(CallContext(excluded=tuple(tried)))
        assert picked is not None
        tried.append(picked)
    assert set(tried[:3]) == set(a.members)
    assert set(tried[3:]) == set(b.members)
    assert picker.pick(CallContext(excluded=tuple(tried))) is None


def test_a_retry_stays_in_the_tier_of_what_was_tried() -> None:
    picker, (a, b, c, d) = grouped({"a": 0.4, "b": 0.3, "c": 0.3, "d": 0.0}, size=1, tiers=[0, 1, 1, 2])
    order = [b.members[0]]
    for _ in range(3):
        picked = picker.pick(CallContext(excluded=tuple(order)))
        assert picked is not None
        order.append(picked)
        if picked in a.members:
            break
    # First its own tier, then the tiers behind it, then those before it.
    assert order[:3] == [b.members[0], c.members[0], d.members[0]]
    assert picker.pick(CallContext(excluded=(b.members[0], c.members[0], d.members[0]))) is a.members[0]
    stranger = candidates(1)[0]
    assert picker.pick(CallContext(excluded=(stranger,))) is not None


def test_a_key_stays_in_its_group_and_few_move_with_the_shares() -> None:
    keys = [f"user-{i}" for i in range(2000)]

    def placed(shares: dict[str, float]) -> dict[str, str]:
        picker, parts = grouped(shares, policy="consistent_hash")
        found = {key: part_of(parts, picker.pick(CallContext(key))) for key in keys}
        assert found == {key: part_of(parts, picker.pick(CallContext(key))) for key in keys}
        return found

    before, after = placed({"a": 0.5, "b": 0.5}), placed({"a": 0.6, "b": 0.4})
    assert 900 < Counter(before.values())["a"] < 1100
    moved = [key for key in keys if before[key] != after[key]]
    assert all(before[key] == "b" for key in moved)
    assert 100 < len(moved) < 300
    # Within a group the keys still go to everybody.
    picker, parts = grouped({"a": 0.1, "b": 0.9}, policy="consistent_hash", size=4)
    reached = Counter(picker.pick(CallContext(key)) for key in keys)
    assert set(reached) == {member for part in parts for member in part.members}


def test_a_policy_that_ignores_keys_takes_turns() -> None:
    picker, parts = grouped({"a": 0.5, "b": 0.5})
    assert len({part_of(parts, picker.pick(CallContext("always the same"))) for _ in range(10)}) == 2


def test_reports_and_probes_go_to_the_groups_own_picker() -> None:
    picker, (a, b) = grouped({"a": 1.0, "b": 0.0}, policy="prequal")
    report = LoadReport(named_metrics={"meshlb.in_flight": 3.0})
    picker.observe_report(b.members[0], report)
    picker.observe_probe(a.members[0], None)
    picker.observe_report(candidates(1)[0], report)  # of an endpoint that has left
    for _ in range(50):
        picker.pick(NO_CONTEXT)
    assert set(picker.probes_wanted()) <= set(a.members)
    plain, parts = grouped({"a": 0.5, "b": 0.5})
    assert plain.probes_wanted() == []
    plain.observe_report(parts[0].members[0], report)


def test_a_group_that_offers_nobody_passes_the_call_on() -> None:
    class Nobody:
        def pick(self, call: CallContext) -> None:
            return None

    everybody = candidates(2)
    parts = [Part("a", 0, 1.0, everybody[:1]), Part("b", 1, 0.0, everybody[1:])]
    environment = PolicyEnvironment("orders", FakeClock(), Random(1))
    other = resolve_policy("round_robin").build(everybody[1:], environment, None)
    picker: GroupedPicker[FakeCandidate] = GroupedPicker(parts, [Nobody(), other], environment, None, by_key=False)
    assert picker.pick(NO_CONTEXT) is everybody[1]
