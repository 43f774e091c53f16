"""What a balancing policy is: the protocol that all of them, and yours, are written to.

A **policy** is a small frozen dataclass: the options, and ``build``. ``build`` makes a **picker** from the candidates
that are eligible now. Pickers are what calls use: many threads at once, no lock, no I/O, no waiting. When the set of
candidates changes, a new picker is built off the call path and swapped in; ``previous`` lets it carry on where the
old one stood (a counter, a random start). State that belongs to an endpoint (in flight, latency) lives on the
candidate and survives all of this.

The split into an immutable picker and a control plane that builds it is grpc-go's (``balancer.Picker``); keeping load
on the endpoint is Finagle's (``Balancer.update``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Protocol, TypeVar

from meshlb.balancing.ewma import PeakEwma
from meshlb.model import CallContext, Endpoint


class Candidate(Protocol):
    """An endpoint's live state, as far as policies read it. All of it is read without a lock: a pick may be late by a
    call or two, never wrong for long.

    ``weight``: finite, above 0. ``in_flight``: attempts not yet closed. ``latency``: see PeakEwma. ``last_picked``:
    clock reading of the last pick, ``-inf`` before the first.
    """

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def weight(self) -> float: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def latency(self) -> PeakEwma: ...
    @property
    def last_picked(self) -> float: ...

    def oldest_wait(self, now: float) -> float:
        """Age in seconds of the oldest attempt that has no answer yet; 0 without one."""
        ...


CandidateT = TypeVar("CandidateT", bound=Candidate)
CandidateT_co = TypeVar("CandidateT_co", bound=Candidate, covariant=True)


class Picker(Protocol[CandidateT_co]):
    """Chooses among a fixed set of candidates."""

    def pick(self, call: CallContext) -> CandidateT_co | None:
        """Choose one. None if there is no candidate outside ``call.excluded``. Never raises, never blocks."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyEnvironment:
    """What a policy may use besides the candidates. Clock (seconds, monotonic) and random source are parameters so
    that every rule can be tested and simulated without waiting."""

    service: str
    clock: Callable[[], float]
    random: Random


class Policy(Protocol):
    """The options of an algorithm, and how to make a picker from them. Implementations are frozen dataclasses.

    What costs a call something is done for those policies only that ask for it, by class attributes (missing: False):

    * ``uses_key``: the picker goes by ``call.key``, so one is looked for (``ServiceConfig.hash_on``).
    * ``hashes_callers``: if there is none, the address of the caller whose request is being served will do.
    * ``wants_reports``: the picker has a method ``observe_report(candidate, report)``, which gets every ``LoadReport``
      that comes with a response (``meshlb.balancing.orca``). Called from any thread; must not block.
    * ``probes``: a ``Probes`` (``meshlb.balancing.probes``), if endpoints are to be asked for reports too. The picker
      has a method ``probes_wanted()``, which is called once each ``probes.interval`` and returns the candidates to ask
      now, and ``observe_probe(candidate, report)``, which gets what each of them answered; None for no report.

    Three more say how an endpoint is treated that is to take only a part of its calls: in slow start, and at the edge
    of an aperture. Without them the picker's choice of such an endpoint is accepted in that part of the cases, and
    another one is picked in the others, which suits every policy.

    * ``uses_weight``: the shares follow the candidates' ``weight``, so that the edge of an aperture may be told by it.
    * ``ramps_by_weight``: so may slow start. (Not where a light candidate that is idle would be picked nevertheless.)
    * ``takes_turns``: picking once more gives the next one in turn, so that what one declines goes to all the others.
    """

    name: ClassVar[str]

    def build(
        self, candidates: Sequence[CandidateT], environment: PolicyEnvironment, previous: Picker[Any] | None
    ) -> Picker[CandidateT]:
        """Make a picker for these candidates. Called off the call path; may take milliseconds.

        ``previous`` is the picker that this one replaces (None at first, or after a change of policy).
        """
        ...
