"""An endpoint at random, by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random as RandomSource
from typing import Any, ClassVar, Generic

from meshlb.balancing.alias import AliasTable, weights_differ
from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.model import CallContext


@dataclass(frozen=True, slots=True)
class Random:
    """An endpoint at random, with a probability in proportion to its weight. Keeps no state at all.

    Envoy's advice is to prefer it over round robin where nothing checks health: there the share of a failed endpoint
    goes to everybody, not to the next in line.
    """

    name: ClassVar[str] = "random"
    uses_weight: ClassVar[bool] = True
    ramps_by_weight: ClassVar[bool] = True

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        weights = [candidate.weight for candidate in candidates]
        if weights_differ(weights):
            return WeightedRandomPicker(candidates, weights, environment.random)
        return RandomPicker(candidates, environment.random)


class RandomPicker(Generic[CandidateT]):
    """Uniform choice."""

    __slots__ = ("_candidates", "_n", "_random")

    def __init__(self, candidates: Sequence[CandidateT], random: RandomSource) -> None:
        self._candidates = list(candidates)
        self._n = len(self._candidates)
        self._random = random.random

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded or not self._n:
            return self._pick_outside(call)
        return self._candidates[int(self._random() * self._n)]

    def _pick_outside(self, call: CallContext) -> CandidateT | None:
        remaining = [candidate for candidate in self._candidates if candidate not in call.excluded]
        return remaining[int(self._random() * len(remaining))] if remaining else None


class WeightedRandomPicker(Generic[CandidateT]):
    """Choice by weight, from an alias table."""

    __slots__ = ("_alias", "_candidates", "_n", "_random", "_threshold")

    def __init__(self, candidates: Sequence[CandidateT], weights: Sequence[float], random: RandomSource) -> None:
        self._candidates = list(candidates)
        self._n = len(self._candidates)
        self._threshold, self._alias = AliasTable.build(weights)
        self._random = random.random

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            return self._pick_outside(call)
        u = self._random() * self._n
        i = int(u)
        return self._candidates[i if u < self._threshold[i] else self._alias[i]]

    def _pick_outside(self, call: CallContext) -> CandidateT | None:
        remaining = [candidate for candidate in self._candidates if candidate not in call.excluded]
        return draw_by_weight(remaining, self._random)


def draw_by_weight(candidates: Sequence[CandidateT], random: Callable[[], float]) -> CandidateT | None:
    """One of the candidates with a probability in proportion to weight, None for none. O(n): for a retry or a tie."""
    if not candidates:
        return None
    return candidates[AliasTable.build([candidate.weight for candidate in candidates]).draw(random())]
