"""What a call remembers between its attempts: the same for blocking calls and for those that go on by themselves."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.call import Call, Safety
from meshlb.grpc._errors import DeadlineExceeded
from meshlb.grpc._idempotency import is_idempotent
from meshlb.grpc._status import ATTEMPT_METADATA, classify, classify_local
from meshlb.model import Outcome, OutcomeKind, Sent
from meshlb.node import NOT_STARTED

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.model import CallContext
    from meshlb.node import Lease
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
    ``patient``: wait_for_ready, that is, go on for as long as the call cannot reach anybody.
    """

    __slots__ = ("_call", "_rounds", "cluster", "context", "deadline", "limited", "method", "patient", "per_try")

    def __init__(
        self,
        cluster: Cluster,
        method: str,
        context: CallContext,
        *,
        started: float,
        timeout: float | None,
        patient: bool,
        per_try: float | None,
    ) -> None:
        self.cluster = cluster
        self.method = method
        self.context = context
        self.deadline = None if timeout is None else started + timeout
        self.patient = patient
        self.per_try = per_try
        self.limited = False
        """The attempt under way has less time than the call."""
        self._call: Call | None = None
        self._rounds = 0

    @property
    def made(self) -> int:
        """Attempts begun so far."""
        return 1 if self._call is None else self._call.attempts

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
        return Safety.IDEMPOTENT if is_idempotent(self.method, self.cluster.config.retry) else Safety.UNSENT_ONLY

    def after(self, lease: Lease, outcome: Outcome, error: BaseException | None, *, replayable: bool) -> float | None:
        """Close the lease with what came of it; seconds until the next attempt, or None if the call is over."""
        if self._call is None:
            timeout = None if self.deadline is None else self.deadline - lease.started
            self._call = Call(self.cluster, self.context, lease.started, timeout)
        safety = self.safety(replayable=replayable)
        if outcome.reason == "DEADLINE_EXCEEDED" and not self.limited:
            # It had all the time that the call had left. Two clocks differ by a little: do not make a last attempt
            # with the microseconds that ours may still show.
            safety = Safety.NEVER
        try:
            pause = self._call.after(lease, outcome, safety, error)
        except Exception:  # one of the user's own strategies; the caller gets the attempt's error, not this one
            logger.exception("%s: a retry strategy failed", self.cluster.query)
            pause = None
        if pause is None and self.patient and replayable and _unreachable(outcome):
            return self._round()
        return pause

    def repick(self, lease: Lease) -> Lease | None:
        """Another lease in place of one whose sub-channel was closed before the call could start on it."""
        lease.close(NOT_STARTED)
        return self.cluster.try_again(self.context)

    def again(self) -> Lease | None:
        """Begin the next attempt. None: nobody is left; ``another_round`` tells a patient call how long to wait."""
        return None if self._call is None else self._call.again()

    def another_round(self) -> float | None:
        """Seconds until a patient call looks again for somebody to call; None for a call that is not patient."""
        return self._round() if self.patient else None

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


def attempt_metadata(metadata: Metadata, resend: int, trace: AttemptTrace | None) -> Metadata:
    """The caller's metadata for one attempt, with what belongs to the attempt added to a copy."""
    if not resend and trace is None:
        return metadata
    entries = list(metadata or ())
    if resend:
        entries.extend((name, str(resend)) for name in ATTEMPT_METADATA)
    if trace is not None:
        trace.inject(lambda key, value: entries.append((key, value)))
    return tuple(entries)


def _unreachable(outcome: Outcome) -> bool:
    return outcome.sent is Sent.NOT_SENT and outcome.kind is OutcomeKind.FAILURE and outcome.retryable
