from __future__ import annotations

import heapq
import sys
import threading
import time
from collections import Counter
from itertools import count
from random import Random
from types import FrameType
from typing import Any

import pytest

from meshlb.balancing import LeastConnections, Policy, PolicyEnvironment, Prequal
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC, PrequalPicker
from meshlb.errors import ConfigError
from tests.balancing.fakes import FakeCandidate, FakeClock, build, candidates, pick


def probe(in_flight: float, latency: float) -> LoadReport:
    return LoadReport(named_metrics={IN_FLIGHT_METRIC: in_flight, LATENCY_METRIC: latency})


def prequal(members: list[FakeCandidate], clock: FakeClock, previous: Any = None) -> PrequalPicker[FakeCandidate]:
    picker = build(Prequal(explore=0), members, clock=clock, previous=previous)
    assert isinstance(picker, PrequalPicker)
    return picker


def test_reports_decide_and_without_them_local_counts_do() -> None:
    clock, members = FakeClock(), candidates(2)
    picker = prequal(members, clock)
    members[0].in_flight = 3
    assert pick(picker) is members[1]
    picker.observe_report(members[0], probe(1, 0.010))
    picker.observe_report(members[1], probe(1, 0.100))
    assert pick(picker) is members[0]
    clock.now = 1.1  # too old
    assert pick(picker) is members[1]
    picker.observe_report(members[0], LoadReport(cpu_utilization=0.1))
    assert not picker.pool.probes


def test_a_replica_that_fails_fast_is_not_in_the_pool() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = prequal(members, clock)
    for member, latency in zip(members, (0.001, 0.1, 0.2), strict=True):
        picker.observe_report(member, probe(0, latency))
    members[0].latency.penalize(0.0)
    assert all(pick(picker) is not members[0] for _ in range(10))
    picker.observe_report(members[0], probe(0, 0.001))
    assert all(held.replica is not members[0] for held in picker.pool.probes)


def test_probes_survive_a_change_of_the_set_and_leave_with_their_replica() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = prequal(members, clock)
    for member in members:
        picker.observe_report(member, probe(0, 0.1))
    picker = prequal(members[1:], clock, previous=picker)
    assert {held.replica for held in picker.pool.probes} == set(members[1:])
    picker.observe_report(members[0], probe(0, 0.1))  # a late answer of the one that left
    assert len(picker.pool.probes) == 2


def test_a_retry_goes_elsewhere() -> None:
    clock, members = FakeClock(), candidates(3)
    picker = prequal(members, clock)
    for _ in range(20):
        for member in members:
            picker.observe_report(member, probe(0, 0.1))
        assert pick(picker, excluded={members[0], members[2]}) is members[1]


def test_threads_pick_and_report_at_once() -> None:
    clock, members = FakeClock(), candidates(10)
    picker = build(Prequal(), members, clock=clock)
    assert isinstance(picker, PrequalPicker)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(300):
                picker.observe_report(pick(picker), probe(i % 5, 0.01))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(picker.pool.probes) <= 16


def test_every_probe_is_used_once_however_many_threads_pick() -> None:
    members = candidates(20 + 4 * 40)
    # Draws of 0.9: none is dropped but those that are used.
    environment = PolicyEnvironment("orders", FakeClock(), Fixed(0.9))
    picker = Prequal(explore=0, pool_size=1000).build(members, environment, None)
    assert isinstance(picker, PrequalPicker)
    for member in members[:20]:
        picker.observe_report(member, probe(0, 0.01))
    picked: list[FakeCandidate] = []
    start = threading.Barrier(4)

    def work(mine: list[FakeCandidate]) -> None:
        start.wait()
        sys.settrace(let_others_run)
        for i, member in enumerate(mine):
            picker.observe_report(member, probe(0, 0.01))
            if i % 4 == 3:
                picked.extend([pick(picker) for _ in range(4)])

    threads = [threading.Thread(target=work, args=(members[20 + i :: 4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(picked) == len(set(picked)) == 160
    assert {held.replica for held in picker.probes()} == set(members) - set(picked)


def test_a_pick_takes_its_probe_and_its_part_of_the_others_along() -> None:
    members = candidates(8)
    picker = Prequal(explore=0).build(members, PolicyEnvironment("orders", FakeClock(), Fixed(0.1)), None)
    assert isinstance(picker, PrequalPicker)
    for i, member in enumerate(members):
        picker.observe_report(member, probe(0, 0.1 + (i - 3) ** 2))
    assert [pick(picker), pick(picker)] == [members[3], members[2]]
    # With these draws each pick drops one: first the oldest, then the worst.
    assert [held.replica for held in picker.probes()] == [members[i] for i in (1, 4, 5, 6)]


def test_what_lies_ready_is_chosen_anew_when_a_probe_gets_too_old_or_its_replica_fails() -> None:
    clock, members = FakeClock(), candidates(4)
    picker = build(Prequal(explore=0, quantile=0.5), members, clock=clock)
    assert isinstance(picker, PrequalPicker)
    # The fastest is hot as long as the first two, who are idle, are held.
    for member, held in zip(members, ((0, 0.4), (0, 0.3), (1, 0.1), (2, 0.2)), strict=True):
        picker.observe_report(member, probe(*held))
        clock.now += 0.1
    clock.now = 1.15  # the first two are too old
    assert pick(picker) is members[2]
    for member in members:
        picker.observe_report(member, probe(0, 0.1))
    members[0].latency.penalize(clock.now)
    assert pick(picker) is not members[0]
    assert all(held.replica is not members[0] for held in picker.probes())


def let_others_run(frame: FrameType, event: str, _: object) -> Any:
    """A trace function that lets go of the interpreter's lock before every instruction of a picker."""
    if not frame.f_code.co_filename.endswith("balancing/prequal.py"):
        return None
    frame.f_trace_opcodes = True
    if event == "opcode":
        time.sleep(0)
    return let_others_run


class Fixed(Random):
    """Draws the same number always."""

    def __init__(self, drawn: float) -> None:
        super().__init__(0)
        self.drawn = drawn

    def random(self) -> float:
        return self.drawn


def p99(policy: Policy, clients: int = 20) -> tuple[float, Counter[int]]:
    """Many clients on ten servers, two of which somebody else keeps busy: a call takes 10 ms for each call there."""
    clock, random, sequence = FakeClock(), Random(4), count()
    servers = [0] * 10
    views = [candidates(10) for _ in range(clients)]
    pickers = [build(policy, view, seed=i, clock=clock) for i, view in enumerate(views)]
    pending: list[tuple[float, int, int, int, float]] = []
    arrival, latencies = 0.0, []
    chosen: Counter[int] = Counter()
    for _ in range(8000):
        arrival += random.expovariate(350.0)
        while pending and pending[0][0] <= arrival:
            clock.now, _, client, server, began = heapq.heappop(pending)
            servers[server] -= 1
            candidate = views[client][server]
            candidate.in_flight -= 1
            candidate.latency.observe(clock.now - began, clock.now)
            latencies.append(clock.now - began)
            if isinstance(picker := pickers[client], PrequalPicker):
                foreign = 4 if server < 2 else 0
                picker.observe_report(candidate, probe(servers[server] + foreign, clock.now - began))
        clock.now = arrival
        client = random.randrange(clients)
        picked = pick(pickers[client])
        server = views[client].index(picked)
        chosen[server] += 1
        servers[server] += 1
        picked.in_flight += 1
        picked.last_picked = arrival
        took = random.expovariate(1.0) * 0.010 * (servers[server] + (4 if server < 2 else 0))
        heapq.heappush(pending, (arrival + took, next(sequence), client, server, arrival))
    latencies.sort()
    return latencies[int(len(latencies) * 0.99)], chosen


def test_prequal_avoids_servers_that_others_keep_busy_where_local_counts_cannot_see_them() -> None:
    by_reports, chosen = p99(Prequal())
    by_counts, blind = p99(LeastConnections())
    assert by_reports < by_counts
    assert chosen[0] + chosen[1] < blind[0] + blind[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pool_size", 1),
        ("pool_size", 2.5),
        ("max_age", 0),
        ("quantile", 1.1),
        ("quantile", -0.1),
        ("explore", 2),
        ("reuse", 0.5),
    ],
)
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Prequal\.{field}"):
        Prequal(**{field: value})
