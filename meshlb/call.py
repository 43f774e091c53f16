"""One call, sans I/O: attempt, outcome, then another endpoint or the end.

An adapter moves the bytes; what to do next is decided here, for every protocol and every kind of program alike. The
common case never makes a ``Call``: the adapter starts a lease, the attempt goes well, the lease is closed. Only a
failure asks ``Call`` whether and when to go on.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from meshlb.model import CallContext, Outcome, Sent
from meshlb.resilience.retry import Backoff, Retry

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Lease, Node


_LONGEST_HINT: Final = 30.0
"""Seconds of Retry-After or pushback beyond which a call fails now instead of sleeping: by then its caller, who may
have set no deadline, has something better to do with the error."""


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
            sleep(pause)
            lease = call.again()                        # None: nobody is left, finish as above

    Not safe for use by several threads at once: a call is one caller's.
    """

    __slots__ = ("_backoff", "_context", "_paid_attempts", "_tried", "_withdrawn", "attempts", "cluster", "deadline",
                 "started")  # fmt: skip

    def __init__(self, cluster: Cluster, context: CallContext, started: float, timeout: float | None) -> None:
        self.cluster = cluster
        self.started = started
        self.deadline = None if timeout is None else started + timeout
        self.attempts = 1
        """Attempts begun so far, the transparent ones included."""
        self._paid_attempts = 1
        self._tried: set[Node] = set()
        self._context = CallContext(context.key, context.method, self._tried)
        self._backoff: Backoff | None = None
        self._withdrawn = False
        """The attempt that comes next has been paid for out of the budget."""

    def remaining(self) -> float | None:
        """Seconds until the deadline (may be negative); None without one."""
        return None if self.deadline is None else self.deadline - self.cluster.clock()

    def after(self, lease: Lease, outcome: Outcome, safety: Safety, error: BaseException | None = None) -> float | None:
        """Close the lease with its outcome, and decide: seconds to wait before ``again``, or None to finish.

        ``error``: the exception that the caller would see, for tenacity strategies that look at it.
        """
        lease.close(outcome)
        self._tried.add(lease.node)
        self._withdrawn = False
        retry = self.cluster.config.retry
        if retry is None or not outcome.retryable or safety is Safety.NEVER:
            return None
        if outcome.sent is not Sent.NOT_SENT and safety is not Safety.IDEMPOTENT:
            return None
        if outcome.retry_after is not None and not outcome.retry_after >= 0:
            return None  # the server says so (gRFC A6: negative pushback)
        nodes = self.cluster.view.nodes
        elsewhere = any(node not in self._tried for node in nodes)
        if outcome.sent is Sent.NOT_SENT and elsewhere and self.attempts <= len(nodes):
            # gRFC A6's transparent retry: no server saw it, so it adds no load and is not counted. It ends by itself,
            # with as many attempts as there are endpoints: an untried one may keep refusing (it is being probed), and
            # then a tried one gets the attempt.
            return 0.0 if self._has_time(0.0) else None
        if self._paid_attempts >= retry.max_attempts:
            return None
        pause = self._pause(retry, outcome, error, elsewhere=elsewhere)
        if pause is None or not self._has_time(pause):
            return None
        if self.cluster.budget is not None:
            if not self.cluster.budget.try_withdraw():
                return None
            self._withdrawn = True
        self._paid_attempts += 1
        return pause

    def again(self) -> Lease | None:
        """Begin the next attempt: on an endpoint not tried yet if there is one, else on any. None if none is left."""
        cluster, context = self.cluster, self._context
        lease = cluster.try_again(context) or cluster.try_again(CallContext(context.key, context.method))
        if lease is None:
            if self._withdrawn and cluster.budget is not None:
                cluster.budget.refund()
            return None
        self.attempts += 1
        cluster.count_retry()
        return lease

    def _pause(self, retry: Retry, outcome: Outcome, error: BaseException | None, *, elsewhere: bool) -> float | None:
        pause: float | None = 0.0 if elsewhere else None  # None: as the wait strategy says
        hint = outcome.retry_after
        if hint is not None and (outcome.hint_binds or not elsewhere):
            if not hint <= _LONGEST_HINT:
                return None
            pause = hint
        if self._backoff is None:
            self._backoff = Backoff(retry)
        elapsed = self.cluster.clock() - self.started
        return self._backoff.next_wait(self._paid_attempts, elapsed, error, pause=pause)

    def _has_time(self, pause: float) -> bool:
        remaining = self.remaining()
        return remaining is None or remaining > pause
