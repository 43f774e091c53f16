"""One call, sans I/O: attempt, outcome, then another endpoint or the end.

An adapter moves the bytes; what to do next is decided here, for every protocol and every kind of program alike. The
common case never makes a ``Call``: the adapter starts a lease, the attempt goes well, the lease is closed. Only a
failure asks ``Call`` whether and when to go on.
"""

from __future__ import annotations

from enum import Enum
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final

from meshlb.model import CallContext, Outcome, Sent
from meshlb.resilience.retry import Backoff, Retry
from meshlb.scope import turned_away

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Lease, Node
    from meshlb.resilience import RetryThrottle
    from meshlb.serving import ServedRequest


_LONGEST_HINT: Final = 30.0
"""Seconds of Retry-After or pushback beyond which a call fails now instead of sleeping: by then its caller, who may
have set no deadline, has something better to do with the error."""


_REFUSED: Final = "REFUSED_STREAM"
"""Reason of an attempt that reached a server, which did not process it (RFC 9113 8.7). It costs a server something, so
it is followed by a free attempt once (gRFC A6), and then by those that are counted."""


class Safety(Enum):
    """Whether sending a request again can do harm."""

    IDEMPOTENT = "idempotent"
    """May be sent any number of times, and can be replayed."""
    UNSENT_ONLY = "unsent_only"
    """May be sent again only if it provably reached no server; can be replayed from its start."""
    NEVER = "never"
    """Cannot be sent again: its body is used up."""


class Call:
    """The memory of a call whose first attempt has failed: which endpoints it tried, how often, until when.

    Use::

        lease = cluster.start(context, timeout=timeout)
        try: ...                                        # the attempt
        except ...:
            call = call or Call(cluster, context, lease.started, timeout)
            pause = call.after(lease, outcome, safety)  # closes the lease
            if pause is None: raise                     # finished: the caller sees this very error
            sleep(pause)                                # interrupted: call.give_up()
            lease = call.again()                        # None: nobody is left, finish as above

    ``retry``, ``throttle``: what holds for the call's method, where that is not what holds for the service.
    ``served``: the request that the call is made for, which is told if it fails for all its retries.

    Not safe for use by several threads at once: a call is one caller's.
    """

    __slots__ = ("_backoff", "_context", "_paid_attempts", "_refused", "_served", "_throttle", "_tried", "_withdrawn",
                 "attempts", "cluster", "deadline", "retry", "started")  # fmt: skip

    def __init__(
        self,
        cluster: Cluster,
        context: CallContext,
        started: float,
        timeout: float | None,
        *,
        retry: Retry | EllipsisType | None = ...,
        throttle: RetryThrottle | None = None,
        served: ServedRequest | None = None,
    ) -> None:
        self.cluster = cluster
        self.retry = cluster.config.retry if retry is ... else retry
        self._throttle = throttle
        self._served = served
        self.started = started
        self.deadline = None if timeout is None else started + timeout
        self.attempts = 1
        """Attempts begun so far, the transparent ones included."""
        self._paid_attempts = 1
        self._tried: set[Node] = set()
        self._context = context.excluding(self._tried)
        self._backoff: Backoff | None = None
        self._withdrawn = False
        """The attempt that comes next has been paid for out of the budget."""
        self._refused = False
        """A server has refused to process the request once."""

    def remaining(self) -> float | None:
        """Seconds until the deadline (may be negative); None without one."""
        return None if self.deadline is None else self.deadline - self.cluster.clock()

    def after(
        self,
        lease: Lease,
        outcome: Outcome,
        safety: Safety,
        error: BaseException | None = None,
        result: Any = None,
    ) -> float | None:
        """Close the lease with its outcome, and decide: seconds to wait before ``again``, or None to finish.

        ``error``, ``result``: the exception or response that the caller would see, for tenacity strategies that look
        at it.
        """
        self._close(lease, outcome)
        self._withdrawn = False
        retry = self.retry
        if retry is None or safety is Safety.NEVER:
            return None
        throttled = not self._failure_allowed(outcome)
        if not outcome.retryable:
            return None
        if outcome.sent is not Sent.NOT_SENT and safety is not Safety.IDEMPOTENT:
            return None
        if outcome.retry_after is not None and not outcome.retry_after >= 0:
            self._in_vain(outcome)
            return None  # the server says so (gRFC A6: negative pushback)
        nodes = self.cluster.view.nodes
        sticky = self.cluster.stickiness
        elsewhere = any(node not in self._tried for node in nodes) and not (sticky and sticky.pins(self._context))
        free = outcome.sent is Sent.NOT_SENT and not (self._refused and outcome.reason == _REFUSED)
        self._refused = self._refused or outcome.reason == _REFUSED
        # Of all endpoints, as those of the view become fewer when their breakers open in the middle of this call.
        if free and elsewhere and self.attempts <= len(self.cluster.nodes):
            # gRFC A6's transparent retry: no server saw it, so it adds no load and is not counted. It ends by itself,
            # with as many attempts as there are endpoints: an untried one may keep refusing (it is being probed), and
            # then a tried one gets the attempt.
            return 0.0 if self._has_time(0.0) else None
        if throttled or self._paid_attempts >= retry.max_attempts:
            self._in_vain(outcome)
            return None
        pause = self._pause(retry, outcome, error, result, elsewhere=elsewhere)
        if pause is None or not self._has_time(pause) or not self._pay():
            self._in_vain(outcome)
            return None
        return pause

    @property
    def retried(self) -> int:
        """Attempts beyond the first, but for those that a connection refused: what a server counts as retries."""
        return self._paid_attempts - 1

    def again(self) -> Lease | None:
        """Begin the next attempt: on an endpoint not tried yet if there is one, else on any. None if none is left."""
        cluster, context = self.cluster, self._context
        lease = cluster.try_again(context) or cluster.try_again(context.excluding(()))
        if lease is None:
            self.give_up()
            return None
        self._begun()
        return lease

    def give_up(self) -> None:
        """The attempt that ``after`` has announced is not made: what was paid for it goes back. Idempotent."""
        if self._withdrawn:
            self._withdrawn = False
            self._paid_attempts -= 1
            if self.cluster.budget is not None:
                self.cluster.budget.refund()

    def _in_vain(self, outcome: Outcome) -> None:
        """The call fails, and would so for another instance of ours: whoever asked us must not ask one of those. Unless
        nobody was reached, which may be this instance's own misfortune, and puts no load on anybody."""
        if self._served is not None and (outcome.sent is not Sent.NOT_SENT or self._paid_attempts > 1):
            self._served.in_vain = True

    def _close(self, lease: Lease, outcome: Outcome) -> None:
        self._tried.add(lease.node)
        if lease.close(outcome) and self.cluster.throttling is not None and turned_away(outcome):
            self.cluster.throttling.rejected()

    def _begun(self) -> None:
        self._withdrawn = False
        self.attempts += 1
        self.cluster.count_retry()
        if self.cluster.throttling is not None:
            self.cluster.throttling.made()

    def _pay(self) -> bool:
        """Pay for one further attempt, if the budget covers it."""
        budget = self.cluster.budget
        if budget is not None and not budget.try_withdraw():
            return False
        self._withdrawn = True
        self._paid_attempts += 1
        return True

    def _failure_allowed(self, outcome: Outcome) -> bool:
        """Take a token for a failure (gRFC A6): a retryable one, or one whose server forbids to retry. What reached
        nobody costs none."""
        if self._throttle is None or outcome.sent is Sent.NOT_SENT:
            return True
        forbidden = outcome.retry_after is not None and not outcome.retry_after >= 0
        return self._throttle.failed() if outcome.retryable or forbidden else True

    def _pause(
        self, retry: Retry, outcome: Outcome, error: BaseException | None, result: Any, *, elsewhere: bool
    ) -> float | None:
        pause: float | None = 0.0 if elsewhere else None  # None: as the wait strategy says
        hint = outcome.retry_after
        hinted = hint is not None and (outcome.hint_binds or not elsewhere)
        if hint is not None and hinted:
            if not hint <= _LONGEST_HINT:
                return None
            pause = hint
        if self._backoff is None:
            self._backoff = Backoff(retry, self.cluster.random)
        elapsed = self.cluster.clock() - self.started
        return self._backoff.next_wait(self._paid_attempts, elapsed, error, pause=pause, hinted=hinted, result=result)

    def _has_time(self, pause: float) -> bool:
        remaining = self.remaining()
        return remaining is None or remaining > pause
