"""One endpoint's live state, and the life of the attempts on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from meshlb.lease import NOT_STARTED, Lease, abandon
from meshlb.model import OK, Outcome, OutcomeKind
from meshlb.node_state import SUSPICIOUS, NodeOwner, NodeState
from meshlb.resilience.breaker import BreakerState, CircuitBreaker, Verdict

__all__ = ["NOT_STARTED", "Lease", "Node", "NodeOwner", "abandon"]

_OK_KIND: Final = OutcomeKind.OK  # looking up a member by its name takes longer than all else that is asked here

_NO_GENERATION: Final = -1
"""Of a lease whose end is not the breaker's business."""

REFUSED: Final = object()
"""What ``Node.run`` returns for an attempt that it has not made."""


class Closable(Protocol):
    """What an attempt goes through."""

    @property
    def closed(self) -> bool: ...


class Node(NodeState):
    """Everything that is known of one endpoint. Keyed by the endpoint's identity, it survives updates of the set.

    The counters are plain ints under one short lock per node; pickers read them without it. It satisfies
    ``balancing.base.Candidate``.
    """

    __slots__ = ()

    # -- the life of an attempt --------------------------------------------------------------------------------

    def begin(self, force: bool = False, *, granted: bool = False) -> Lease | None:
        """Start an attempt. None if the endpoint is retired, its breaker refuses, or there are as many as there may be;
        ``force`` passes the breaker by (panic). ``granted``: it is the call's turn in the queue of the limits."""
        lease = Lease()
        lease.closed = True  # until it is counted
        lease.node = self
        clock = self._clock  # an attribute first: Python has no short way to what is looked up as a method in a slot
        lease.started = now = clock()
        lease.latency = None
        breaker = self.breaker
        lease.generation = 0 if breaker is None else breaker.generation
        with self.lock:
            if not self._normal and not self._admit(lease, now, force=force, granted=granted):
                return None
            # Side by side, with no call between them: an exception from outside (a signal handler, Ctrl-C) may come at
            # any call, and a lease that counts must be open, or nothing would ever take it off again.
            self.in_flight += 1
            lease.closed = False
            self.calls = lease.number = number = self.calls + 1
            self.last_picked = now
            self._waiting[number] = now
        return lease

    def run(
        self,
        started: float,
        resource: Closable,
        failed: Callable[..., Any],
        call: Callable[..., Any],
        *arguments: Any,
    ) -> Any:
        """Make an attempt that is one call of a function: ``begin``, ``call(*arguments)`` and ``finish`` in one frame,
        without a lease. The wait for an answer leaves the processor's caches cold: there a Python call costs 1 us.

        ``started``: the clock's reading, now. ``failed(lease, error, *arguments)`` says what is returned, or raises, if
        the call raises; the lease is open. REFUSED, with no attempt made, if there is something to be decided first,
        which is what ``begin`` is for, or if ``resource`` is closed.
        """
        breaker = self.breaker
        generation = 0 if breaker is None else breaker.generation
        number = 0
        response: Any = REFUSED
        failure: BaseException | None = None
        try:
            with self.lock:
                if not self._normal:
                    return REFUSED
                self.in_flight += 1  # as in `begin`: no call between this and the next line
                self.calls = number = self.calls + 1
                self.last_picked = started
                self._waiting[number] = started
            if not resource.closed:  # asked when the attempt counts: see EndpointResources
                response = call(*arguments)
                clock = self._clock
                now = clock()
                latency = now - started
                with self.lock:
                    if latency < self._notable and now < self._quiet_until:
                        self._waiting.pop(number, None)
                        self.in_flight -= 1
                        number = 0
                        self.successes += 1
                        self.latency.observe(latency, now)
                        return response
        except BaseException as error:
            if not number:
                raise
            failure = error
        # Something is to be decided after all, and for that a lease takes over.
        try:
            lease = Lease()
            lease.closed = True
            lease.node = self
            lease.started = started
            lease.latency = None
            lease.generation = generation
            lease.number = number
            lease.closed, number = False, 0
            if failure is not None:
                return failed(lease, failure, *arguments)
            self.finish(lease, NOT_STARTED if response is REFUSED else OK)
            return response
        finally:
            failure = None  # or it would hold this frame, which holds it
            if number:
                with self.lock:
                    self._waiting.pop(number, None)
                    self.in_flight -= 1

    def _admit(self, lease: Lease, now: float, *, force: bool, granted: bool) -> bool:
        if self.retired:
            return False  # a pick from a view of before; by now there is a newer one
        breaker = self.breaker
        if breaker is None:
            return True
        if breaker.acquire(now):
            lease.generation = breaker.generation
            return True
        lease.generation = _NO_GENERATION  # in panic: what it reports is not a probe's result
        return force and breaker.state is not BreakerState.FORCED_OPEN

    def answered(self, lease: Lease, *, healthy: bool = True) -> None:
        """The response has started: it is no longer waited for, and its latency is known."""
        clock = self._clock
        now = clock()
        opened_for, closed = 0.0, False
        with self.lock:
            if lease.closed or lease.latency is not None:
                return
            lease.latency = now - lease.started
            self._waiting.pop(lease.number, None)
            if healthy:
                if lease.latency < self._notable:
                    self.latency.observe(lease.latency, now)
                else:
                    self._observe(lease.latency, lease.started, now)
                if not self._normal and self.breaker is not None and self.breaker.state is BreakerState.HALF_OPEN:
                    # The probe has shown what it was sent for; a stream that goes on for hours must not keep the
                    # endpoint half-open as long.
                    verdict = self.breaker.succeeded(lease.generation, lease.started, now, lease.latency)
                    lease.generation = _NO_GENERATION
                    closed = verdict is Verdict.CLOSED
                    if verdict is Verdict.TRIP:
                        opened_for = self._open(self.breaker, now, "")
                    self._note_state()
        if opened_for:
            self._owner.node_opened(self, opened_for)
        if closed:
            self._owner.node_closed(self)

    def finish(self, lease: Lease, outcome: Outcome) -> bool:
        """End an attempt. False, and nothing happens, if it had ended already."""
        clock = self._clock
        now = clock()
        with self.lock:
            if lease.closed:
                return False
            waited = self._waiting.pop(lease.number, None)
            lease.closed = True  # after all calls: one that is interrupted before this is closed by the collector
            self.in_flight -= 1
            if outcome.kind is _OK_KIND:
                self.successes += 1
                if waited is not None:
                    lease.latency = latency = now - waited
                    if latency < self._notable:
                        self.latency.observe(latency, now)
                        if now < self._quiet_until:
                            return True
                    else:
                        self._observe(latency, waited, now)
                elif now < self._quiet_until and (lease.latency or 0.0) < self._notable:
                    return True
            opened_for, closed = self._judge(lease, outcome, now)
            drained = (self.retired or self.out_of_subset) and self.in_flight == 0
        if opened_for:
            self._owner.node_opened(self, opened_for)
        if closed:
            self._owner.node_closed(self)
        if drained:
            self._owner.node_drained(self)
        return True

    def _observe(self, latency: float, started: float, now: float) -> None:
        if not self._spoilt(latency, started, now):
            self.latency.observe(latency, now)

    def _spoilt(self, latency: float, started: float, now: float) -> bool:
        """Whether a latency says less about the endpoint than about us."""
        return latency >= SUSPICIOUS and self._owner.excuses(started, now)

    def _judge(self, lease: Lease, outcome: Outcome, now: float) -> tuple[float, bool]:
        """Whatever an outcome means beyond a success in good times: for how long the breaker has opened (0: it has
        not), and whether it has closed."""
        opened_for, closed = 0.0, False
        breaker = self.breaker
        kind = outcome.kind
        duration = now - lease.started if lease.latency is None else lease.latency
        if self._spoilt(duration, lease.started, now):
            if kind is OutcomeKind.FAILURE and outcome.timed_out:
                kind = OutcomeKind.IGNORED
            duration = 0.0  # it was not the endpoint that took so long
        verdict = Verdict.NOTHING
        if kind is OutcomeKind.OK:
            if breaker is not None:
                self._hand_in(self.successes - 1)
                self._counted = self.successes
                verdict = breaker.succeeded(lease.generation, lease.started, now, duration)
        elif kind is OutcomeKind.IGNORED:
            self.ignored += 1
            if breaker is not None:
                breaker.ignored(lease.generation, lease.started)
        else:
            self.latency.penalize(now, outcome.retry_after)
            self.last_failure = outcome.reason
            self._hand_in(self.successes)
            if kind is OutcomeKind.FAILURE:
                self.failures += 1
                if breaker is not None:
                    verdict = breaker.failed(lease.generation, lease.started, now, duration)
            else:
                self.overloads += 1
                if breaker is not None:
                    verdict = breaker.overloaded(lease.generation, lease.started, now, duration)
        if verdict is Verdict.TRIP and breaker is not None:
            opened_for = self._open(breaker, now, outcome.reason)
        elif verdict is Verdict.CLOSED:
            closed = True
        if self.refused and kind is not OutcomeKind.IGNORED and (opened_for or verdict is not Verdict.TRIP):
            self._refuse(now, False)
        self._note_state()
        return opened_for, closed

    def _open(self, breaker: CircuitBreaker, now: float, last: str) -> float:
        if not self.ejected:  # half-open, it still holds its place
            if self.retired:
                return 0.0
            if not self._cap.try_take(now):
                self._refuse(now, True)
                return 0.0
            self.ejected = True
        reason = f"{breaker.cause} ({last})" if last else breaker.cause
        return breaker.open(now, reason, doubted=self._cap.is_in_doubt(now))

    def set_breaker(self, state: BreakerState, reason: str = "", *, afresh: bool = False) -> None:
        """Open, disable or close the breaker by hand; ``afresh``: close it and forget all that was held against the
        endpoint."""
        now = self._clock()
        with self.lock:
            breaker = self.breaker
            if breaker is None:
                return
            if state is BreakerState.FORCED_OPEN:
                breaker.force_open(reason)
                if not self.ejected and not self.retired:
                    self.ejected = True
                    self._cap.take()  # whatever the cap says: it was not asked
            elif state is BreakerState.DISABLED:
                breaker.disable(reason)
            elif afresh:
                self.outlier = ""
                breaker.reset(now)
            else:
                breaker.close(now)
            self._refuse(now, False)
            self._counted = self.successes
            self._note_state()
        self._owner.node_changed(self)
