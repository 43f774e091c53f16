"""When a failed attempt is followed by another one. The vocabulary of waits and stops is tenacity's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any, Final

from meshlb._validate import integer, seconds
from meshlb.errors import ConfigError
from meshlb.resilience.backoff import FullJitter
from meshlb.resilience.budget import RetryBudget
from meshlb.resilience.hedge import Hedge
from meshlb.resilience.retry_on import RetryOn, call_state, checked_retry_on, set_outcome

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = logging.getLogger("meshlb.retry")

Wait = Callable[["RetryCallState"], float]
Stop = Callable[["RetryCallState"], bool]

_DEFAULT_BASE: Final = 0.025
_DEFAULT_CAP: Final = 0.25
"""Full jitter from 25 ms, at most 250 ms: Envoy's defaults."""

_FAR: Final = 1_000_000
"""An attempt, and a second, that no call comes to: what a strategy says of them it says of all that is far."""

_LONGEST_WAIT: Final = 86_400.0
"""Seconds. A wait that grows beyond a day has no bound that means anything."""

_MOST_BUFFERED: Final = 1 << 30
"""Bytes: a gigabyte for each call is a mistake."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How a call that failed on one endpoint goes on to another.

    A retry is made only if it is safe: nothing was sent, or the request is idempotent and its body can be replayed.
    It goes to an endpoint that this call has not tried, at once; ``wait`` applies when only tried ones are left. An
    attempt that provably never reached a server (connection refused) costs neither ``max_attempts`` nor budget while
    there is an untried endpoint to go to (gRFC A6: transparent retry).

    * ``max_attempts``: attempts in all, hedges included (3: one retry hides one bad endpoint, two hide a bad endpoint
      during a rolling restart; more only adds load).
    * ``wait``, ``stop``: tenacity strategies (``tenacity.wait_*``, ``tenacity.stop_*``, combined with ``+``, ``|``,
      ``&``), called with a RetryCallState of this call alone. None: full jitter from 25 to 250 ms; no further stop.
    * ``retry_on``: which ends of an attempt call for another one, instead of the verdict table's (docs/retries.md): a
      tenacity predicate (``tenacity.retry_*``, combined with ``|`` and ``&``; it sees the exception, or the HTTP
      response with its body unread), or a collection of HTTP statuses, gRPC codes and httpx error names. It widens or
      narrows what is retried among what is safe to send again, never beyond. None: the table.
    * ``per_try_timeout``: seconds an attempt may take until its response starts (None: only the call's own timeout).
      Set it to let a call escape from an endpoint that hangs.
    * ``budget``: the extra load allowed (None: unbounded, which multiplies an outage).
    * ``hedge``: send a call to a second endpoint before the first one has answered (None: not).
    * ``idempotent_methods``: methods that may be sent twice, beyond those the protocol says so of (RFC 9110 9.2.2;
      ``idempotency_level`` in a .proto): HTTP verbs ("POST") or gRPC methods ("/shop.Orders/Get", "/shop.Orders/*").
    * ``buffer_body``: bytes of an HTTP body that can be read only once (a generator) to keep for another attempt (0:
      none, such a request is not sent twice; a longer body is not either).

    Raises ConfigError naming the field.
    """

    max_attempts: int = 3
    wait: Wait | None = None
    stop: Stop | None = None
    retry_on: RetryOn | None = None
    per_try_timeout: float | None = None
    budget: RetryBudget | None = field(default_factory=RetryBudget)
    hedge: Hedge | None = None
    idempotent_methods: tuple[str, ...] = ()
    buffer_body: int = 0

    def __post_init__(self) -> None:
        integer("Retry.max_attempts", self.max_attempts, least=1)
        seconds("Retry.per_try_timeout", self.per_try_timeout, optional=True)
        for name, strategy in (("wait", self.wait), ("stop", self.stop)):
            if strategy is not None and (not callable(strategy) or isinstance(strategy, type)):
                raise ConfigError(f"Retry.{name}: {strategy!r} is not a tenacity {name} strategy (a callable)")
        if self.stop is not None and self.wait is not None and _is_endless(self.stop, self.wait):
            raise ConfigError(
                f"Retry.stop: {self.stop!r} never stops, and Retry.wait ({self.wait!r}) grows without bound; give "
                "the wait a max=, or stop after a delay"
            )
        object.__setattr__(self, "retry_on", checked_retry_on("Retry.retry_on", self.retry_on))
        if self.hedge is not None and not isinstance(self.hedge, Hedge):
            raise ConfigError(f"Retry.hedge: {self.hedge!r} is not a Hedge (or None)")
        integer("Retry.buffer_body", self.buffer_body, least=0, most=_MOST_BUFFERED)
        if self.budget is not None and not isinstance(self.budget, RetryBudget):
            raise ConfigError(f"Retry.budget: {self.budget!r} is not a RetryBudget (or None)")
        methods = self.idempotent_methods
        if isinstance(methods, str | bytes) or not all(isinstance(method, str) for method in methods):
            raise ConfigError(f"Retry.idempotent_methods: {self.idempotent_methods!r} is not a sequence of strings")
        object.__setattr__(self, "idempotent_methods", tuple(self.idempotent_methods))


class Backoff:
    """Runs a call's tenacity strategies. One for each call that has failed: the strategies' state is never shared.

    tenacity itself is entered only here, on the failure path: a pass through ``Retrying`` costs every successful call
    10 to 25 us, and one ``AsyncRetrying`` shared by tasks mixes up their results. ``random``: of the default wait
    (None: the process's own).
    """

    __slots__ = ("_retry", "_series_start", "_state", "_wait")

    def __init__(self, retry: Retry, random: Random | None = None) -> None:
        self._retry = retry
        self._wait = retry.wait or FullJitter(_DEFAULT_BASE, _DEFAULT_CAP, random)
        self._state = call_state(1, 0.0, None)
        self._series_start = 0

    def next_wait(
        self,
        attempt: int,
        elapsed: float,
        error: BaseException | None,
        *,
        pause: float | None = None,
        hinted: bool = False,
        result: Any = None,
    ) -> float | None:
        """Seconds to wait after attempt number ``attempt``, or None to stop.

        ``elapsed``: seconds since the call began. ``pause``: the wait, where something else than the ``wait`` strategy
        decides it; ``stop`` is asked all the same, and told of it (``stop_before_delay``). ``hinted``: the server
        decided it, after which an exponential series begins anew (gRFC A6). ``result``: what came instead of an error.
        A strategy that raises is logged, and stops.
        """
        try:
            return self._ask(attempt, elapsed, error, pause, hinted=hinted, result=result)
        except Exception:
            logger.exception("a retry strategy failed; the call ends with the error it has")
            return None

    def _ask(
        self,
        attempt: int,
        elapsed: float,
        error: BaseException | None,
        pause: float | None,
        *,
        hinted: bool,
        result: Any,
    ) -> float | None:
        state: Any = self._state
        state.attempt_number = attempt
        state.series = attempt - self._series_start  # for GrpcBackoff
        set_outcome(state, elapsed, error, result)
        if hinted:
            self._series_start = attempt
        if pause is None:
            pause = max(0.0, float(self._wait(state)))
            if pause == inf:
                return None
        state.upcoming_sleep = pause
        if self._retry.stop is not None and self._retry.stop(state):
            return None
        state.idle_for += pause
        return pause


def _is_endless(stop: Stop, wait: Wait) -> bool:
    """Whether tenacity's own strategies are put together so that nothing but ``max_attempts`` and a deadline ends the
    waiting. A function of the user's is not tried out: it may do anything."""
    from tenacity import stop_never
    from tenacity.stop import stop_base
    from tenacity.wait import wait_base

    if stop is not stop_never and not isinstance(stop, stop_base):
        return False
    if not isinstance(wait, wait_base):
        return False
    far = call_state(_FAR, float(_FAR), None)
    try:
        return not stop(far) and wait(far) > _LONGEST_WAIT
    except Exception:  # it needs a real outcome (wait_exception), or is wrong in a way that shows at the first retry
        return False
