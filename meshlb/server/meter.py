"""What a server knows of its own load."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from math import isfinite
from typing import Final, NamedTuple

from meshlb import control
from meshlb._validate import number, seconds
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC
from meshlb.errors import ConfigError
from meshlb.server.cores import available_cores
from meshlb.server.latencies import LatenciesByLoad, median

logger = logging.getLogger("meshlb.server")

SAMPLE_PERIOD: Final = 0.1
"""Seconds between two looks at the processor time, at least. A look costs about as much as a request's other figures
together, and clients renew their weights no more often (gRFC A58's floor)."""

DEFAULT_WINDOW: Final = 5.0
"""Seconds that rates are averaged over: a hundred requests at 20 per second, and short beside the ten seconds that
clients wait before they believe a weight."""


class _Sample(NamedTuple):
    at: float
    ended: int
    failed: int
    cpu: float


class _Rates(NamedTuple):
    cpu_utilization: float = 0.0
    application_utilization: float = 0.0
    rps: float = 0.0
    eps: float = 0.0


class LoadMeter:
    """Requests in flight, latency at that load, rates and utilization of this process. Safe from any thread.

    One meter may serve several middlewares and interceptors of a process; each makes its own otherwise. The figures are
    of one process: behind a port that several workers share, each response tells of the worker that gave it.

    * ``application_utilization``: called for the utilization that counts for more than the processor's, for instance
      the share of a connection pool in use: at least 0, and 1 means full (it may be exceeded). Called every 100 ms at
      most, on a request's thread; must not block. What it raises is logged, and no utilization reported.
    * ``cores``: processors that this process can use, which processor time is a share of. None: what affinity and
      control group allow. A service of one process whose work is all Python is held to one by the GIL: say 1, or
      machines of different sizes will seem to have different capacities.
    * ``window``: seconds that the rates and the utilization of the processor are averaged over.
    * ``clock`` (seconds, monotonic) and ``cpu_time`` (seconds of processor time so far) are for tests.

    Raises ConfigError naming the argument.
    """

    __slots__ = ("__weakref__", "_application", "_application_fails", "_clock", "_cores", "_cpu_time", "_dropped",
                 "_due", "_ended", "_failed", "_in_flight", "_latencies", "_lock", "_rates", "_samples", "_window",
                 "process")  # fmt: skip

    def __init__(
        self,
        *,
        application_utilization: Callable[[], float] | None = None,
        cores: float | None = None,
        window: float = DEFAULT_WINDOW,
        clock: Callable[[], float] = time.monotonic,
        cpu_time: Callable[[], float] = time.process_time,
    ) -> None:
        if application_utilization is not None and not callable(application_utilization):
            raise ConfigError(f"LoadMeter.application_utilization: {application_utilization!r} is not callable")
        if cores is not None:
            number("LoadMeter.cores", cores, above=0)
        seconds("LoadMeter.window", window)
        self._application = application_utilization
        self._cores = available_cores() if cores is None else cores
        self._window = window
        self._clock = clock
        self._cpu_time = cpu_time
        self.process = 0
        """Counts the forks between the process that made it and this one."""
        self._start_afresh()
        control.on_fork(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._dropped: deque[None] = deque()
        self._in_flight = 0
        self._ended = 0
        self._failed = 0
        self._latencies = LatenciesByLoad()
        self._rates = _Rates()
        self._application_fails = False
        now = self._clock()
        self._samples = deque([_Sample(now, 0, 0, self._cpu_time())])
        self._due = now + SAMPLE_PERIOD

    def after_fork_in_child(self) -> None:
        self.process += 1
        self._start_afresh()

    @property
    def in_flight(self) -> int:
        """Requests that have begun and not ended."""
        return self._in_flight - len(self._dropped)

    def begin(self) -> RequestInFlight:
        """Note that a request has arrived. It ends with its ``finished``, or when it is dropped."""
        with self._lock:
            while self._dropped:
                self._dropped.popleft()
                self._in_flight -= 1
            before = self._in_flight
            request = RequestInFlight(self, before, self._clock())
            self._in_flight = before + 1
            request.open = True
        return request

    def answered(self, before: int, latency: float) -> None:
        """Note a good answer to a request that ``before`` others were in flight with when it arrived."""
        with self._lock:
            self._latencies.add(before, latency, self._clock())

    def finished(self, *, counts: bool, failed: bool) -> None:
        """Note the end of a request. ``counts``: in the rates, unlike one that its client gave up."""
        with self._lock:
            self._in_flight -= 1
            self._ended += counts
            self._failed += counts and failed

    def dropped(self) -> None:
        """Note the end of a request that was collected open. Takes no lock: the collector may hold this very one."""
        self._dropped.append(None)

    def report(self, *, without: int = 0) -> LoadReport:
        """The load now. ``without``: requests in flight that are not to count, such as the one that is answered."""
        now = self._clock()
        if now >= self._due:
            self._sample(now)
        in_flight = max(0, self.in_flight - without)
        with self._lock:
            latencies = self._latencies.near(in_flight, now)
        named = {IN_FLIGHT_METRIC: float(in_flight)}
        if latencies:
            named[LATENCY_METRIC] = median(latencies)
        rates = self._rates
        return LoadReport(
            cpu_utilization=rates.cpu_utilization,
            application_utilization=rates.application_utilization,
            rps_fractional=rates.rps,
            eps=rates.eps,
            named_metrics=named,
        )

    def _sample(self, now: float) -> None:
        with self._lock:
            if now < self._due:
                return  # another thread was first
            self._due = now + SAMPLE_PERIOD
        sample = _Sample(now, self._ended, self._failed, self._cpu_time())
        application = self._ask_application()
        with self._lock:
            samples = self._samples
            samples.append(sample)
            while len(samples) > 2 and samples[1].at <= now - self._window:
                samples.popleft()
            first = samples[0]
        # All over the same time: a weight is one divided by another.
        passed = max(sample.at - first.at, SAMPLE_PERIOD)
        self._rates = _Rates(
            max(0.0, sample.cpu - first.cpu) / passed / self._cores,
            application,
            max(0, sample.ended - first.ended) / passed,
            max(0, sample.failed - first.failed) / passed,
        )

    def _ask_application(self) -> float:
        if self._application is None:
            return 0.0
        try:
            utilization = float(self._application())
            if not (isfinite(utilization) and utilization >= 0):
                raise ValueError(f"{utilization} is no utilization")
        except Exception:
            if not self._application_fails:  # once, not ten times a second
                logger.exception("%r failed; no application utilization is reported", self._application)
            self._application_fails = True
            return 0.0
        self._application_fails = False
        return utilization

    def __repr__(self) -> str:
        return f"<LoadMeter {self.in_flight} in flight>"


class RequestInFlight:
    """One request that a server is working on. Ended exactly once: later ends do nothing, and one that is dropped
    without an end (its handler was never called) ends by that."""

    __slots__ = ("_before", "_measured", "_meter", "_process", "_started", "open")

    def __init__(self, meter: LoadMeter, before: int, started: float) -> None:
        self.open = False  # until the meter counts it
        self._meter = meter
        self._process = meter.process
        self._before = before
        self._started = started
        self._measured = False

    def answered(self) -> None:
        """The response starts, and it is a good one: its latency is known. What follows, however long, is not."""
        if not self._measured:
            self._measured = True
            meter = self._meter
            meter.answered(self._before, meter._clock() - self._started)

    def finished(self, *, failed: bool = False) -> None:
        """The response is complete. ``failed``: through the server's fault."""
        if not failed:
            self.answered()
        self._end(counts=True, failed=failed)

    def given_up(self) -> None:
        """The client has gone: nothing is learnt of the server."""
        self._end(counts=False, failed=False)

    def report(self) -> LoadReport:
        """The load that the response tells of: without this request, which ends with it."""
        return self._meter.report(without=1 if self.open else 0)

    def _end(self, *, counts: bool, failed: bool) -> None:
        if self.open:
            self.open = False
            if self._process == self._meter.process:  # else it began before the fork, and its end is the parent's
                self._meter.finished(counts=counts, failed=failed)

    def __del__(self) -> None:
        if self.open and self._process == self._meter.process:
            self._meter.dropped()
