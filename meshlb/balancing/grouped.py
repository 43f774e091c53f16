"""Several groups of endpoints, each with a share of the calls and a picker of the policy's own: tiers and zones."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from typing import Any, Final, Generic, Protocol

from xxhash import xxh32_intdigest

from meshlb.balancing.base import CandidateT, CandidateT_co, Picker, PolicyEnvironment
from meshlb.balancing.hash_keys import key_bytes
from meshlb.model import CallContext, HashKey

_WHOLE: Final = 2**32
_MASK: Final = _WHOLE - 1

_GOLDEN: Final = 0x9E3779B1
"""2^32 times the golden section, to the next odd number without a small factor (Knuth, The Art of Computer Programming
3, 6.4). The multiples of it are spread evenly over a circle, however many there are: after n calls each group is within
a few calls of its share, where a random draw would be off by the root of n."""

_SEED: Final = 0x67726F75
"""Not the seed that tables hash keys with: within its group a key must still be able to go to any endpoint."""


class PickerGroup(Protocol[CandidateT_co]):
    """What is read of a group. ``tier``: groups of the same tier stand in for each other first."""

    @property
    def name(self) -> str: ...
    @property
    def tier(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def members(self) -> Sequence[CandidateT_co]: ...


class GroupedPicker(Generic[CandidateT]):
    """Chooses a group by its exact share, then the group's own picker chooses.

    * The groups take their turns smoothly (see ``_GOLDEN``), without a lock; the start is random.
    * For a policy that ``uses_key``, a key's group is fixed by its hash, as long as the shares stay; where they change,
      only the keys at the borders move.
    * A retry goes to the tier of the endpoints that were tried, and to the next tiers when there is nobody left in it.
      A group that has nobody to offer passes the call on in the same order.
    """

    __slots__ = ("_by_key", "_bytes_of", "_ends", "_group_of", "_groups", "_live", "_only", "_tiers", "pickers", "turn")

    def __init__(
        self,
        groups: Sequence[PickerGroup[CandidateT]],
        pickers: Sequence[Picker[CandidateT]],
        environment: PolicyEnvironment,
        previous: object,
        *,
        by_key: bool,
    ) -> None:
        self._groups = tuple(pickers)
        self._tiers = tuple(group.tier for group in groups)
        self.pickers: Mapping[str, Picker[CandidateT]] = {
            group.name: picker for group, picker in zip(groups, pickers, strict=True)
        }
        self._group_of = {member: i for i, group in enumerate(groups) for member in group.members}
        self._by_key = by_key
        # What the policy itself hashes of a key.
        self._bytes_of: Callable[[HashKey], bytes] = getattr(pickers[0], "bytes_of", key_bytes)
        self._live = tuple(i for i, group in enumerate(groups) if group.share > 0) or (0,)
        shares = [max(groups[i].share, 0.0) for i in self._live]
        total = sum(shares) or 1.0
        # The last end is left out: whatever lies beyond the others is the last group's, so that no rounding is lost.
        self._ends = [round(end / total * _WHOLE) for end in accumulate(shares)][:-1]
        self._only = self._groups[self._live[0]] if len(self._live) == 1 else None
        self.turn: Iterator[int] = (
            previous.turn if isinstance(previous, GroupedPicker) else count(environment.random.getrandbits(32))
        )

    def pick(self, call: CallContext) -> CandidateT | None:
        if call.excluded:
            return self._pick_again(call)
        picker = self._only
        if picker is None:
            picker = self._groups[self._draw(call.key)]
        picked = picker.pick(call)
        return self._pick_again(call) if picked is None else picked

    def _draw(self, key: HashKey | None) -> int:
        if key is not None and self._by_key:
            position = xxh32_intdigest(self._bytes_of(key), _SEED)
        else:
            position = next(self.turn) * _GOLDEN & _MASK
        return self._live[bisect_right(self._ends, position)]

    def _pick_again(self, call: CallContext) -> CandidateT | None:
        """A pick that has to avoid some endpoints: in the same group, its tier, the tiers behind it, those before."""
        tried = [group for candidate in call.excluded if (group := self._group_of.get(candidate)) is not None]  # type: ignore[call-overload]  # any object may be asked for
        start = min(tried) if tried else self._draw(call.key)
        tier = self._tiers[start]
        order = sorted(
            range(len(self._groups)),
            key=lambda i: (i != start, self._tiers[i] != tier, self._tiers[i] < tier, i),
        )
        for i in order:
            picked = self._groups[i].pick(call)
            if picked is not None and picked not in call.excluded:
                return picked
        return None

    # -- what else a policy's picker may offer -----------------------------------------------------------------

    def observe_report(self, candidate: CandidateT, report: Any) -> None:
        """Hand a load report on to the picker of the endpoint's group."""
        self._hand_on("observe_report", candidate, report)

    def observe_probe(self, candidate: CandidateT, report: Any) -> None:
        """Hand the answer to a probe on to the picker of the endpoint's group."""
        self._hand_on("observe_probe", candidate, report)

    def probes_wanted(self) -> list[CandidateT]:
        """Whom the pickers in use want probed; those that only retries get to, and stand-bys, are left alone."""
        wanted: list[CandidateT] = []
        for i in self._live:
            ask = getattr(self._groups[i], "probes_wanted", None)
            if ask is not None:
                wanted += ask()
        return wanted

    def _hand_on(self, name: str, candidate: CandidateT, report: Any) -> None:
        group = self._group_of.get(candidate)
        observe = None if group is None else getattr(self._groups[group], name, None)
        if observe is not None:
            observe(candidate, report)
