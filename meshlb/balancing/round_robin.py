"""Every endpoint in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Generic

from meshlb.balancing.base import CandidateT, Picker, PolicyEnvironment
from meshlb.model import CallContext


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Every endpoint in turn, whatever its weight or load.

    The turn starts at a random endpoint, or a fleet of freshly started clients would send its first calls to the same
    one, and goes on from where it stood when the set changes: starting over at each change would favour the endpoints
    at the head of the list (grpc-go ``endpointsharding``, Envoy ``round_robin_lb.h``).
    """

    name: ClassVar[str] = "round_robin"
    takes_turns: ClassVar[bool] = True

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> RoundRobinPicker[CandidateT]:
        turn = turn_of(previous, environment)
        return RoundRobinPicker(candidates, turn)


def turn_of(previous: Picker[Any] | None, environment: PolicyEnvironment) -> Iterator[int]:
    """The running counter of the picker that is replaced, or a new one with a random start.

    ``itertools.count``: its ``next`` is one atomic step, with the GIL and without it, so no lock is needed. Both
    pickers share it while calls still hold the old one.
    """
    turn = getattr(previous, "turn", None)
    return turn if isinstance(turn, count) else count(environment.random.getrandbits(32))


class RoundRobinPicker(Generic[CandidateT]):
    """The n-th pick is candidate ``n mod len``."""

    __slots__ = ("_candidates", "_n", "turn")

    def __init__(self, candidates: Sequence[CandidateT], turn: Iterator[int]) -> None:
        self._candidates = list(candidates)
        self._n = len(self._candidates)
        self.turn = turn

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded or not self._n:
            return self._pick_outside(call)
        return self._candidates[next(self.turn) % self._n]

    def _pick_outside(self, call: CallContext) -> CandidateT | None:
        """A retry takes turns of its own from the same counter, so the load stays even. (Taking the next one in the
        list instead would give the whole share of a failed endpoint to its successor, on top of the successor's own.)
        """
        candidates, excluded = self._candidates, call.excluded
        turn = 0
        for _ in candidates:
            turn = next(self.turn)
            candidate = candidates[turn % self._n]
            if candidate not in excluded:
                return candidate
        # Other threads may have taken the turns in between: one look at every candidate settles it.
        for offset in range(self._n):
            candidate = candidates[(turn + offset) % self._n]
            if candidate not in excluded:
                return candidate
        return None
