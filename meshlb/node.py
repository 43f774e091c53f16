"""One endpoint's live state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

from meshlb.balancing.ewma import PeakEwma
from meshlb.lease import NOT_STARTED, Lease, abandon
from meshlb.model import Endpoint, Outcome, OutcomeKind, Status
from meshlb.resilience.breaker import BreakerState, CircuitBreaker
from meshlb.resilience.ejection import EjectionCap
from meshlb.topology.eligibility import Standing

__all__ = ["NOT_STARTED", "Lease", "Node", "NodeOwner", "abandon"]

_NEVER: Final = float("-inf")

_NO_GENERATION: Final = -1
"""Of a lease whose end is not the breaker's business."""


class NodeOwner(Protocol):
    """What a node tells its cluster, from any thread, without its lock held."""

    def node_opened(self, node: Node, duration: float) -> None:
        """The breaker has just opened, for ``duration`` seconds."""
        ...

    def node_closed(self, node: Node) -> None:
        """The breaker has just closed: the endpoint is back for good."""
        ...

    def node_drained(self, node: Node) -> None:
        """A retired node has just lost its last attempt."""
        ...

    def lease_abandoned(self, lease: Lease) -> None:
        """A lease was garbage collected open. Called from ``__del__``: must take no lock at all."""
        ...


class Node:
    """Everything that is known of one endpoint. Keyed by the endpoint's identity, it survives updates of the set.

    The counters are plain ints under one short lock per node; pickers read them without it. It satisfies
    ``balancing.base.Candidate``.
    """

    __slots__ = ("__weakref__", "_cap", "_clock", "_normal", "_owner", "_waiting", "breaker", "calls", "ejected",
                 "endpoint", "failures", "ignored", "in_flight", "last_failure", "last_picked", "latency", "lock",
                 "overloads", "retired", "successes", "weight")  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        owner: NodeOwner,
        *,
        clock: Callable[[], float],
        latency: PeakEwma,
        breaker: CircuitBreaker | None,
        cap: EjectionCap,
    ) -> None:
        self.endpoint = endpoint
        self.weight = endpoint.weight
        self.latency = latency
        self.breaker = breaker
        self.in_flight = 0
        self.last_picked = _NEVER
        self.last_failure = ""
        """The reason of the last failure, in words; kept for the snapshot."""
        self.ejected = False
        """Occupies a place among the ejected: from the breaker's opening until it closes."""
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
        # Starting times of the attempts without an answer, in that order, by the id of their lease.
        self._waiting: dict[int, float] = {}
        # Not retired, breaker closed, no failure in a row: the one flag that the common path looks at.
        self._normal = True
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
    def is_open(self) -> bool:
        """Whether the breaker keeps the endpoint out of rotation altogether."""
        return self.breaker is not None and self.breaker.state is BreakerState.OPEN

    @property
    def standing(self) -> Standing:
        """Where the endpoint stands."""
        if self.retired:
            return Standing.DRAINING
        if self.endpoint.status is Status.MAINTENANCE:
            return Standing.MAINTENANCE
        if self.endpoint.status is Status.CRITICAL:
            return Standing.CRITICAL
        if self.breaker is not None and self.breaker.state is not BreakerState.CLOSED:
            return Standing.OPEN if self.is_open else Standing.HALF_OPEN
        return Standing.READY

    # -- the life of an attempt --------------------------------------------------------------------------------

    def begin(self, force: bool = False) -> Lease | None:
        """Start an attempt. None if the endpoint is retired or its breaker refuses; ``force`` passes the breaker by
        (panic)."""
        now = self._clock()
        lease = Lease(self, now)
        with self.lock:
            if not self._normal and not self._admit(lease, now, force=force):
                return None
            # Side by side, with no call between them: an exception from outside (a signal handler, Ctrl-C) may come at
            # any call, and a lease that counts must be open, or nothing would ever take it off again.
            self.in_flight += 1
            lease.closed = False
            self.calls += 1
            self.last_picked = now
            self._waiting[id(lease)] = now
        return lease

    def _admit(self, lease: Lease, now: float, *, force: bool) -> bool:
        if self.retired:
            return False  # a pick from a view of before; by now there is a newer one
        breaker = self.breaker
        if breaker is None:
            return True
        if breaker.acquire(now):
            lease.generation = breaker.generation
            return True
        lease.generation = _NO_GENERATION  # in panic: what it reports is not a probe's result
        return force

    def answered(self, lease: Lease, *, healthy: bool) -> None:
        """The response has started: it is no longer waited for, and its latency is known."""
        now = self._clock()
        closed = False
        with self.lock:
            if lease.closed or lease.latency is not None:
                return
            lease.latency = now - lease.started
            self._waiting.pop(id(lease), None)
            if healthy:
                self.latency.observe(lease.latency, now)
                if not self._normal and self.breaker is not None and self.breaker.state is BreakerState.HALF_OPEN:
                    # The probe has shown what it was sent for; a stream that goes on for hours must not keep the
                    # endpoint half-open as long.
                    closed = self.breaker.succeeded(lease.generation, lease.started)
                    lease.generation = _NO_GENERATION
                    if closed:
                        self._give_place_back()
                    self._note_state()
        if closed:
            self._owner.node_closed(self)

    def finish(self, lease: Lease, outcome: Outcome) -> bool:
        """End an attempt. False, and nothing happens, if it had ended already."""
        now = self._clock()
        with self.lock:
            if lease.closed:
                return False
            lease.closed = True
            self.in_flight -= 1
            waited = self._waiting.pop(id(lease), None)
            if outcome.kind is OutcomeKind.OK:
                self.successes += 1
                if waited is not None:
                    lease.latency = latency = now - waited
                    self.latency.observe(latency, now)
                if self._normal:
                    return True
            opened_for, closed = self._judge(lease, outcome, now)
            drained = self.retired and self.in_flight == 0
        if opened_for:
            self._owner.node_opened(self, opened_for)
        if closed:
            self._owner.node_closed(self)
        if drained:
            self._owner.node_drained(self)
        return True

    def _judge(self, lease: Lease, outcome: Outcome, now: float) -> tuple[float, bool]:
        """Whatever an outcome means beyond a success in good times: for how long the breaker has opened (0: it has
        not), and whether it has closed."""
        opened_for, closed = 0.0, False
        breaker = self.breaker
        kind = outcome.kind
        if kind is OutcomeKind.OK:
            if breaker is not None:
                closed = breaker.succeeded(lease.generation, lease.started)
        elif kind is OutcomeKind.IGNORED:
            self.ignored += 1
            if breaker is not None:
                breaker.ignored(lease.generation, lease.started)
        else:
            self.latency.penalize(now, outcome.retry_after)
            self.last_failure = outcome.reason
            trips = False
            if kind is OutcomeKind.FAILURE:
                self.failures += 1
                trips = breaker is not None and breaker.failed(lease.generation, lease.started)
            else:
                self.overloads += 1
                # Overload alone never opens a breaker, but a probe answered with it has not shown recovery.
                if breaker is not None and breaker.state is BreakerState.HALF_OPEN:
                    trips = breaker.failed(lease.generation, lease.started)
            if trips and breaker is not None:
                opened_for = self._open(breaker, now, outcome)
        if closed:
            self._give_place_back()
        self._note_state()
        return opened_for, closed

    def _open(self, breaker: CircuitBreaker, now: float, outcome: Outcome) -> float:
        if self.ejected:  # half-open: it still holds its place
            return breaker.open(now, f"probe failed ({outcome.reason})")
        if self.retired or not self._cap.try_take():
            return 0.0
        self.ejected = True
        return breaker.open(now, f"{breaker.failures} consecutive failures ({outcome.reason})")

    def _give_place_back(self) -> None:
        if self.ejected:
            self.ejected = False
            self._cap.give_back()

    def _note_state(self) -> None:
        breaker = self.breaker
        self._normal = not self.retired and (
            breaker is None or (breaker.state is BreakerState.CLOSED and not breaker.failures)
        )

    # -- what the control plane does ---------------------------------------------------------------------------

    def poll_breaker(self, *, now_at_once: bool = False) -> bool:
        """Move an open breaker to half-open if its time is up, or ``now_at_once``. True if that happened."""
        now = self._clock()
        with self.lock:
            if self.breaker is None:
                return False
            return self.breaker.probe_now(now) if now_at_once else self.breaker.poll(now)

    def retire(self) -> bool:
        """Take the endpoint out of the set; its attempts go on. True if it has none."""
        with self.lock:
            self.retired = True
            self._give_place_back()
            self._note_state()
            return self.in_flight == 0

    def restore(self, endpoint: Endpoint) -> None:
        """Take over what the registry now says of the same endpoint, which may have been retired meanwhile."""
        with self.lock:
            self.endpoint = endpoint
            self.weight = endpoint.weight
            self.retired = False
            if self.breaker is not None and self.breaker.state is not BreakerState.CLOSED and not self.ejected:
                self.ejected = True
                self._cap.take()  # it is out, whatever the cap says
            self._note_state()

    def reborn(self, cap: EjectionCap) -> Node:
        """What takes this node's place in the child of a fork: all that was learnt, and no attempt.

        Leases that the parent held at the fork may still be closed in the child. They go on with this node, which
        nobody reads any more, and so cannot make the counts of the new one wrong.
        """
        heir = Node(self.endpoint, self._owner, clock=self._clock, latency=self.latency, breaker=self.breaker, cap=cap)
        heir.last_picked = self.last_picked
        heir.last_failure = self.last_failure
        if heir.breaker is not None:
            heir.breaker.forget_probes()
            if heir.breaker.state is not BreakerState.CLOSED:
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
        self.retired = self.ejected = False
        self._note_state()

    def __repr__(self) -> str:
        return f"<Node {self.endpoint.address} {self.standing} in_flight={self.in_flight}>"
