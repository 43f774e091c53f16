"""What a call remembers between its attempts: the same for blocking calls and for those that go on by themselves."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.call import Call, Safety
from meshlb.grpc._errors import DeadlineExceeded
from meshlb.grpc._status import classify, classify_local
from meshlb.hedging import HedgedCall
from meshlb.model import Outcome, OutcomeKind, Sent
from meshlb.node import NOT_STARTED
from meshlb.serving import ATTEMPT_METADATA

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.grpc._policy import MethodPolicy
    from meshlb.model import CallContext
    from meshlb.node import Lease
    from meshlb.serving import ServedRequest, Surroundings
    from meshlb.telemetry import AttemptTrace

logger = logging.getLogger("meshlb.grpc")

Metadata = Any

_FIRST_ROUND: Final = 0.05
_LONGEST_ROUND: Final = 1.0
"""Seconds between two tries of a wait_for_ready call while nobody can be reached: soon at first, since most such
calls wait for a server that is just starting; then as often as a sub-channel connects again by itself."""


class Attempts:
    """The course of one call: how long it has, which attempts it has made, whether there is another one.

    ``context``: what a policy looks at. ``started``: the clock's reading when the call began. ``timeout``: seconds for
    the whole call, or None.
    ``around``: what surrounds the call.
    ``patient``: wait_for_ready, that is, go on for as long as the call cannot reach anybody.
    """

    __slots__ = ("_around", "_call", "_rounds", "_started", "cluster", "context", "deadline", "limited", "method",
                 "patient", "per_try", "policy")  # fmt: skip

    def __init__(
        self,
        cluster: Cluster,
        method: str,
        context: CallContext,
        *,
        started: float,
        timeout: float | None,
        patient: bool,
        policy: MethodPolicy,
        around: Surroundings | None = None,
    ) -> None:
        self.cluster = cluster
        self.method = method
        self.context = context
        self.deadline = None if timeout is None else started + timeout
        self.patient = patient
        self.policy = policy
        self.per_try = None if policy.retry is None else policy.retry.per_try_timeout
        self._around = around
        self._started = started
        self.limited = False
        """The attempt under way has less time than the call."""
        self._call: Call | None = None
        self._rounds = 0

    @property
    def made(self) -> int:
        """Attempts begun so far."""
        return 1 if self._call is None else self._call.attempts

    @property
    def previous(self) -> int:
        """Attempts before the next one that a server may have seen, those of the layers above included."""
        above = 0 if self._around is None else self._around.previous_attempts
        return above if self._call is None else above + self._call.retried

    @property
    def _served(self) -> ServedRequest | None:
        return None if self._around is None else self._around.request

    def remaining(self) -> float | None:
        """Seconds left of the whole call (may be negative), or None."""
        return None if self.deadline is None else self.deadline - self.cluster.clock()

    def next_timeout(self) -> float | None:
        """Seconds that the next attempt may take."""
        remaining = self.remaining()
        self.limited = self.per_try is not None and (remaining is None or self.per_try < remaining)
        return self.per_try if self.limited else remaining

    def safety(self, *, replayable: bool) -> Safety:
        """Whether the request may be sent again."""
        if not replayable:
            return Safety.NEVER
        return Safety.IDEMPOTENT if self.policy.idempotent else Safety.UNSENT_ONLY

    def after(self, lease: Lease, outcome: Outcome, error: BaseException | None, *, replayable: bool) -> float | None:
        """Close the lease with what came of it; seconds until the next attempt, or None if the call is over."""
        policy = self.policy
        if self._call is None:
            timeout = None if self.deadline is None else self.deadline - lease.started
            self._call = Call(
                self.cluster,
                self.context,
                lease.started,
                timeout,
                retry=policy.retry,
                throttle=policy.throttle,
                served=self._served,
            )
        outcome = self.judged(outcome, error)
        safety = self.safety_after(outcome, limited=self.limited, replayable=replayable)
        try:
            pause = self._call.after(lease, outcome, safety, error)
        except Exception:  # one of the user's own strategies; the caller gets the attempt's error, not this one
            logger.exception("%s: a retry strategy failed", self.cluster.query)
            pause = None
        if pause is None and self.patient and replayable and unreachable(outcome):
            return self._round()
        return pause

    def judged(self, outcome: Outcome, error: BaseException | None) -> Outcome:
        """The outcome as ``Retry.retry_on``, or the codes of the method's retryPolicy, have it."""
        return self.policy.judged(outcome, error, self.made, self.cluster.clock() - self._started)

    def safety_after(self, outcome: Outcome, *, limited: bool, replayable: bool) -> Safety:
        """``safety``, knowing how an attempt has ended. ``limited``: it had less time than the call."""
        if outcome.reason == "DEADLINE_EXCEEDED" and not limited:
            # It had all the time that the call had left. Two clocks differ by a little: do not make a last attempt
            # with the microseconds that ours may still show.
            return Safety.NEVER
        return self.safety(replayable=replayable)

    def succeeded(self, lease: Lease) -> None:
        """An attempt has ended with OK."""
        policy = self.policy
        if (throttle := policy.throttle) is not None:
            throttle.succeeded()
        if (timer := policy.timer) is not None:
            timer.record(lease.latency)

    def give_up(self) -> None:
        """The caller has gone while the next attempt was waited for."""
        if self._call is not None:
            self._call.give_up()

    def hedged(self, started: float) -> HedgedCall | None:
        """The call whose attempts may overlap, if this is to be one."""
        policy = self.policy
        hedge, timer = policy.hedge, policy.timer
        if hedge is None or timer is None or timer.delay() is None or not policy.idempotent:
            return None
        if self.context.session is not None:
            return None  # two instances at once would not be a session
        timeout = None if self.deadline is None else self.deadline - started
        call = HedgedCall(
            self.cluster,
            self.context,
            started,
            timeout,
            hedge=hedge,
            timer=timer,
            retry=policy.retry,
            throttle=policy.throttle,
            served=self._served,
        )
        self._call = call
        return call

    def repick(self, lease: Lease) -> Lease | None:
        """Another lease in place of one whose sub-channel was closed before the call could start on it."""
        lease.close(NOT_STARTED)
        return self.cluster.try_again(self.context)

    def again(self) -> Lease | None:
        """Begin the next attempt. None: nobody is left; ``another_round`` tells a patient call how long to wait."""
        return None if self._call is None else self._call.again()

    def another_round(self) -> float | None:
        """Seconds until a patient call looks again for somebody to call; None for a call that is not patient, or that
        has lost the one instance that it may call."""
        return self._round() if self.patient and self.cluster.lost_session(self.context) is None else None

    def out_of_time(self) -> bool:
        """Whether the deadline of the whole call has passed."""
        remaining = self.remaining()
        return remaining is not None and remaining <= 0

    def _round(self) -> float:
        pause: float = min(_FIRST_ROUND * 2**self._rounds, _LONGEST_ROUND) * random.uniform(0.8, 1.2)
        self._rounds = min(self._rounds + 1, 16)
        remaining = self.remaining()
        # To the deadline and no further: then the call ends as DEADLINE_EXCEEDED, as gRPC's own does.
        return pause if remaining is None else max(0.0, min(pause, remaining))

    def too_late(self) -> DeadlineExceeded:
        """The error of a call whose deadline passed while no attempt was under way."""
        return DeadlineExceeded(
            f"deadline exceeded: {self.method} of service '{self.cluster.query}' "
            + (f"after {self.made} attempts" if self._call is not None else "before an attempt could be made")
        )

    def explain(self, error: BaseException, lease: Lease) -> None:
        """Say on the error that the caller gets, if there were several attempts, which one this is."""
        if self.made > 1:
            error.add_note(
                f"meshlb: attempt {self.made} of {self.method}, on {lease.endpoint.address} "
                f"of service '{self.cluster.query}'; the earlier attempts failed too"
            )


def outcome_of(error: BaseException, *, channel_closed: bool) -> Outcome:
    """Classify what a native call raised."""
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return classify(
            error.code(),
            error.details(),
            error.trailing_metadata(),
            initial_metadata=error.initial_metadata(),
            locally_cancelled=channel_closed,
        )
    return classify_local(error)


def attempt_metadata(metadata: Metadata, previous: int, trace: AttemptTrace | None) -> Metadata:
    """The caller's metadata for one attempt, with what belongs to the attempt added to a copy."""
    if not previous and trace is None:
        return metadata
    entries = list(metadata or ())
    if previous:
        entries.extend((name, str(previous)) for name in ATTEMPT_METADATA)
    if trace is not None:
        trace.inject(lambda key, value: entries.append((key, value)))
    return tuple(entries)


def unreachable(outcome: Outcome) -> bool:
    """Whether a patient call goes on after this."""
    return outcome.sent is Sent.NOT_SENT and outcome.kind is OutcomeKind.FAILURE and outcome.retryable
