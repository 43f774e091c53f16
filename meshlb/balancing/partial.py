"""Where some endpoints take only a part of the calls that the policy would give them: slow start, the edge of an
aperture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic

from meshlb.balancing.base import CandidateT, Picker, Policy, PolicyEnvironment
from meshlb.model import CallContext, HashKey

Part = Callable[[float], float]
"""From a clock reading to the part of its calls that an endpoint takes then, 0 to 1."""

_TURNS: Final = 8
"""Turns that may be passed over in a row. Where so many come one after the other nearly everybody takes only a part."""


def build_partial(
    policy: Policy,
    candidates: Sequence[CandidateT],
    environment: PolicyEnvironment,
    previous: Picker[Any] | None,
    parts: Mapping[CandidateT, Part],
) -> Picker[CandidateT]:
    """``policy.build``, with ``parts`` for some of the candidates. Without parts, the policy's picker as it is."""
    before = others_before = previous
    if isinstance(previous, PartialPicker):
        before = previous.picker
        others_before = before if previous.others is None else previous.others
    picker = policy.build(candidates, environment, before)
    parts = {candidate: parts[candidate] for candidate in candidates if candidate in parts}
    others = [candidate for candidate in candidates if candidate not in parts]
    if not parts or (not others and not getattr(policy, "takes_turns", False)):
        return picker  # of nobody's calls there is a part that nobody else could take
    rest: Picker[CandidateT] | None = None
    if others and not getattr(policy, "wants_reports", False):
        rest = policy.build(others, environment, others_before)
    return PartialPicker(policy, picker, rest, parts, environment)


class PartialPicker(Generic[CandidateT]):
    """The policy's own picker; but of the calls that it gives to one of ``parts``, that one takes only its part.

    * The others' own picker chooses for the rest, as if those in ``parts`` were not there. So an endpoint never gets
      more than its part of what the policy thinks right for it, whether that is a turn or a rush to the idlest.
    * For a policy that ``takes_turns`` the next turn is taken instead, which makes the shares exactly proportional.
    * For one that ``wants_reports``, whose picker must see all of them, the rest is picked outside ``parts``.
    * Where a call's key decides, key and endpoint are hashed to a number that its part has to exceed. While the part
      grows, a key stays where it was or moves to its new endpoint, once, and all processes move the same keys.

    Whatever else the policy's picker offers is offered here too.
    """

    __slots__ = ("_clock", "_keyed_lot", "_parts", "_random", "_turns", "others", "picker")

    def __init__(
        self,
        policy: Policy,
        picker: Picker[CandidateT],
        others: Picker[CandidateT] | None,
        parts: Mapping[CandidateT, Part],
        environment: PolicyEnvironment,
    ) -> None:
        self.picker = picker
        self.others = others
        self._parts = parts
        self._clock = environment.clock
        self._random = environment.random.random
        self._turns = _TURNS if getattr(policy, "takes_turns", False) else 1
        self._keyed_lot: Callable[[HashKey, CandidateT], float] | None = None
        if getattr(policy, "uses_key", False):
            from meshlb.balancing.hash_keys import key_bytes, lot  # with xxhash, which the other policies do without

            bytes_of = getattr(picker, "bytes_of", key_bytes)  # what the policy itself hashes of a key
            self._keyed_lot = lambda key, candidate: lot(bytes_of(key), candidate)

    def pick(self, call: CallContext) -> CandidateT | None:
        picked: CandidateT | None = None
        for _ in range(self._turns):
            picked = self.picker.pick(call)
            part = None if picked is None else self._parts.get(picked)
            if picked is None or part is None or self._lot(picked, call.key) < part(self._clock()):
                return picked
        if self.others is not None:
            other = self.others.pick(call)
        else:
            other = self.picker.pick(call.excluding({*call.excluded, *self._parts}))
        return picked if other is None else other

    def _lot(self, candidate: CandidateT, key: HashKey | None) -> float:
        return self._random() if key is None or self._keyed_lot is None else self._keyed_lot(key, candidate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.picker, name)
