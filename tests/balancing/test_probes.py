"""Whom to probe, and when: the rules, by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from meshlb.balancing import Prequal, Probes
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC, PrequalPicker
from meshlb.errors import ConfigError
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick


def report(in_flight: float = 0.0, latency: float | None = 0.01) -> LoadReport:
    named = {IN_FLIGHT_METRIC: in_flight}
    if latency is not None:
        named[LATENCY_METRIC] = latency
    return LoadReport(named_metrics=named)


def prequal(members: list[FakeCandidate], clock: FakeClock, previous: Any = None, **options: Any) -> Any:
    picker = build(Prequal(explore=0, **options), members, clock=clock, previous=previous)
    assert isinstance(picker, PrequalPicker)
    return picker


def test_nobody_is_probed_for_a_service_that_is_not_called() -> None:
    clock, members = FakeClock(), candidates(20)
    picker = prequal(members, clock)
    assert picker.probes_wanted() == []
    pick(picker)
    assert picker.probes_wanted()
    while clock.now < 9.9:
        clock.now += 0.5
        for member in picker.probes_wanted():
            picker.observe_probe(member, report())
        assert len({probe.replica for probe in picker.probes()}) >= 2  # the next call finds a choice
    clock.now = 10.6  # idle
    assert picker.probes_wanted() == []
    pick(picker)
    assert picker.probes_wanted()


def test_a_call_brings_three_probes_at_most_and_what_its_response_carried_is_one_of_them() -> None:
    clock, members = FakeClock(), candidates(100)
    picker = prequal(members, clock, pool_size=100)
    for _ in range(10):
        picker.observe_report(pick(picker), report())
    assert 15 <= len(picker.probes_wanted()) <= 20
    clock.now = 0.5
    assert len(picker.probes_wanted()) == 2  # no call: two, so that the next one finds a choice
    clock.now = 1.0
    for _ in range(4):
        pick(picker)
    asked = picker.probes_wanted()
    assert len(asked) == len(set(asked)) == 12


def test_a_pool_that_responses_keep_fresh_asks_nobody() -> None:
    clock, members = FakeClock(), candidates(10)
    picker = prequal(members, clock)
    for member in members * 3:
        pick(picker)
        picker.observe_report(member, report(latency=0.0))
    assert picker.probes_wanted() == []
    clock.now = 0.6  # old enough to be gone at the next look
    pick(picker)
    assert 3 <= len(picker.probes_wanted()) <= 8


def test_nobody_is_asked_twice_while_an_answer_may_come() -> None:
    clock, members = FakeClock(), candidates(4)
    picker = prequal(members, clock, probes=Probes(timeout=0.9))
    pick(picker)
    first = picker.probes_wanted()
    assert len(first) == 3
    pick(picker)
    clock.now = 0.5
    assert not set(first) & set(picker.probes_wanted())
    clock.now = 1.5  # nobody said that they failed, but they must have
    pick(picker)
    assert set(first) & set(picker.probes_wanted())


def test_servers_that_report_nothing_are_probed_ever_less() -> None:
    clock, members = FakeClock(), candidates(5)
    picker = prequal(members, clock)
    asked = []
    while clock.now < 3600:
        pick(picker)
        for member in picker.probes_wanted():
            asked.append(clock.now)
            picker.observe_probe(member, LoadReport(cpu_utilization=0.5) if len(asked) % 2 else None)
        clock.now += 0.5
    assert 5 * 8 < len(asked) < 5 * 40
    assert sum(at > 1800 for at in asked) <= 5 * 12
    assert picker.probes() == []


def test_a_report_ends_the_rest() -> None:
    clock, members = FakeClock(), candidates(2)
    picker = prequal(members, clock)
    for _ in range(6):
        picker.observe_probe(members[0], None)
    pick(picker)
    assert picker.probes_wanted() == [members[1]]
    picker.observe_report(members[0], report())
    clock.now = 2.0
    pick(picker)
    assert set(picker.probes_wanted()) == set(members)


def test_who_failed_last_is_not_probed() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = prequal(members, clock)
    members[0].latency.penalize(0.0)
    pick(picker)
    assert set(picker.probes_wanted()) == set(members[1:])


def test_an_idle_server_that_knows_no_latency_is_as_fast_as_the_usual_one() -> None:
    clock, members = FakeClock(), candidates(4)
    picker = prequal(members, clock)
    picker.observe_probe(members[0], report(0, None))
    assert [probe.latency for probe in picker.probes()] == [0.0]
    for member, latency in zip(members[1:], (0.3, 0.2, 0.1), strict=True):
        picker.observe_report(member, report(1, latency))
    picker.observe_probe(members[0], report(0, None))
    assert picker.probes()[-1].latency == 0.2
    assert picker.probes_wanted() == []  # it did report


def test_budget_and_rests_survive_a_change_of_the_set() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = prequal(members, clock)
    for _ in range(8):
        picker.observe_probe(members[0], None)
    pick(picker)
    asked = picker.probes_wanted()
    assert set(asked) == set(members[1:])
    picker = prequal(members[:2], clock, previous=picker)
    assert picker.probes_wanted() == []  # one rests, one was asked a moment ago
    clock.now = 2.0
    assert picker.probes_wanted() == [members[1]]
    picker.observe_probe(members[2], report())  # a late answer of the one that left
    assert picker.probes() == []


def test_none_at_all() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = prequal(members, clock, probes=None)
    pick(picker)
    assert picker.probes_wanted() == []
    picker = prequal(members[:1], clock)
    pick(picker)
    assert picker.probes_wanted() == []  # there is no choice


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate", 0), ("rate", 1001), ("interval", 0), ("timeout", -1), ("idle", 0), ("path", "probe"),
        ("path", "/a b"), ("path", 3), ("method", "a/B"), ("method", "/ü"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Probes\.{field}"):
        Probes(**{field: value})
    with pytest.raises(ConfigError, match=r"Prequal\.probes"):
        Prequal(probes=True)  # type: ignore[arg-type]
