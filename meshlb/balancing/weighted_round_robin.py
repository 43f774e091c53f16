"""Every endpoint in turn, the heavy ones more often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import Any, ClassVar, Final, Generic, Literal

from meshlb.balancing.base import Candidate, CandidateT, Picker, PolicyEnvironment
from meshlb.balancing.edf import EdfScheduler
from meshlb.balancing.random_choice import draw_by_weight
from meshlb.balancing.round_robin import RoundRobinPicker, turn_of
from meshlb.balancing.smooth import SmoothWeighted
from meshlb.balancing.static_stride import StaticStride
from meshlb.errors import ConfigError
from meshlb.model import CallContext

SCHEDULERS: Final = ("static_stride", "smooth", "edf")

_WARM_UP: Final = 100
"""A smooth scheduler plays up to this many picks before its first: enough to spread the clients' starts, and cheap."""


@dataclass(frozen=True, slots=True)
class WeightedRoundRobin:
    """Turns in proportion to weight: from Consul's ``Weights``, or ``Endpoint.weight``.

    ``scheduler``:

    * ``static_stride`` (default): O(1), no lock. Weights count as no less than 0.1 and no more than 10 times their
      mean, so nobody starves and nobody takes it all (gRFC A58, the clamps of grpc-java).
    * ``smooth``: nginx's. The evenest sequence and any ratio of weights, at O(n) a pick: for tens of endpoints.
    * ``edf``: Envoy's. Any ratio of weights at O(log n) a pick.

    The latter two take a lock for the length of a pick. All of them start at a random point. Raises ConfigError for
    another scheduler.
    """

    name: ClassVar[str] = "weighted_round_robin"
    uses_weight: ClassVar[bool] = True
    ramps_by_weight: ClassVar[bool] = True

    scheduler: Literal["static_stride", "smooth", "edf"] = "static_stride"

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(
                f"WeightedRoundRobin.scheduler: {self.scheduler!r} is not one of {', '.join(map(repr, SCHEDULERS))}"
            )

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        if len(candidates) < 2:
            return RoundRobinPicker(candidates, turn_of(previous, environment))
        weights = [candidate.weight for candidate in candidates]
        if self.scheduler == "smooth":
            return SmoothPicker(candidates, weights, environment.random, previous)
        if self.scheduler == "edf":
            return EdfPicker(candidates, environment.random)
        return StridePicker(candidates, weights, turn_of(previous, environment))


class StridePicker(Generic[CandidateT]):
    """Turns by static stride; ``weights`` may contain 0 for unknown."""

    __slots__ = ("_candidates", "_pick", "_weights", "turn")

    def __init__(self, candidates: Sequence[CandidateT], weights: Sequence[float], turn: Iterator[int]) -> None:
        self._candidates = list(candidates)
        self._weights = list(weights)
        self._pick = StaticStride(weights, turn).pick
        self.turn = turn

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            return self._pick_outside(call)
        return self._candidates[self._pick()]

    def _pick_outside(self, call: CallContext) -> CandidateT | None:
        """The same among the rest, on the same counter: the path of a retry, in O(n)."""
        rest = [i for i, candidate in enumerate(self._candidates) if candidate not in call.excluded]
        if not rest:
            return None
        return self._candidates[rest[StaticStride([self._weights[i] for i in rest], self.turn).pick()]]


class SmoothPicker(Generic[CandidateT]):
    """Turns by nginx's rule. An endpoint that stays keeps its place in the cycle when the set changes."""

    __slots__ = ("_candidates", "_lock", "_random", "_scheduler")

    def __init__(
        self, candidates: Sequence[CandidateT], weights: Sequence[float], random: Random, previous: Picker[Any] | None
    ) -> None:
        self._random = random.random
        self._lock = Lock()
        if isinstance(previous, SmoothPicker):
            self._candidates = list(candidates)
            places = previous.places()
            self._scheduler = SmoothWeighted(weights, [places.get(candidate, 0.0) for candidate in candidates])
            return
        start = random.randrange(len(candidates))  # decides who is first among equals
        self._candidates = [*candidates[start:], *candidates[:start]]
        self._scheduler = SmoothWeighted([*weights[start:], *weights[:start]])
        for _ in range(random.randrange(_WARM_UP)):  # and the heaviest is not always first
            self._scheduler.pick()

    def places(self) -> dict[Any, float]:
        """Where each candidate stands in the cycle."""
        with self._lock:
            return dict(zip(self._candidates, self._scheduler.current, strict=True))

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            rest = [candidate for candidate in self._candidates if candidate not in call.excluded]
            return draw_by_weight(rest, self._random)
        with self._lock:
            return self._candidates[self._scheduler.pick()]


class EdfPicker(Generic[CandidateT]):
    """Turns by earliest deadline."""

    __slots__ = ("_candidates", "_lock", "_random", "_scheduler")

    def __init__(self, candidates: Sequence[CandidateT], random: Random) -> None:
        self._random = random.random
        self._lock = Lock()
        self._candidates = list(candidates)
        self._scheduler = EdfScheduler.with_picks(self._candidates, _weight_of, random.getrandbits(31))

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            rest = [candidate for candidate in self._candidates if candidate not in call.excluded]
            return draw_by_weight(rest, self._random)
        with self._lock:
            return self._scheduler.pick(_weight_of)


def _weight_of(candidate: Candidate) -> float:
    return candidate.weight
