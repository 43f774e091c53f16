"""The endpoint with the fewest calls in flight, of two drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic

from meshlb._validate import integer
from meshlb.balancing.alias import AliasTable, weights_differ
from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.random_choice import draw_by_weight
from meshlb.errors import ConfigError
from meshlb.model import NO_CONTEXT, CallContext

MAX_CHOICES: Final = 10
"""gRPC's bound (A48): beyond it the draws cost more than they find, and clients begin to agree on the same target."""


@dataclass(frozen=True, slots=True)
class LeastConnections:
    """Fewest calls in flight for its weight, out of ``choices`` distinct endpoints drawn at random (P2C, Mitzenmacher).

    Two choices come close to a full scan, without its fault that many clients with the same view run to the same
    endpoint. The draw is without replacement, as in Finagle and unlike Envoy and gRPC A48: with replacement even a
    frozen endpoint of two keeps a quarter of the calls.

    Weights: endpoints are drawn by weight and compared by ``in_flight / weight`` (Finagle ``WeightedP2CPick``); ties go
    to the one drawn first. So shares follow weights both when idle and under load.

    ``choices``: how many are drawn, 2 to 10. ``full_scan``: compare all of them, in O(n) per pick; right for one
    client with few endpoints and long calls (streams), where every imbalance stays for long.

    An endpoint whose last call failed loses to any that is not in the same state, for five seconds or the time the
    server asked for: calls that fail fast leave nothing in flight, and would otherwise attract more of them.

    In-flight counts are this process's own. Raises ConfigError for choices outside 2 to 10.
    """

    name: ClassVar[str] = "least_connections"
    uses_weight: ClassVar[bool] = True
    ramps_by_weight: ClassVar[bool] = True

    choices: int = 2
    full_scan: bool = False

    def __post_init__(self) -> None:
        integer("LeastConnections.choices", self.choices, least=2, most=MAX_CHOICES)
        if not isinstance(self.full_scan, bool):
            raise ConfigError(f"LeastConnections.full_scan: {self.full_scan!r} is neither True nor False")

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        return picker_for(candidates, len(candidates) if self.full_scan else self.choices, environment)


def picker_for(candidates: Sequence[CandidateT], choices: int, environment: PolicyEnvironment) -> Picker[CandidateT]:
    """The cheapest picker that compares ``choices`` of these candidates."""
    n = len(candidates)
    if n == 2 or (choices == 2 and n > 2):
        weights = [candidate.weight for candidate in candidates]
        if weights_differ(weights):
            return WeightedTwoChoicesPicker(candidates, weights, environment)
        return TwoChoicesPicker(candidates, environment)
    if choices < n:
        return SeveralChoicesPicker(candidates, choices, environment)
    return FullScanPicker(candidates, environment)


class TwoChoicesPicker(Generic[CandidateT]):
    """Two distinct of at least two endpoints of equal weight."""

    __slots__ = ("_candidates", "_environment", "_n", "_others", "_random")

    def __init__(self, candidates: Sequence[CandidateT], environment: PolicyEnvironment) -> None:
        self._candidates = list(candidates)
        self._n = len(self._candidates)
        self._others = self._n - 1
        self._random = environment.random.random
        self._environment = environment

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            return pick_outside(self._candidates, 2, call, self._environment)
        random = self._random
        i = int(random() * self._n)
        j = int(random() * self._others)
        if j >= i:
            j += 1  # leaves out i: uniform over the others
        first = self._candidates[i]
        second = self._candidates[j]
        if second.in_flight < first.in_flight:
            first, second = second, first
        return unless_failing(first, second, self._environment) if first.latency.penalty else first


class WeightedTwoChoicesPicker(Generic[CandidateT]):
    """Two distinct of at least two endpoints, drawn by weight."""

    __slots__ = ("_alias", "_candidates", "_environment", "_n", "_others", "_random", "_threshold", "_weights")

    def __init__(
        self, candidates: Sequence[CandidateT], weights: Sequence[float], environment: PolicyEnvironment
    ) -> None:
        self._candidates = list(candidates)
        self._weights = list(weights)
        self._n = len(self._candidates)
        self._others = self._n - 1
        self._threshold, self._alias = AliasTable.build(weights)
        self._random = environment.random.random
        self._environment = environment

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            return pick_outside(self._candidates, 2, call, self._environment)
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
        first = self._candidates[i]
        second = self._candidates[j]
        # a / w_a > b / w_b without the division
        if second.in_flight * self._weights[i] < first.in_flight * self._weights[j]:
            first, second = second, first
        return unless_failing(first, second, self._environment) if first.latency.penalty else first


class SeveralChoicesPicker(Generic[CandidateT]):
    """``choices`` distinct of more than that many endpoints, drawn by weight."""

    __slots__ = ("_candidates", "_choices", "_environment", "_random", "_table")

    def __init__(self, candidates: Sequence[CandidateT], choices: int, environment: PolicyEnvironment) -> None:
        self._candidates = list(candidates)
        self._choices = choices
        self._table = AliasTable.build([candidate.weight for candidate in candidates])
        self._random = environment.random.random
        self._environment = environment

    def pick(self, call: CallContext) -> CandidateT | None:
        candidates, random = self._candidates, self._random
        if call.excluded:
            return pick_outside(candidates, self._choices, call, self._environment)
        drawn: list[int] = []
        for _ in range(self._choices):
            i = self._table.draw(random())
            while i in drawn:  # at most 9 of more than 9 are taken, so a uniform draw soon hits a free one
                i = int(random() * len(candidates))
            drawn.append(i)
        now = self._environment.clock()
        found = [candidates[i] for i in drawn]
        found = [candidate for candidate in found if not candidate.latency.is_penalized(now)] or found
        best = found[0]
        for other in found:
            if other.in_flight * best.weight < best.in_flight * other.weight:
                best = other
        return best


class FullScanPicker(Generic[CandidateT]):
    """The least loaded of all; ties by weighted lot, or every idle client would begin with the first."""

    __slots__ = ("_candidates", "_environment", "_random")

    def __init__(self, candidates: Sequence[CandidateT], environment: PolicyEnvironment) -> None:
        self._candidates = list(candidates)
        self._random = environment.random.random
        self._environment = environment

    def pick(self, call: CallContext) -> CandidateT | None:
        candidates = self._candidates
        if call.excluded:
            candidates = [candidate for candidate in candidates if candidate not in call.excluded]
        if not candidates:
            return None
        now = self._environment.clock()
        candidates = [candidate for candidate in candidates if not candidate.latency.is_penalized(now)] or candidates
        loads = [candidate.in_flight / candidate.weight for candidate in candidates]
        lowest = min(loads)
        tied = [candidate for candidate, load in zip(candidates, loads, strict=True) if load == lowest]
        return tied[0] if len(tied) == 1 else draw_by_weight(tied, self._random)


def unless_failing(winner: CandidateT, loser: CandidateT, environment: PolicyEnvironment) -> CandidateT:
    """The winner, unless its last call failed and the loser's did not."""
    now = environment.clock()
    return loser if winner.latency.is_penalized(now) and not loser.latency.is_penalized(now) else winner


def pick_outside(
    candidates: Sequence[CandidateT], choices: int, call: CallContext, environment: PolicyEnvironment
) -> CandidateT | None:
    """The same rule among the candidates that are not excluded: the path of a retry, in O(n)."""
    remaining = [candidate for candidate in candidates if candidate not in call.excluded]
    return picker_for(remaining, choices, environment).pick(NO_CONTEXT)
