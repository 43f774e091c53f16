"""Weighted round robin with the weights that servers report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from threading import Lock
from typing import Any, ClassVar, Final, Generic

from meshlb._validate import number, seconds
from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.orca import LoadReport
from meshlb.balancing.reported_weight import ReportedWeight, reported_weight
from meshlb.balancing.round_robin import turn_of
from meshlb.balancing.weighted_round_robin import StridePicker
from meshlb.errors import ConfigError
from meshlb.model import CallContext, Identity

MIN_UPDATE_PERIOD: Final = 0.1
"""gRFC A58's floor, in seconds."""


@dataclass(frozen=True, slots=True)
class ClientWeightedRoundRobin:
    """Static stride by ``qps / utilization`` from ORCA reports: gRFC A58, Envoy's ``client_side_weighted_round_robin``.

    An endpoint without a usable weight counts as the mean of the others; with fewer than two usable ones the registry's
    weights are used. Reports reach the picker through ``observe_report``.

    All periods are seconds, the defaults A58's. ``blackout_period``: reports must have come for so long before they
    count (0: at once). ``expiration_period``: a weight that old is forgotten. ``update_period``: how often the schedule
    is made anew, no less than 0.1. ``error_utilization_penalty``: what an error rate of 1 adds to the utilization.
    ``metric_names``: metrics whose maximum is taken for utilization, such as ``named_metrics.queue`` (A114). Raises
    ConfigError naming the field.
    """

    name: ClassVar[str] = "client_weighted_round_robin"
    takes_turns: ClassVar[bool] = True
    wants_reports: ClassVar[bool] = True

    blackout_period: float = 10.0
    expiration_period: float = 180.0
    update_period: float = 1.0
    error_utilization_penalty: float = 1.0
    metric_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number("ClientWeightedRoundRobin.blackout_period", self.blackout_period, least=0)
        seconds("ClientWeightedRoundRobin.expiration_period", self.expiration_period)
        number("ClientWeightedRoundRobin.update_period", self.update_period, least=MIN_UPDATE_PERIOD)
        number("ClientWeightedRoundRobin.error_utilization_penalty", self.error_utilization_penalty, least=0)
        if not isinstance(self.metric_names, tuple) or not all(isinstance(name, str) for name in self.metric_names):
            raise ConfigError(
                f"ClientWeightedRoundRobin.metric_names: {self.metric_names!r} is not a tuple of metric names"
            )

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        return ReportedWeightPicker(self, candidates, environment, previous)


class ReportedWeightPicker(Generic[CandidateT]):
    """Picks by a schedule that is replaced once per update period, by whichever thread comes by first.

    A report does that at the end of a call. A pick does it only where none came for a whole expiration period, so that
    a client that was idle does not go on by weights of long ago.
    """

    __slots__ = ("_candidates", "_clock", "_due", "_lock", "_options", "_overdue", "_schedule", "turn", "weights")

    def __init__(
        self,
        options: ClientWeightedRoundRobin,
        candidates: Sequence[CandidateT],
        environment: PolicyEnvironment,
        previous: Picker[Any] | None,
    ) -> None:
        self._options = options
        self._clock = environment.clock
        self._candidates = list(candidates)
        self._lock = Lock()
        self.turn = turn_of(previous, environment)
        now = environment.clock()
        self.weights: dict[Identity, ReportedWeight] = {}
        """By identity: weights outlive pickers, and endpoints that are out of rotation for a while."""
        if isinstance(previous, ReportedWeightPicker):
            known = {candidate.endpoint.identity for candidate in candidates}
            before = {candidate.endpoint.identity for candidate in previous._candidates}
            for identity, weight in list(previous.weights.items()):
                if identity in known or now - weight.last_update < options.expiration_period:
                    self.weights[identity] = weight
                if identity in known and identity not in before and now - weight.last_update >= options.blackout_period:
                    # What it reports first is the load of its warm-up. Not so after a breaker's short time out, which
                    # is how overload ends here: with the mean of all weights it would be overloaded again, and so on.
                    weight.restart()
        self._due = self._overdue = inf
        self._schedule = self._make_schedule(now)

    def pick(self, call: CallContext) -> CandidateT | None:
        if not self._candidates:
            return None
        if self._clock() >= self._overdue:
            self._refresh()
        return self._schedule.pick(call)

    def observe_report(self, candidate: CandidateT, report: LoadReport) -> None:
        """Take in what an endpoint reported with a response. Safe from many threads."""
        weight = reported_weight(report, self._options.error_utilization_penalty, self._options.metric_names)
        now = self._clock()
        if weight is not None:
            identity = candidate.endpoint.identity
            state = self.weights.get(identity)
            if state is None:
                state = self.weights.setdefault(identity, ReportedWeight())
            state.update(weight, now)
        if now >= self._due:
            self._refresh()

    def _refresh(self) -> None:
        if self._lock.acquire(blocking=False):  # whoever finds it taken goes on by the old schedule
            try:
                self._schedule = self._make_schedule(self._clock())
            finally:
                self._lock.release()

    def _make_schedule(self, now: float) -> StridePicker[CandidateT]:
        options = self._options
        self._due = now + options.update_period
        self._overdue = now + options.expiration_period
        weights = []
        for candidate in self._candidates:
            state = self.weights.get(candidate.endpoint.identity)
            usable = 0.0 if state is None else state.at(now, options.blackout_period, options.expiration_period)
            weights.append(usable)
        if sum(weight > 0 for weight in weights) < 2:
            weights = [candidate.weight for candidate in self._candidates]
        return StridePicker(self._candidates, weights, self.turn)
