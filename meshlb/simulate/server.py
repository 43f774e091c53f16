"""A simulated server: a queue before a number of workers, and what can go wrong with it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from meshlb.model import OK, Outcome, OutcomeKind
from meshlb.server import LoadMeter

if TYPE_CHECKING:
    from meshlb.balancing.orca import LoadReport
    from meshlb.lease import Lease
    from meshlb.model import Endpoint
    from meshlb.server.meter import RequestInFlight
    from meshlb.simulate.client import SimulatedCall
    from meshlb.simulate.timeline import Timeline

FAILING_TAKES: Final = 0.001
"""Seconds in which a failing server answers: much faster than any that works, which is what makes it attractive."""

BROKEN: Final = Outcome(OutcomeKind.FAILURE, retryable=True, reason="503")
"""What a failing server answers, in the adapters' own words (``meshlb._http.classify``)."""


class Attempt:
    """One request on its way: the call that it is an attempt of, and where it stands at its server."""

    __slots__ = ("call", "finish", "lease", "request", "server")

    def __init__(self, call: SimulatedCall, lease: Lease, server: SimulatedServer) -> None:
        self.call = call
        self.lease = lease
        self.server = server
        self.finish = 0.0
        """When the worker is done with it, as things stand."""
        self.request: RequestInFlight | None = None


class SimulatedServer:
    """Serves in order of arrival, ``cores`` requests at once, ``speed`` seconds of work a second on each.

    A client that gives up a request takes it out of the queue; what a worker has begun it does to the end. ``metered``:
    a real LoadMeter counts, and each response carries its report.
    """

    __slots__ = ("_busy", "_busy_since", "_busy_time", "_failing", "_frozen", "_meter", "_queue", "_running",
                 "_timeline", "attempts", "capacity", "cores", "endpoint", "speed")  # fmt: skip

    def __init__(self, endpoint: Endpoint, timeline: Timeline, *, cores: int, speed: float, metered: bool) -> None:
        self.endpoint = endpoint
        self.cores = cores
        self.speed = speed
        self.capacity = cores * speed
        """Seconds of work a second, when nothing has happened to it."""
        self.attempts = 0
        """Requests that have arrived since the measurement began."""
        self._timeline = timeline
        self._queue: deque[Attempt] = deque()
        self._running: dict[Attempt, None] = {}  # a set that keeps its order, or a run would not be the same every time
        self._busy = 0
        self._busy_since = timeline.now
        self._busy_time = 0.0
        self._failing = False
        self._frozen = False
        self._meter: LoadMeter | None = None
        if metered:
            self._meter = LoadMeter(cores=cores, clock=timeline, cpu_time=self._worked)

    # -- requests ----------------------------------------------------------------------------------------------

    def receive(self, attempt: Attempt) -> None:
        """Take in a request. What comes of it the call is told (``answered``), if anything."""
        self.attempts += 1
        if self._meter is not None:
            attempt.request = self._meter.begin()
        if self._failing:
            self._timeline.at(self._timeline.now + FAILING_TAKES, self._fail, attempt)
        elif self._frozen or self._busy >= self.cores:
            self._queue.append(attempt)
        else:
            self._start(attempt)

    def _start(self, attempt: Attempt) -> None:
        self._count_busy(1)
        self._running[attempt] = None
        attempt.finish = self._timeline.now + attempt.call.work / self.speed
        self._timeline.at(attempt.finish, self._finish, attempt)

    def _finish(self, attempt: Attempt) -> None:
        if attempt.finish != self._timeline.now or attempt not in self._running:
            return  # the speed has changed meanwhile, or everything stands still
        self._count_busy(-1)
        del self._running[attempt]
        self._answer(attempt, OK)
        while self._queue and self._busy < self.cores:
            following = self._queue.popleft()
            if following.call.attempt is following:
                self._start(following)
            elif following.request is not None:
                following.request.given_up()

    def _fail(self, attempt: Attempt) -> None:
        self._answer(attempt, BROKEN)

    def _answer(self, attempt: Attempt, outcome: Outcome) -> None:
        report = None
        request = attempt.request
        if request is not None:
            if outcome is OK:
                request.answered()
            report = request.report()
            request.finished(failed=outcome is not OK)
        attempt.call.answered(attempt, outcome, report)

    def probe(self) -> LoadReport | None:
        """The answer to an explicit probe; None if there is none."""
        return None if self._frozen or self._failing or self._meter is None else self._meter.report()

    # -- what happens to it ------------------------------------------------------------------------------------

    def change_speed(self, speed: float) -> None:
        """Work faster or slower from now on, on what is under way too."""
        now = self._timeline.now
        before, self.speed = self.speed, speed
        for attempt in self._running:
            attempt.finish = now + (attempt.finish - now) * before / speed
            self._timeline.at(attempt.finish, self._finish, attempt)

    def fail(self) -> None:
        """Answer every request from now on with an error, at once."""
        self._failing = True

    def freeze(self) -> None:
        """Accept requests and never answer any more."""
        self._frozen = True
        for attempt in self._running:
            attempt.finish = -1.0

    # -- the time that its workers were busy, as its meter sees it -----------------------------------------------

    def _worked(self) -> float:
        return self._busy_time + self._busy * (self._timeline.now - self._busy_since)

    def _count_busy(self, change: int) -> None:
        self._busy_time = self._worked()
        self._busy_since = self._timeline.now
        self._busy += change
