"""The endpoint that will probably answer first, of two drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar, Final, Generic

from meshlb._validate import number, seconds
from meshlb.balancing.alias import AliasTable, weights_differ
from meshlb.balancing.base import Candidate, CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.ewma import DEFAULT_DECAY, FAILURE_PENALTY
from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT, CallContext

UNKNOWN_BUSY_COST: Final = 1e9
"""Cost of an endpoint that has its first call and has not answered yet: above anything that can be measured, so that
it gets no second one while another endpoint exists (Finagle's ``Penalty``). Times the calls in flight, so that among
unknown endpoints the least loaded wins."""

FORCE_RATIO: Final = 10.0
"""A forced pick also needs the loser to have been left alone this many times longer than the winner. Without it, at
less than a call a second, every pick would be a forced one and the slow endpoint would get the traffic (go-zero's
fault). With it, no more than about a tenth of the winner's calls are spent on looking."""


@dataclass(frozen=True, slots=True)
class LeastResponseTime:
    """Lower expected response time, of two distinct endpoints drawn at random.

    ``cost = max(latency, age of the oldest unanswered call) * (in_flight / weight + 1)``

    * ``latency`` is the decayed peak EWMA with its failure penalty (see PeakEwma), so failing fast attracts nothing.
    * The age of the oldest call counts as soon as it exceeds the estimate: a hung endpoint is seen before it answers
      (nginx ``least_time inflight``).
    * ``weight`` is scaled to a mean of 1 and divides the calls in flight alone, not the whole cost: then an idle heavy
      endpoint does not win every pick, and shares follow weights at every load. With equal weights the cost is
      Finagle's ``latency * (in_flight + 1)``.
    * An endpoint without history costs nothing while idle, so it is probed at once, and more than any other until its
      first answer, so it is probed once and not flooded, however many calls start together.
    * Costs within ``tie`` of each other tie, and so do latencies below ``tie_floor``; the tie goes to the one picked
      longer ago (of unequal weight: to the one drawn first, by weight). Otherwise noise would decide who gets all.
    * Forced pick: a loser that has been idle and not picked for ``force_pick_after`` gets the call, so that nobody is
      written off on old figures. It needs nothing in flight there (the probe already under way will tell), has to have
      been left alone ten times longer than the winner, and waits for the end of a Retry-After.

    Only two of n are looked at, so "at once" and "after a second" mean: at the first draw that has it. With n endpoints
    a draw is n / 2 calls away on average, at 1,000 endpoints and 1,000 calls a second half a second.

    The picker reads; in-flight counts, samples and the time of the last pick are written by whoever makes the call.

    ``decay``: seconds in which an old sample loses 63 % of its say. ``peak``: a sample above the estimate replaces it
    (False: plain average). ``force_pick_after``: seconds, None for never. Raises ConfigError naming the field.
    """

    name: ClassVar[str] = "least_response_time"
    uses_weight: ClassVar[bool] = True

    decay: float = DEFAULT_DECAY
    peak: bool = True
    tie: float = 0.1
    """Costs within 10 % are the same: less than the spread of any real latency, more than its rounding."""
    tie_floor: float = 0.001
    """Seconds. Below a millisecond a Python process mostly measures its own scheduling."""
    force_pick_after: float | None = 1.0
    """go-zero's second: a recovered endpoint is found about as fast as a person would notice."""

    def __post_init__(self) -> None:
        seconds("LeastResponseTime.decay", self.decay)
        if not isinstance(self.peak, bool):
            raise ConfigError(f"LeastResponseTime.peak: {self.peak!r} is neither True nor False")
        number("LeastResponseTime.tie", self.tie, least=0, most=1)
        number("LeastResponseTime.tie_floor", self.tie_floor, least=0)
        seconds("LeastResponseTime.force_pick_after", self.force_pick_after, optional=True)

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        for candidate in candidates:  # the estimators belong to the endpoints, their tuning to the policy
            candidate.latency.decay = self.decay
            candidate.latency.peak = self.peak
        return LeastResponseTimePicker(self, candidates, environment)


def scale_to_mean(weights: Sequence[float]) -> list[float]:
    """The weights with a mean of 1. Of extremes a floor is left, since the cost divides by them."""
    peak = max(weights)  # dividing first keeps the sum of huge weights finite
    mean = sum(weight / peak for weight in weights) / len(weights)
    return [max(weight / peak / mean, 1e-9) for weight in weights]


def response_time_cost(candidate: Candidate, scaled_weight: float, now: float, floor: float = 0.0) -> float:
    """The cost in seconds of sending one more call to ``candidate``. Lower is better. A pure read."""
    latency = candidate.latency
    in_flight = candidate.in_flight
    if not latency.has_history:
        return UNKNOWN_BUSY_COST * in_flight / scaled_weight
    estimate = max(latency.at(now), floor)
    if not in_flight:
        return estimate
    return max(estimate, candidate.oldest_wait(now)) * (in_flight / scaled_weight + 1.0)


def may_be_forced(loser: Candidate, winner: Candidate, now: float, force_pick_after: float) -> bool:
    """Whether the loser has been left alone long enough to get the call after all."""
    # Alone since its last answer: for a caller with one call at a time, two seconds spent in a slow endpoint's own
    # call would otherwise be two seconds in which nobody asked it.
    idle = now - max(loser.last_picked, loser.latency.stamp, loser.latency.penalty_stamp)
    if idle <= force_pick_after or loser.in_flight or idle <= FORCE_RATIO * (now - winner.last_picked):
        return False
    latency = loser.latency
    # More than the flat penalty is a wait that the server itself asked for.
    return latency.penalty <= FAILURE_PENALTY or now - latency.penalty_stamp >= latency.penalty


class LeastResponseTimePicker(Generic[CandidateT]):
    """Power of two choices over ``response_time_cost``. The arithmetic is written out in ``pick``: two calls of the
    function would double its time, and a test holds both to the same result."""

    __slots__ = (
        "_alias",
        "_candidates",
        "_clock",
        "_environment",
        "_floor",
        "_force_pick_after",
        "_n",
        "_near",
        "_options",
        "_others",
        "_random",
        "_rate",
        "_threshold",
        "_weights",
    )  # fmt: skip

    def __init__(
        self, options: LeastResponseTime, candidates: Sequence[CandidateT], environment: PolicyEnvironment
    ) -> None:
        self._options = options
        self._environment = environment
        self._candidates = list(candidates)
        self._n = len(self._candidates)
        self._others = self._n - 1
        weights = [candidate.weight for candidate in candidates]
        self._weights: list[float] | None = None
        if weights_differ(weights):
            self._weights = scale_to_mean(weights)
            self._threshold, self._alias = AliasTable.build(weights)
        self._clock = environment.clock
        self._random = environment.random.random
        self._rate = 1.0 / options.decay
        self._near = 1.0 / (1.0 + options.tie)
        self._floor = options.tie_floor
        self._force_pick_after = options.force_pick_after

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded or self._others < 1:
            return self._pick_outside(call)
        random = self._random
        weights = self._weights
        if weights is None:
            i = int(random() * self._n)
            j = int(random() * self._others)
            if j >= i:
                j += 1  # leaves out i: uniform over the others
        else:
            i, j = self._draw_by_weight()
        first = self._candidates[i]
        second = self._candidates[j]
        now = self._clock()
        floor = self._floor

        latency = first.latency
        in_flight = first.in_flight
        if latency.has_history:
            first_cost = latency.value
            if latency.penalty:
                first_cost = latency.at(now)
            elif first_cost > floor and latency.stamp < now:  # it only fades
                first_cost *= exp((latency.stamp - now) * self._rate)
            if first_cost < floor:
                first_cost = floor
            if in_flight:
                age = first.oldest_wait(now)
                if age > first_cost:
                    first_cost = age
                first_cost *= in_flight + 1.0 if weights is None else in_flight / weights[i] + 1.0
        else:
            first_cost = UNKNOWN_BUSY_COST * in_flight
            if weights is not None:
                first_cost /= weights[i]

        latency = second.latency
        in_flight = second.in_flight
        if latency.has_history:
            second_cost = latency.value
            if latency.penalty:
                second_cost = latency.at(now)
            elif second_cost > floor and latency.stamp < now:  # it only fades
                second_cost *= exp((latency.stamp - now) * self._rate)
            if second_cost < floor:
                second_cost = floor
            if in_flight:
                age = second.oldest_wait(now)
                if age > second_cost:
                    second_cost = age
                second_cost *= in_flight + 1.0 if weights is None else in_flight / weights[j] + 1.0
        else:
            second_cost = UNKNOWN_BUSY_COST * in_flight
            if weights is not None:
                second_cost /= weights[j]

        if first_cost < second_cost * self._near:
            winner, loser = first, second
        elif second_cost < first_cost * self._near:
            winner, loser = second, first
        elif weights is None:
            return second if second.last_picked < first.last_picked else first
        else:
            return first
        force_pick_after = self._force_pick_after
        if (
            force_pick_after is not None
            and now - loser.last_picked > force_pick_after
            and may_be_forced(loser, winner, now, force_pick_after)
        ):
            return loser
        return winner

    def _draw_by_weight(self) -> tuple[int, int]:
        random, n, threshold = self._random, self._n, self._threshold
        u = random() * n
        i = int(u)
        if u >= threshold[i]:
            i = self._alias[i]
        u = random() * n
        j = int(u)
        if u >= threshold[j]:
            j = self._alias[j]
        if j == i:  # the heavy one again: any other will do, or it would be compared with itself
            j = int(random() * self._others)
            if j >= i:
                j += 1
        return i, j

    def _pick_outside(self, call: CallContext) -> CandidateT | None:
        """The same rule among the candidates that are not excluded: the path of a retry, in O(n)."""
        remaining = [candidate for candidate in self._candidates if candidate not in call.excluded]
        if len(remaining) < 2:
            return remaining[0] if remaining else None
        return LeastResponseTimePicker(self._options, remaining, self._environment).pick(NO_CONTEXT)
