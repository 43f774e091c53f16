from __future__ import annotations

import pytest

from meshlb.model import OK, Endpoint, Outcome
from meshlb.simulate.server import BROKEN, FAILING_TAKES, Attempt, SimulatedServer
from meshlb.simulate.timeline import START, Timeline


class Caller:
    """What a server knows of a call."""

    def __init__(self, timeline: Timeline, work: float) -> None:
        self.timeline = timeline
        self.work = work
        self.attempt: Attempt | None = None
        self.ended: tuple[float, Outcome] | None = None
        self.report = None

    def answered(self, attempt: Attempt, outcome: Outcome, report: object) -> None:
        assert self.ended is None, "answered twice"
        self.ended = (round(self.timeline.now - START, 6), outcome)
        self.report = report


class World:
    def __init__(self, *, cores: int = 1, speed: float = 1.0, metered: bool = False) -> None:
        self.timeline = Timeline()
        endpoint = Endpoint("10.0.0.1", 80)
        self.server = SimulatedServer(endpoint, self.timeline, cores=cores, speed=speed, metered=metered)

    def send(self, work: float, at: float = 0.0) -> Caller:
        caller = Caller(self.timeline, work)
        caller.attempt = Attempt(caller, None, self.server)
        self.timeline.at(START + at, self.server.receive, caller.attempt)
        return caller

    def at(self, when: float, action, *argument: object) -> None:
        self.timeline.at(START + when, lambda _: action(*argument), None)


def test_requests_are_served_in_order_of_arrival():
    world = World()
    callers = [world.send(1.0), world.send(2.0), world.send(1.0, at=0.5)]
    world.timeline.run()
    assert [caller.ended for caller in callers] == [(1.0, OK), (3.0, OK), (4.0, OK)]


def test_several_cores_work_at_once_and_speed_divides_the_work():
    world = World(cores=2, speed=2.0)
    callers = [world.send(2.0) for _ in range(3)]
    world.timeline.run()
    assert [caller.ended for caller in callers] == [(1.0, OK), (1.0, OK), (2.0, OK)]


def test_a_change_of_speed_holds_for_what_is_under_way():
    world = World()
    caller = world.send(4.0)
    world.at(1.0, world.server.change_speed, 0.5)  # 3 are left, which take 6
    world.at(3.0, world.server.change_speed, 2.0)  # 2 are left, which take 1
    world.timeline.run()
    assert caller.ended == (4.0, OK)


def test_a_failing_server_answers_at_once_and_does_no_work():
    world = World()
    world.at(0.0, world.server.fail)
    caller = world.send(10.0, at=1.0)
    world.timeline.run()
    assert caller.ended == (1.0 + FAILING_TAKES, BROKEN)


def test_a_frozen_server_never_answers_not_even_what_it_had_begun():
    world = World()
    callers = [world.send(2.0), world.send(2.0), world.send(1.0, at=5.0)]
    world.at(1.0, world.server.freeze)
    world.timeline.run()
    assert [caller.ended for caller in callers] == [None, None, None]
    assert world.server.attempts == 3


def test_what_its_client_has_given_up_is_not_begun():
    world = World()
    first, given_up, last = world.send(2.0), world.send(5.0), world.send(1.0)
    world.at(1.0, setattr, given_up, "attempt", None)
    world.timeline.run()
    assert (first.ended, given_up.ended, last.ended) == ((2.0, OK), None, (3.0, OK))


def test_what_its_client_has_given_up_is_worked_on_to_the_end_if_it_was_begun():
    world = World()
    given_up, last = world.send(2.0), world.send(1.0)
    world.at(1.0, setattr, given_up, "attempt", None)
    world.timeline.run()
    assert last.ended == (3.0, OK)


def test_the_report_is_that_of_a_real_load_meter():
    world = World(cores=2, metered=True)
    callers = [world.send(1.0), world.send(1.5), world.send(1.0)]
    world.timeline.run()
    first, second, third = (caller.report for caller in callers)
    assert first.named_metrics == {"requests_in_flight": 2.0, "latency_seconds": 1.0}
    assert second.named_metrics["requests_in_flight"] == 1.0
    assert third.named_metrics["requests_in_flight"] == 0.0
    assert third.cpu_utilization == pytest.approx(3.5 / (2 * 2.0))
    assert third.rps_fractional == pytest.approx(1.0)  # two had ended when it was sampled, in two seconds


def test_a_server_without_a_meter_reports_nothing():
    world = World()
    caller = world.send(1.0)
    world.timeline.run()
    assert caller.report is None
    assert world.server.probe() is None


def test_a_frozen_server_answers_no_probe():
    world = World(metered=True)
    assert world.server.probe() is not None
    world.server.freeze()
    assert world.server.probe() is None
