"""Prequal: by what servers say of their own queue and latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar, Final, Generic

from meshlb._validate import integer, number, seconds
from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.least_connections import LeastConnections
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.probe_pool import DEFAULT_QUANTILE, ProbePool, reuse_bound
from meshlb.model import CallContext

IN_FLIGHT_METRIC: Final = "requests_in_flight"
LATENCY_METRIC: Final = "latency_seconds"
"""The named metrics of a load report that make it a probe: the server's requests in flight when it answered, and the
median latency of its recent requests at about that number."""

PROBE_RATE: Final = 1.0
"""Probes per call: one comes with each response. (The paper sends three of its own per call.)"""

REMOVE_RATE: Final = 0.25
"""Probes dropped per call. The paper's 1 goes with its three probes; with one it would empty the pool."""


@dataclass(frozen=True, slots=True)
class Prequal:
    """The replica with the lowest latency among those whose queue is not among the longest (NSDI 2024).

    Load is what a server has in flight from everybody, and the latency it has at that load; both come as named metrics
    of an ORCA report with every response, through ``observe_report``, so that in place of the paper's own probes
    responses fill the pool. While the pool has fewer than two fresh probes, and for servers that report nothing, calls
    go by the local in-flight counts (``least_connections``). A replica whose last call failed is not in the pool, or
    one that fails fast would look idle.

    ``pool_size``: probes kept, 16 in the paper. ``max_age``: seconds that one is good for, about 1 in the paper.
    ``quantile``: above this quantile of in-flight numbers a replica is hot; 0 looks at them alone, 1 at latency alone.
    ``explore``: share of calls that go by local counts in any case, since a replica that gets no call sends no probe.
    Raises ConfigError naming the field.
    """

    name: ClassVar[str] = "prequal"
    wants_reports: ClassVar[bool] = True

    pool_size: int = 16
    max_age: float = 1.0
    quantile: float = DEFAULT_QUANTILE
    explore: float = 0.05
    """One call in twenty: finds an idle replica of a hundred within some seconds at 100 calls a second."""

    def __post_init__(self) -> None:
        integer("Prequal.pool_size", self.pool_size, least=2, most=1000)
        seconds("Prequal.max_age", self.max_age)
        number("Prequal.quantile", self.quantile, least=0, most=1)
        number("Prequal.explore", self.explore, least=0, most=1)

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        return PrequalPicker(self, candidates, environment, previous)


class PrequalPicker(Generic[CandidateT]):
    """Holds the pool under a lock for a few microseconds at a time: a pick reads and changes up to sixteen probes."""

    __slots__ = ("_clock", "_explore", "_local", "_lock", "_members", "_random", "_reuse", "pool")

    def __init__(
        self,
        options: Prequal,
        candidates: Sequence[CandidateT],
        environment: PolicyEnvironment,
        previous: Picker[Any] | None,
    ) -> None:
        self._clock = environment.clock
        self._random = environment.random.random
        self._explore = options.explore
        self._lock = Lock()
        self._members = {id(candidate) for candidate in candidates}
        self._local: Picker[CandidateT] = LeastConnections().build(candidates, environment, None)
        self._reuse = reuse_bound(options.pool_size, max(len(candidates), 1), PROBE_RATE, REMOVE_RATE)
        self.pool: ProbePool[CandidateT] = ProbePool(
            self._random, size=options.pool_size, max_age=options.max_age, quantile=options.quantile
        )
        if isinstance(previous, PrequalPicker):
            self.pool.probes = [probe for probe in previous.probes() if id(probe.replica) in self._members]

    def probes(self) -> list[Any]:
        """The probes that are held."""
        with self._lock:
            return list(self.pool.probes)

    def pick(self, call: CallContext) -> CandidateT | None:
        if self.pool.probes and self._random() >= self._explore:
            excluded = call.excluded
            with self._lock:
                chosen = self.pool.choose(
                    self._clock(), (lambda replica: replica not in excluded) if excluded else None
                )
                self.pool.remove(REMOVE_RATE)
                if chosen is not None and chosen.latency.penalty:
                    self.pool.forget(chosen)
                    chosen = None
            if chosen is not None:
                return chosen
        return self._local.pick(call)

    def observe_report(self, candidate: CandidateT, report: LoadReport) -> None:
        """Take in what a replica reported with a response; a report without the two metrics is no probe."""
        in_flight = report.named_metrics.get(IN_FLIGHT_METRIC)
        latency = report.named_metrics.get(LATENCY_METRIC)
        if in_flight is None or latency is None or id(candidate) not in self._members:
            return
        with self._lock:
            if candidate.latency.penalty:
                self.pool.forget(candidate)
            else:
                self.pool.add(candidate, max(in_flight, 0.0), max(latency, 0.0), self._clock(), self._reuse)
