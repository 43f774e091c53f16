"""Explicit probes: which endpoints to ask for their load, and how often, when responses alone do not tell of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Generic

from meshlb._validate import number, seconds, text
from meshlb.balancing.base import CandidateT
from meshlb.errors import ConfigError

PROBE_PATH: Final = "/.well-known/endpoint-load-metrics"
"""Where ``meshlb.server.asgi`` answers probes."""

PROBE_METHOD: Final = "/meshlb.v1.LoadReports/Get"
"""The unary method by which ``meshlb.server.grpc`` answers probes: an empty request, an empty response, the report in
the trailers."""

LEAST: Final = 2
"""Probes per look while calls are few: with fewer than two in the pool there is no choice."""

_LONGEST_REST: Final = 300.0
"""Seconds. Who reports nothing is asked again at times: it may have been replaced by a version that does."""


@dataclass(frozen=True, slots=True)
class Probes:
    """How often endpoints are asked for their load report besides what comes with responses, and by what.

    * ``rate``: probes per call at most (3: the paper's r_probe); what responses carry counts among them. While calls
      are few there are two per ``interval`` all the same, or none would be fresh when the next call comes.
    * ``interval``: seconds between two looks at the pool (0.5: half the life of a probe).
    * ``timeout``: seconds for a probe (1.0: an answer that took longer tells of the past).
    * ``idle``: seconds after the last call for which probing goes on (10: a service that is not called costs its
      servers nothing).
    * ``path``: what HTTP transports send a HEAD request for. ``method``: what gRPC channels call, with an empty
      request; any unary method that bears one will do if the server reports in its trailers, such as
      ``/grpc.health.v1.Health/Check``.

    Raises ConfigError naming the field.
    """

    rate: float = 3.0
    interval: float = 0.5
    timeout: float = 1.0
    idle: float = 10.0
    path: str = PROBE_PATH
    method: str = PROBE_METHOD

    def __post_init__(self) -> None:
        number("Probes.rate", self.rate, above=0, most=1000)
        for field in ("interval", "timeout", "idle"):
            seconds(f"Probes.{field}", getattr(self, field))
        for field in ("path", "method"):
            value = getattr(self, field)
            text(f"Probes.{field}", value)
            if not value.startswith("/") or not value.isascii() or any(character.isspace() for character in value):
                raise ConfigError(f"Probes.{field}: {value!r} does not begin with a slash, or is no path")


class ProbeDemand(Generic[CandidateT]):
    """The rules of ``Probes``, without a clock of their own. Not safe from several threads without a lock.

    An endpoint whose probe brings no report (it failed, timed out, or was answered without one) is left alone for a
    time that doubles with every such probe in a row, up to five minutes; any report ends that.
    """

    __slots__ = ("_asked", "_budget", "_calls", "_last_call", "_options", "_random", "_resting", "calls", "carried")

    def __init__(self, options: Probes, random: Random) -> None:
        self._options = options
        self._random = random
        self.calls = 0
        """Picks so far. Counted by the picker without a lock: what that loses does not matter."""
        self.carried = 0
        """Reports that came with responses since the last look."""
        self._calls = 0
        self._last_call = -float("inf")
        self._budget = 0.0
        self._asked: dict[int, float] = {}
        self._resting: dict[int, tuple[int, float]] = {}

    def take(
        self, now: float, candidates: Sequence[CandidateT], fresh: Collection[int], target: int
    ) -> list[CandidateT]:
        """Whom to ask now: a random few, none twice, to bring the pool from ``fresh`` to ``target`` endpoints. Nobody
        if as many reports have come with responses since the last look.

        ``fresh``: the ``id()`` of the candidates that the pool knows of well enough. To be called once an interval.
        """
        options = self._options
        calls, self._calls = self.calls - self._calls, self.calls
        carried, self.carried = self.carried, 0
        if calls:
            self._last_call = now
        if now - self._last_call > options.idle or len(candidates) < 2 or carried >= target:
            return []
        missing = target - len(fresh)
        # No more is saved up than what is missing now.
        self._budget = min(max(self._budget + options.rate * calls - carried, LEAST), max(missing, LEAST))
        self._asked = {asked: at for asked, at in self._asked.items() if now - at < options.timeout}
        wanted = min(int(self._budget), missing - len(self._asked))
        if wanted <= 0:
            return []
        chosen: list[CandidateT] = []
        # Of many that must not be asked some are drawn in vain, but never all are looked at.
        for i in self._random.sample(range(len(candidates)), min(len(candidates), 4 * wanted + len(fresh))):
            candidate = candidates[i]
            if self._may_ask(candidate, now, fresh):
                chosen.append(candidate)
                if len(chosen) == wanted:
                    break
        self._budget -= len(chosen)
        for candidate in chosen:
            self._asked[id(candidate)] = now
        return chosen

    def _may_ask(self, candidate: CandidateT, now: float, fresh: Collection[int]) -> bool:
        key = id(candidate)
        # A report of one whose last call failed would not get into the pool.
        if key in fresh or key in self._asked or candidate.latency.penalty:
            return False
        rest = self._resting.get(key)
        return rest is None or now >= rest[1]

    def reported(self, candidate: object) -> None:
        """Note a report, with a response or a probe."""
        self._asked.pop(id(candidate), None)
        self._resting.pop(id(candidate), None)

    def silent(self, candidate: object, now: float) -> None:
        """Note a probe that brought no report."""
        self._asked.pop(id(candidate), None)
        times = self._resting.get(id(candidate), (0, 0.0))[0] + 1
        rest = min(2 * self._options.interval * 2.0 ** min(times, 30), _LONGEST_REST)
        self._resting[id(candidate)] = (times, now + rest * (0.5 + self._random.random()))

    def carry_over(self, former: ProbeDemand[CandidateT], members: Collection[int]) -> None:
        """Go on where the demand of the picker before stood, with the candidates of these ``id()`` alone."""
        self.calls, self._calls, self.carried = former.calls, former._calls, former.carried
        self._last_call, self._budget = former._last_call, former._budget
        self._asked = {key: at for key, at in former._asked.items() if key in members}
        self._resting = {key: rest for key, rest in former._resting.items() if key in members}
