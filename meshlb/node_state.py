"""What is known of one endpoint: its counts, where it stands, and what the control plane changes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, Self

from meshlb.balancing.ewma import PeakEwma
from meshlb.model import Endpoint, Status
from meshlb.resilience.breaker import BreakerState, CircuitBreaker
from meshlb.resilience.ejection import EjectionCap
from meshlb.topology.eligibility import Standing

if TYPE_CHECKING:
    from meshlb.health.state import HealthState
    from meshlb.lease import Lease
    from meshlb.node import Node
    from meshlb.resilience.limits import ConcurrencyLimiter
    from meshlb.topology.slow_start import Ramp

_NEVER: Final = float("-inf")

_ALWAYS: Final = float("inf")

_CLOSED: Final = BreakerState.CLOSED  # by this name it is found faster, which counts for 10,000 of them
_FIT: Final = (Status.PASSING, Status.WARNING)

SUSPICIOUS: Final = 0.5
"""Seconds. Of a longer latency it is asked whether this process stood still; a shorter stall is none."""


class NodeOwner(Protocol):
    """What a node asks its cluster, and tells it from any thread, without its lock held."""

    @property
    def limiter(self) -> ConcurrencyLimiter | None:
        """What bounds the attempts under way; None: nothing does."""
        ...

    def excuses(self, started: float, now: float) -> bool:
        """Whether this process stood still for so long that an attempt's time says nothing of the endpoint. Called
        with the node's lock held: must take no lock of a cluster or node."""
        ...

    def node_opened(self, node: Node, duration: float) -> None:
        """The breaker has just opened, for ``duration`` seconds."""
        ...

    def node_closed(self, node: Node) -> None:
        """The breaker has just closed: the endpoint is back for good."""
        ...

    def node_changed(self, node: Node) -> None:
        """It was taken out or put back by hand."""
        ...

    def ejections_doubted(self) -> None:
        """So many breakers would open that it is hardly the endpoints' fault (see ``EjectionCap``). Called with a
        node's lock held: must take no lock of a cluster or node."""
        ...

    def node_drained(self, node: Node) -> None:
        """A node that is retired, or out of the subset, has just lost its last attempt."""
        ...

    def lease_abandoned(self, lease: Lease) -> None:
        """A lease was garbage collected open. Called from ``__del__``: must take no lock at all."""
        ...


class NodeState:
    """A ``Node`` but for the life of its attempts.

    The counters are plain ints under one short lock per node; pickers read them without it.
    """

    __slots__ = ("__weakref__", "_cap", "_clock", "_counted", "_limiter", "_normal", "_notable", "_owner",
                 "_quiet_until", "_waiting", "breaker", "calls", "ejected", "endpoint", "failures", "fraction",
                 "health", "ignored", "in_flight", "last_failure", "last_picked", "latency", "limit", "lock",
                 "out_of_subset", "outlier", "overloads", "ramp", "readmitted_at", "refused", "retired",
                 "successes", "weight")  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        owner: NodeOwner,
        *,
        clock: Callable[[], float],
        latency: PeakEwma,
        breaker: CircuitBreaker | None,
        cap: EjectionCap,
        health: HealthState | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.health = health
        """What active checks have shown; None if there are none."""
        self.weight = endpoint.weight
        """What policies go by: the registry's, times what a subset and slow start make of it (see ``shares``)."""
        self.fraction = 1.0
        """The part of the endpoint that lies in this process's subset."""
        self.ramp: Ramp | None = None
        """Its slow start, if it is in one."""
        self.out_of_subset = False
        """In the set, but not among those that this process uses."""
        self.latency = latency
        self.breaker = breaker
        self.in_flight = 0
        self.last_picked = _NEVER
        self.last_failure = ""
        """The reason of the last failure, in words; kept for the snapshot."""
        self.ejected = False
        """Occupies a place among the ejected: from the breaker's opening until it closes, or as an outlier."""
        self.refused = False
        """Its breaker would open, but too many others are out."""
        self.outlier = ""
        """Why outlier detection keeps it out of rotation, in words; empty: it does not."""
        self.readmitted_at = 0.0
        """When outlier detection lets an outlier back in."""
        self.retired = False
        """No longer in the set: it gets no new attempt and ends with its last one."""
        self.calls = 0
        """Attempts begun."""
        self.successes = 0
        self.failures = 0
        self.overloads = 0
        self.ignored = 0
        self.lock = threading.Lock()
        self._owner = owner
        self._clock = clock
        self._cap = cap
        self._limiter = owner.limiter
        self.limit = None if self._limiter is None else self._limiter.endpoint_limit()
        """How many attempts it may have under way; None: any number."""
        # Starting times of the attempts without an answer, in that order, by their number.
        self._waiting: dict[int, float] = {}
        # In the set, breaker closed, no limits: the one flag that the common path of `begin` looks at.
        self._normal = True
        # Until when a success needs nothing but to be counted: the one number that the common path of `finish` looks
        # at. The breaker is told of the successes until then by their number.
        self._quiet_until = _ALWAYS
        self._counted = 0
        # From which latency on a success is looked at more closely.
        self._notable = SUSPICIOUS if breaker is None else min(SUSPICIOUS, breaker.slow_after)
        self._note_state()

    # -- what a pick reads -------------------------------------------------------------------------------------

    def oldest_wait(self, now: float) -> float:
        """Age in seconds of the oldest attempt that has no answer yet; 0 without one.

        Attempts are kept in order of their start, so the first one is the oldest. A concurrent change only costs
        this reading its precision.
        """
        try:
            return now - next(iter(self._waiting.values()))
        except (StopIteration, RuntimeError):
            return 0.0

    @property
    def is_fit(self) -> bool:
        """Whether there is plainly nothing against the endpoint: all of what follows in one, for who asks thousands."""
        breaker, health = self.breaker, self.health
        return (
            (breaker is None or breaker.state is _CLOSED)
            and not self.outlier
            and (health is None or not (health.failed or health.awaited))
            and self.endpoint.status in _FIT
        )

    @property
    def is_open(self) -> bool:
        """Whether this process's own experience keeps the endpoint out of rotation: its breaker, or outlier
        detection."""
        return bool(self.outlier) or (self.breaker is not None and self.breaker.is_open)

    @property
    def is_forced_open(self) -> bool:
        """Whether somebody has taken it out by hand: then it is not even used in panic."""
        return self.breaker is not None and self.breaker.state is BreakerState.FORCED_OPEN

    @property
    def is_out(self) -> bool:
        """Whether this process keeps it out of rotation, wholly or in part, for whatever reason."""
        return self.ejected or (self.breaker is not None and not self.breaker.lets_all_through)

    @property
    def is_unhealthy(self) -> bool:
        """Whether active checks keep the endpoint out."""
        return self.health is not None and self.health.failed

    @property
    def is_unchecked(self) -> bool:
        """Whether the endpoint is out until its first active check."""
        return self.health is not None and self.health.awaited

    @property
    def standing(self) -> Standing:
        """Where the endpoint stands."""
        if self.retired:
            return Standing.DRAINING
        if self.endpoint.status is Status.MAINTENANCE:
            return Standing.MAINTENANCE
        if self.endpoint.status is Status.CRITICAL:
            return Standing.CRITICAL
        if self.is_unhealthy:
            return Standing.UNHEALTHY
        if self.is_unchecked:
            return Standing.UNCHECKED
        judged = self.judged
        return Standing.OUT_OF_SUBSET if judged is Standing.READY and self.out_of_subset else judged

    @property
    def judged(self) -> Standing:
        """Where it stands by this process's own experience alone: ready, open, half open or ejected."""
        if self.breaker is not None and not self.breaker.lets_all_through:
            return Standing.OPEN if self.breaker.is_open else Standing.HALF_OPEN
        return Standing.EJECTED if self.outlier else Standing.READY

    @property
    def is_full(self) -> bool:
        """Whether it has as many attempts under way as it may."""
        return self.limit is not None and self.in_flight >= self.limit.limit

    def failure_rate(self) -> float | None:
        """The share of failed calls in the breaker's window; None without one, or with too few calls in it."""
        now = self._clock()
        with self.lock:
            if self.breaker is None:
                return None
            self._hand_in(self.successes)
            return self.breaker.rate(now)

    def _hand_in(self, successes: int) -> None:
        """Tell the breaker of the successes, ``successes`` of all, that it has not been told of."""
        if self.breaker is not None and successes > self._counted:
            self.breaker.add_successes(successes - self._counted)
            self._counted = successes

    def _note_state(self) -> None:
        """To be called, under the lock, after whatever may have changed where the endpoint stands."""
        breaker = self.breaker
        calm = breaker is None or breaker.lets_all_through
        if self.ejected and calm and not self.outlier:
            self.ejected = False
            self._cap.give_back()
        self._normal = calm and not (self.retired or self.out_of_subset or self._limiter is not None)
        if self.retired or self.out_of_subset:
            self._quiet_until = _NEVER
        else:
            self._quiet_until = _ALWAYS if breaker is None else breaker.quiet_until

    def _refuse(self, now: float, refused: bool) -> None:
        """Note, under the lock, whether the breaker would open and may not."""
        if refused or self.refused:
            change = int(refused) - int(self.refused)
            self.refused = refused
            if self._cap.count_refused(now, change):
                self._owner.ejections_doubted()

    # -- what the control plane does ---------------------------------------------------------------------------

    def poll_breaker(self, *, now_at_once: bool = False) -> bool:
        """Move an open breaker to half-open if its time is up, or ``now_at_once``. True if that happened."""
        now = self._clock()
        with self.lock:
            if self.breaker is None:
                return False
            changed = self.breaker.probe_now(now) if now_at_once else self.breaker.poll(now)
            self._note_state()
            return changed

    def eject(self, reason: str, until: float) -> bool:
        """Take it out of rotation as an outlier. False if it is out already, or if too many others are."""
        with self.lock:
            if self.retired or self.is_out or not self._cap.try_take(self._clock()):
                return False
            self.ejected = True
            self.outlier = reason
            self.readmitted_at = until
            self._note_state()
            return True

    def readmit(self) -> None:
        """End its ejection as an outlier."""
        with self.lock:
            self.outlier = ""
            self._note_state()

    def leave_subset(self) -> bool:
        """Note that this process does not use the endpoint; its attempts go on. True if it has none."""
        with self.lock:
            self.out_of_subset = True
            self._note_state()
            return self.in_flight == 0

    def enter_subset(self) -> None:
        """Note that this process uses the endpoint."""
        with self.lock:
            self.out_of_subset = False
            self._note_state()

    def effective_weight(self, now: float) -> float:
        """The registry's weight, times the part that a subset and slow start leave of it. For people and exporters."""
        return self.endpoint.weight * self.fraction * (1.0 if self.ramp is None else self.ramp.at(now))

    def retire(self) -> bool:
        """Take the endpoint out of the set; its attempts go on. True if it has none."""
        with self.lock:
            self.retired = True
            self._refuse(self._clock(), False)
            self.outlier = ""  # if it comes back, it is judged anew
            self.ramp = None
            if self.ejected:
                self.ejected = False
                self._cap.give_back()
            self._note_state()
            return self.in_flight == 0

    def restore(self, endpoint: Endpoint) -> None:
        """Take over what the registry now says of the same endpoint, which may have been retired meanwhile."""
        with self.lock:
            self.endpoint = endpoint
            self.weight = endpoint.weight
            self.retired = False
            if self.breaker is not None and not self.breaker.lets_all_through and not self.ejected:
                self.ejected = True
                self._cap.take()  # it is out, whatever the cap says
            self._note_state()

    def reborn(self, cap: EjectionCap) -> Self:
        """What takes this node's place in the child of a fork: all that was learnt, and no attempt.

        Leases that the parent held at the fork may still be closed in the child. They go on with this node, which
        nobody reads any more, and so cannot make the counts of the new one wrong.
        """
        heir = type(self)(
            self.endpoint, self._owner, clock=self._clock, latency=self.latency, breaker=self.breaker, cap=cap
        )
        heir.health = self.health
        heir.last_picked = self.last_picked
        heir.last_failure = self.last_failure
        if heir.breaker is not None:
            heir.breaker.forget_probes()
            if not heir.breaker.lets_all_through:
                heir.ejected = True
                cap.take()
        self.orphan()
        return heir

    def orphan(self) -> None:
        """Let what is still open end without consequences: in the child of a fork, where the lock may be held for
        ever by a thread that does not exist."""
        self.lock = threading.Lock()
        self.latency = PeakEwma()
        self.breaker = None
        self._limiter = self.limit = None
        self.outlier = ""
        self.retired = self.ejected = self.out_of_subset = self.refused = False
        self._note_state()

    def __repr__(self) -> str:
        return f"<Node {self.endpoint.address} {self.standing} in_flight={self.in_flight}>"
