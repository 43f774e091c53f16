"""One endpoint's live state, and the lease that an attempt holds on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random
from typing import Final, Protocol

from meshlb.balancing.ewma import PeakEwma
from meshlb.model import ABANDONED, OK, Endpoint, Outcome, OutcomeKind, Sent, Status
from meshlb.resilience.breaker import Breaker, BreakerState, CircuitBreaker
from meshlb.topology.eligibility import Standing

_NEVER: Final = float("-inf")


class NodeOwner(Protocol):
    """What a node tells its cluster. All of it is called without the node's lock held, from any thread."""

    def may_eject(self) -> bool:
        """Whether one more endpoint may be out of rotation. Called with the node's lock held: must take leaf locks
        only."""
        ...

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

    __slots__ = ("__weakref__", "_clock", "_guarded", "_owner", "_waiting", "breaker", "calls", "ejected", "endpoint",
                 "failures", "ignored", "in_flight", "last_failure", "last_picked", "latency", "lock", "overloads",
                 "retired", "successes", "weight")  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        owner: NodeOwner,
        *,
        clock: Callable[[], float],
        random: Random,
        latency: PeakEwma,
        breaker: Breaker | None,
    ) -> None:
        self.endpoint = endpoint
        self.weight = endpoint.weight
        self.latency = latency
        self.breaker = CircuitBreaker(breaker, random) if breaker is not None else None
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
        self._owner = owner
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Forget attempts in flight and make a new lock: for the child of a fork, where neither means anything."""
        self.lock = threading.Lock()
        self.in_flight = 0
        self._waiting: dict[int, float] = {}
        # True while the breaker is not closed: the one flag that the common path looks at.
        self._guarded = self.breaker is not None and self.breaker.state is not BreakerState.CLOSED

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

    def begin(self, *, force: bool = False) -> Lease | None:
        """Start an attempt. None if the breaker refuses it; ``force`` passes the breaker by (panic)."""
        now = self._clock()
        lease = Lease(self, now)
        with self.lock:
            if self._guarded and not self._admit(lease, now):
                if not force:
                    lease.closed = True
                    return None
                lease.generation = -1  # in panic: what it reports is not a probe's result
            self.in_flight += 1
            self._waiting[id(lease)] = now
            self.last_picked = now
            self.calls += 1
        return lease

    def _admit(self, lease: Lease, now: float) -> bool:
        breaker = self.breaker
        if breaker is None:
            return True
        lease.generation = breaker.generation
        return breaker.acquire(now)

    def answered(self, lease: Lease, *, healthy: bool) -> None:
        """The response has started: it is no longer waited for, and its latency is known."""
        now = self._clock()
        with self.lock:
            if lease.closed or lease.latency is not None:
                return
            lease.latency = now - lease.started
            self._waiting.pop(id(lease), None)
            if healthy:
                self.latency.observe(lease.latency, now)

    def finish(self, lease: Lease, outcome: Outcome) -> bool:
        """End an attempt. False, and nothing happens, if it had ended already."""
        now = self._clock()
        opened_for = 0.0
        closed = False
        with self.lock:
            if lease.closed:
                return False
            lease.closed = True
            self.in_flight -= 1
            waited = self._waiting.pop(id(lease), None) is not None
            breaker = self.breaker
            kind = outcome.kind
            if kind is OutcomeKind.OK:
                self.successes += 1
                if waited:
                    lease.latency = now - lease.started
                    self.latency.observe(lease.latency, now)
                if breaker is not None and (breaker.failures or self._guarded):
                    closed = breaker.succeeded(lease.generation)
            elif kind is OutcomeKind.IGNORED:
                self.ignored += 1
                if breaker is not None:
                    breaker.ignored(lease.generation)
            else:
                self.latency.penalize(now, outcome.retry_after)
                self.last_failure = outcome.reason
                if kind is OutcomeKind.OVERLOAD:
                    self.overloads += 1
                    # Overload alone never opens a breaker, but a probe answered with it has not shown recovery.
                    trips = (
                        breaker is not None
                        and breaker.state is BreakerState.HALF_OPEN
                        and breaker.failed(lease.generation)
                    )
                else:
                    self.failures += 1
                    trips = breaker is not None and breaker.failed(lease.generation)
                if trips:
                    opened_for = self._open(now, outcome)
            if breaker is not None:
                self._guarded = breaker.state is not BreakerState.CLOSED
            drained = self.retired and self.in_flight == 0
        if opened_for:
            self._owner.node_opened(self, opened_for)
        if closed:
            self._owner.node_closed(self)
        if drained:
            self._owner.node_drained(self)
        return True

    def _open(self, now: float, outcome: Outcome) -> float:
        breaker = self.breaker
        if breaker is None or self.retired:
            return 0.0
        if breaker.state is BreakerState.HALF_OPEN:  # it still holds its place among the ejected
            return breaker.open(now, f"probe failed ({outcome.reason})")
        if not self._owner.may_eject():
            return 0.0
        self.ejected = True
        return breaker.open(now, f"{breaker.failures} consecutive failures ({outcome.reason})")

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
            return self.in_flight == 0

    def restore(self, endpoint: Endpoint) -> None:
        """Take over what the registry now says of the same endpoint, which may have been retired meanwhile."""
        with self.lock:
            self.endpoint = endpoint
            self.weight = endpoint.weight
            self.retired = False

    def release_ejection(self) -> bool:
        """Give up the place among the ejected; True for the one caller who has to return it."""
        with self.lock:
            held, self.ejected = self.ejected, False
            return held

    def abandoned(self, lease: Lease) -> None:
        """Pass on a lease that was garbage collected open. Called from ``__del__``, so nothing may be locked here:
        the collector may run inside this very node's critical section."""
        self._owner.lease_abandoned(lease)

    def __repr__(self) -> str:
        return f"<Node {self.endpoint.address} {self.standing} in_flight={self.in_flight}>"


class Lease:
    """One attempt on one endpoint. Closed exactly once; later closings do nothing.

    ``started``: clock reading at the pick. ``latency``: seconds to the start of the response, once known. A lease that
    is dropped open is closed by the garbage collector as ABANDONED.
    """

    __slots__ = ("closed", "generation", "latency", "node", "started")

    def __init__(self, node: Node, started: float) -> None:
        self.node = node
        self.started = started
        self.latency: float | None = None
        self.generation = 0 if node.breaker is None else node.breaker.generation
        self.closed = False

    @property
    def endpoint(self) -> Endpoint:
        """Where the attempt goes."""
        return self.node.endpoint

    def answered(self, *, healthy: bool = True) -> None:
        """Say that the response has started (headers, first message). What follows, however long, is not latency.

        ``healthy`` False: the response is an error, whose speed says nothing good of the endpoint.
        """
        self.node.answered(self, healthy=healthy)

    def close(self, outcome: Outcome = OK) -> bool:
        """End the attempt with what came of it. True the first time, False afterwards."""
        return self.node.finish(self, outcome)

    def __del__(self) -> None:
        if not self.closed:
            self.node.abandoned(self)

    def __repr__(self) -> str:
        return f"<Lease {self.node.endpoint.address} {'closed' if self.closed else 'open'}>"


def abandon(lease: Lease) -> None:
    """Close a lease that the garbage collector found open, outside of the collector."""
    lease.close(ABANDONED)


NOT_STARTED: Final = Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, retryable=True, reason="not started")
"""For an attempt that could not be started for a reason of ours, such as a connection pool closed under it."""
