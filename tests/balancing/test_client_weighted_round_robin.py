from __future__ import annotations

import threading
from typing import Any

import pytest

from meshlb.balancing import ClientWeightedRoundRobin
from meshlb.balancing.client_weighted_round_robin import ReportedWeightPicker
from meshlb.balancing.orca import LoadReport
from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick, shares


def reporting(
    members: list[FakeCandidate], clock: FakeClock, previous: Any = None, **options: Any
) -> ReportedWeightPicker[FakeCandidate]:
    picker = build(ClientWeightedRoundRobin(**options), members, clock=clock, previous=previous)
    assert isinstance(picker, ReportedWeightPicker)
    return picker


def report(picker: ReportedWeightPicker[FakeCandidate], members: list[FakeCandidate], *utilizations: float) -> None:
    for member, utilization in zip(members, utilizations, strict=False):
        picker.observe_report(member, LoadReport(rps_fractional=100, cpu_utilization=utilization))


def test_reports_count_after_the_blackout_and_are_forgotten_after_the_expiration() -> None:
    clock, members = FakeClock(1000.0), candidates(3)
    picker = reporting(members, clock)
    for second in range(12):
        clock.now = 1000.0 + second
        report(picker, members, 0.2, 0.4, 0.4)
        counts = shares(picker, 400)
        if second < 10:
            assert [counts[member] for member in members] == pytest.approx([133, 133, 133], abs=3)
    assert [counts[member] for member in members] == pytest.approx([200, 100, 100], abs=3)
    clock.now += 181
    counts = shares(picker, 300)
    assert [counts[member] for member in members] == pytest.approx([100, 100, 100], abs=3)


def test_an_unknown_weight_is_the_mean_and_a_single_known_one_counts_for_nothing() -> None:
    clock, members = FakeClock(), candidates(3, [1.0, 1.0, 2.0])
    picker = reporting(members, clock, blackout_period=0)
    report(picker, members, 0.25)
    clock.now += 1
    report(picker, members, 0.25)
    counts = shares(picker, 400)
    assert [counts[member] for member in members] == pytest.approx([100, 100, 200], abs=3)  # the registry's
    report(picker, members, 0.25, 0.75)
    clock.now += 1
    report(picker, members, 0.25, 0.75)
    counts = shares(picker, 600)  # 400, 133 and their mean 267
    assert [counts[member] for member in members] == pytest.approx([300, 100, 200], abs=3)


def test_weights_change_once_per_update_period() -> None:
    clock, members = FakeClock(), candidates(2)
    picker = reporting(members, clock, blackout_period=0, update_period=5.0)
    clock.now = 4.9
    report(picker, members, 0.2, 0.8)
    assert shares(picker, 100)[members[0]] == pytest.approx(50, abs=1)
    clock.now = 5.0
    report(picker, members, 0.2, 0.8)
    assert shares(picker, 100)[members[0]] == pytest.approx(80, abs=1)


def test_weights_survive_a_change_of_the_set() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = reporting(members, clock, blackout_period=0)
    report(picker, members, 0.2, 0.4, 0.8)
    picker = reporting(members[:2], clock, previous=picker, blackout_period=0)
    counts = shares(picker, 300)
    assert counts[members[0]] == pytest.approx(200, abs=2)
    picker = reporting(members, clock, previous=picker, blackout_period=0)  # the third comes back
    assert shares(picker, 700)[members[2]] == pytest.approx(100, abs=2)
    clock.now = 1000.0
    picker = reporting(members[:2], clock, previous=picker, blackout_period=0)
    assert len(picker.weights) == 2  # and one that stays away is forgotten


def test_one_that_comes_back_begins_its_blackout_anew() -> None:
    """gRFC A58: when an endpoint becomes ready again, what it reports first is the load of its warm-up."""
    clock, members = FakeClock(), candidates(3)
    picker = reporting(members, clock)
    for _ in range(12):
        clock.now += 1
        report(picker, members, 0.2, 0.4, 0.8)
    assert shares(picker, 700)[members[2]] == pytest.approx(100, abs=2)
    picker = reporting(members[:2], clock, previous=picker)
    clock.now += 1
    picker = reporting(members, clock, previous=picker)  # after a breaker's time out: it is still what it was
    assert shares(picker, 700)[members[2]] == pytest.approx(100, abs=2)
    picker = reporting(members[:2], clock, previous=picker)
    clock.now += 10
    picker = reporting(members, clock, previous=picker)
    for _ in range(9):
        clock.now += 1
        report(picker, members, 0.2, 0.4, 0.8)
        assert shares(picker, 900)[members[2]] == pytest.approx(300, abs=3)  # unknown: the mean of the others
    for _ in range(2):
        clock.now += 1
        report(picker, members, 0.2, 0.4, 0.8)
    assert shares(picker, 700)[members[2]] == pytest.approx(100, abs=2)


def test_a_report_that_says_nothing_changes_nothing() -> None:
    clock, members = FakeClock(), candidates(2)
    picker = reporting(members, clock, blackout_period=0)
    picker.observe_report(members[0], LoadReport(cpu_utilization=0.5))
    picker.observe_report(members[0], LoadReport(rps_fractional=5))
    assert not picker.weights


def test_none_one_excluded() -> None:
    assert build(ClientWeightedRoundRobin(), []).pick(NO_CONTEXT) is None
    members = candidates(2)
    picker = build(ClientWeightedRoundRobin(), members[:1])
    assert pick(picker) is members[0]
    assert pick(build(ClientWeightedRoundRobin(), members), excluded={members[0]}) is members[1]


def test_threads_report_and_pick_at_once() -> None:
    clock, members = FakeClock(), candidates(4)
    picker = reporting(members, clock, blackout_period=0, update_period=0.1)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(500):
                clock.now += 0.01
                report(picker, members, 0.1, 0.2, 0.3, 0.4)
                assert pick(picker) in members
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counts = shares(picker, 2500)  # 1000, 500, 333, 250
    assert counts[members[0]] == pytest.approx(1200, abs=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blackout_period", -1), ("expiration_period", 0), ("update_period", 0.05), ("error_utilization_penalty", -1),
        ("metric_names", "cpu_utilization"), ("metric_names", (1,)),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"ClientWeightedRoundRobin\.{field}"):
        ClientWeightedRoundRobin(**{field: value})
