"""Prequal: by what servers say of their own queue and latency."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import inf
from threading import Lock
from typing import Any, ClassVar, Final, Generic

from meshlb._validate import integer, number, seconds
from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.least_connections import LeastConnections
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.probe_pool import DEFAULT_QUANTILE, Probe, ProbePool, reuse_bound
from meshlb.balancing.probes import ProbeDemand, Probes
from meshlb.errors import ConfigError
from meshlb.model import CallContext

IN_FLIGHT_METRIC: Final = "requests_in_flight"
LATENCY_METRIC: Final = "latency_seconds"
"""The named metrics of a load report that make it a probe: the server's requests in flight when it answered, and the
median latency of its recent requests at about that number (missing if it has answered none lately)."""

PROBE_RATE: Final = 1.0
"""Probes per call: one comes with each response. Where calls are so few that explicit ones make up for it, probes age
before they are used up, and the number does not matter. (The paper sends three of its own per call.)"""

REMOVE_RATE: Final = 0.25
"""Probes dropped per call. The paper's 1 goes with its three probes; with one it would empty the pool."""

_NOT_READY: Final = object()
"""In place of a choice: there is none that only has to be taken."""


@dataclass(frozen=True, slots=True)
class Prequal:
    """The replica with the lowest latency among those whose queue is not among the longest (NSDI 2024).

    Load is what a server has in flight from everybody, and the latency it has at that load; both come as named metrics
    of an ORCA report with every response, through ``observe_report``, so that in place of the paper's own probes
    responses fill the pool. Where traffic is too thin for that, explicit probes do (``probes``), never on a call's
    path. While the pool has fewer than two fresh probes, and for servers that report nothing, calls go by the local
    in-flight counts (``least_connections``). A replica whose last call failed is not in the pool, or one that fails
    fast would look idle.

    ``pool_size``: probes kept, 16 in the paper. ``max_age``: seconds that one is good for, about 1 in the paper.
    ``quantile``: above this quantile of in-flight numbers a replica is hot; 0 looks at them alone, 1 at latency alone.
    ``explore``: share of calls that go by local counts in any case, since a replica that gets no call sends no probe.
    ``probes``: how explicit probes are made (``Probes``); None for none. Raises ConfigError naming the field.
    """

    name: ClassVar[str] = "prequal"
    wants_reports: ClassVar[bool] = True

    pool_size: int = 16
    max_age: float = 1.0
    quantile: float = DEFAULT_QUANTILE
    explore: float = 0.05
    """One call in twenty: finds an idle replica of a hundred within some seconds at 100 calls a second."""
    probes: Probes | None = field(default_factory=Probes)
    reuse: float | None = 1.0
    """How often a probe may be used; None: the paper's bound. A probe is one client's picture of a moment that all
    clients see alike. In the simulator (docs/simulation.md) each further use makes queues longer: used up to 16 times,
    as the bound has it for pools about as large as the service, 20 servers that are all alike do worse than at random.
    """

    def __post_init__(self) -> None:
        integer("Prequal.pool_size", self.pool_size, least=2, most=1000)
        seconds("Prequal.max_age", self.max_age)
        number("Prequal.quantile", self.quantile, least=0, most=1)
        number("Prequal.explore", self.explore, least=0, most=1)
        if self.probes is not None and not isinstance(self.probes, Probes):
            raise ConfigError(f"Prequal.probes: {self.probes!r} is not a Probes (or None)")
        if self.reuse is not None:
            number("Prequal.reuse", self.reuse, least=1, most=1000)

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        return PrequalPicker(self, candidates, environment, previous)


class PrequalPicker(Generic[CandidateT]):
    """Chooses when the pool changes, which is when a report comes in: the choice then lies ready, and the next pick
    only takes it, without a lock. Of several picks without a report in between, all but the first choose for
    themselves, under the lock that guards the pool. What a pick changes in the pool is done when somebody next looks
    at it.
    """

    __slots__ = ("_best", "_candidates", "_clock", "_demand", "_explore", "_fresh_for", "_good_until", "_is_pending",
                 "_local", "_lock", "_members", "_random", "_ready", "_reuse", "_target", "pool")  # fmt: skip

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
        self._candidates = candidates
        self._members = {id(candidate) for candidate in candidates}
        self._local: Picker[CandidateT] = LeastConnections().build(candidates, environment, None)
        reuse = options.reuse
        if reuse is None:
            reuse = reuse_bound(options.pool_size, max(len(candidates), 1), PROBE_RATE, REMOVE_RATE)
        self._reuse = reuse
        self.pool: ProbePool[CandidateT] = ProbePool(
            self._random, size=options.pool_size, max_age=options.max_age, quantile=options.quantile
        )
        probes = Probes() if options.probes is None else options.probes
        self._demand: ProbeDemand[CandidateT] = ProbeDemand(probes, environment.random)
        # What will be too old at the next look is asked for now; half a pool is a choice, and half the probes of a full
        # one.
        self._fresh_for = options.max_age - probes.interval
        self._target = 0 if options.probes is None else min(len(candidates), options.pool_size // 2)
        if isinstance(previous, PrequalPicker):
            self.pool.probes = [probe for probe in previous.probes() if id(probe.replica) in self._members]
            self._demand.carry_over(previous._demand, self._members)
        # A place for one choice: a dict, since its ``pop`` takes what is there, or tells that nothing is, in one step
        # that no other thread can come between. None is a choice too: to go by the local counts.
        self._ready: dict[int, CandidateT | None] = {}
        self._best: Probe[CandidateT] | None = None
        self._is_pending = False
        """``_best`` has not been counted as used yet, and will be unless it still lies ready."""
        self._good_until = -inf
        """When what lies ready has to be chosen anew, as a probe has become too old."""

    def probes(self) -> list[Any]:
        """The probes that are held."""
        with self._lock:
            self._settle()
            return list(self.pool.probes)

    def pick(self, call: CallContext) -> CandidateT | None:
        self._demand.calls += 1
        if self.pool.probes and self._random() >= self._explore:
            chosen: Any = _NOT_READY
            if not call.excluded and self._clock() <= self._good_until:
                chosen = self._ready.pop(0, _NOT_READY)
            if chosen is _NOT_READY:
                chosen = self._choose(call.excluded)
            if chosen is not None:
                if not chosen.latency.penalty:
                    return chosen  # type: ignore[no-any-return]  # a candidate, now that it is not the mark
                with self._lock:
                    self._settle()
                    self.pool.forget(chosen)
        return self._local.pick(call)

    def _choose(self, excluded: Collection[object]) -> CandidateT | None:
        with self._lock:
            self._settle()
            best = self._best = self.pool.best(
                self._clock(), (lambda replica: replica not in excluded) if excluded else None
            )
            self._is_pending = True  # and taken
            return None if best is None else best.replica

    def _prepare(self, now: float) -> None:
        """Lay the next choice ready. With the lock, after ``_settle`` and a change of the pool."""
        best = self._best = self.pool.best(now)
        self._is_pending = True
        self._good_until = self.pool.good_until()
        self._ready[0] = None if best is None else best.replica

    def _settle(self) -> None:
        """Take back the last choice, or count it if a pick has taken it. With the lock, before any look at the pool."""
        if self._is_pending:
            self._is_pending = False
            if self._ready.pop(0, _NOT_READY) is _NOT_READY:
                if self._best is not None:
                    self.pool.use(self._best)
                if self._random() < REMOVE_RATE:
                    self.pool.remove(1)

    def observe_report(self, candidate: CandidateT, report: LoadReport) -> None:
        """Take in what a replica reported with a response; a report without its requests in flight is no probe."""
        if id(candidate) in self._members:
            with self._lock:
                self._demand.carried += self._take_in(candidate, report)

    def probes_wanted(self) -> list[CandidateT]:
        """The replicas to send an explicit probe to, now. To be called once each ``Probes.interval``."""
        if not self._target:
            return []
        now = self._clock()
        with self._lock:
            self._settle()
            oldest = now - self._fresh_for
            fresh = {id(probe.replica) for probe in self.pool.probes if probe.received > oldest}
            return self._demand.take(now, self._candidates, fresh, self._target)

    def observe_probe(self, candidate: CandidateT, report: LoadReport | None) -> None:
        """Take in the answer to an explicit probe; None: there was none, or it was no report."""
        if id(candidate) in self._members:
            with self._lock:
                if report is None or not self._take_in(candidate, report):
                    self._demand.silent(candidate, self._clock())

    def _take_in(self, candidate: CandidateT, report: LoadReport) -> bool:
        in_flight = report.named_metrics.get(IN_FLIGHT_METRIC)
        if in_flight is None:
            return False
        self._demand.reported(candidate)
        self._settle()
        now = self._clock()
        if candidate.latency.penalty:
            self.pool.forget(candidate)
        else:
            latency = report.named_metrics.get(LATENCY_METRIC)
            if latency is None:
                # It has answered nobody lately, and knows none. It is neither the fastest nor the slowest then.
                latency = self.pool.usual_latency()
            elif latency < 0.0:
                latency = 0.0
            self.pool.add(candidate, in_flight if in_flight > 0.0 else 0.0, latency, now, self._reuse)
        self._prepare(now)
        return True
