"""When a failed attempt is followed by another one. The vocabulary of waits and stops is tenacity's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Final

from meshlb._validate import integer, seconds
from meshlb.errors import ConfigError
from meshlb.resilience.budget import RetryBudget

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = logging.getLogger("meshlb.retry")

Wait = Callable[["RetryCallState"], float]
Stop = Callable[["RetryCallState"], bool]

_BACKOFF_BASE: Final = 0.025
_BACKOFF_CAP: Final = 0.25
"""Full jitter from 25 ms, at most 250 ms: Envoy's defaults."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How a call that failed on one endpoint goes on to another.

    A retry is made only if it is safe: nothing was sent, or the request is idempotent and its body can be replayed.
    It goes to an endpoint that this call has not tried, at once; ``wait`` applies when only tried ones are left. An
    attempt that provably never reached a server (connection refused) costs neither ``max_attempts`` nor budget while
    there is an untried endpoint to go to (gRFC A6: transparent retry).

    * ``max_attempts``: attempts in all (3: one retry hides one bad endpoint, two hide a bad endpoint during a
      rolling restart; more only adds load).
    * ``wait``, ``stop``: tenacity strategies (``tenacity.wait_*``, ``tenacity.stop_*``, combined with ``+``, ``|``,
      ``&``), called with a RetryCallState of this call alone. None: full jitter from 25 to 250 ms; no further stop.
    * ``per_try_timeout``: seconds an attempt may take until its response starts (None: only the call's own timeout).
      Set it to let a call escape from an endpoint that hangs.
    * ``budget``: the extra load allowed (None: unbounded, which multiplies an outage).
    * ``idempotent_methods``: methods that may be sent twice, beyond those the protocol says so of (RFC 9110 9.2.2;
      ``idempotency_level`` in a .proto): HTTP verbs ("POST") or gRPC methods ("/shop.Orders/Get", "/shop.Orders/*").

    Raises ConfigError naming the field.
    """

    max_attempts: int = 3
    wait: Wait | None = None
    stop: Stop | None = None
    per_try_timeout: float | None = None
    budget: RetryBudget | None = field(default_factory=RetryBudget)
    idempotent_methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        integer("Retry.max_attempts", self.max_attempts, least=1)
        seconds("Retry.per_try_timeout", self.per_try_timeout, optional=True)
        for name, strategy in (("wait", self.wait), ("stop", self.stop)):
            if strategy is not None and (not callable(strategy) or isinstance(strategy, type)):
                raise ConfigError(f"Retry.{name}: {strategy!r} is not a tenacity {name} strategy (a callable)")
        if self.budget is not None and not isinstance(self.budget, RetryBudget):
            raise ConfigError(f"Retry.budget: {self.budget!r} is not a RetryBudget (or None)")
        methods = self.idempotent_methods
        if isinstance(methods, str | bytes) or not all(isinstance(method, str) for method in methods):
            raise ConfigError(f"Retry.idempotent_methods: {self.idempotent_methods!r} is not a sequence of strings")
        object.__setattr__(self, "idempotent_methods", tuple(self.idempotent_methods))


class Backoff:
    """Runs a call's tenacity strategies. One for each call that has failed: the strategies' state is never shared.

    tenacity itself is entered only here, on the failure path: a pass through ``Retrying`` costs every successful call
    10 to 25 us, and one ``AsyncRetrying`` shared by tasks mixes up their results.
    """

    __slots__ = ("_retry", "_state")

    def __init__(self, retry: Retry) -> None:
        from tenacity import RetryCallState

        self._retry = retry
        nothing: Any = None
        self._state = RetryCallState(retry_object=nothing, fn=None, args=(), kwargs={})
        # `seconds_since_start` is the difference of two stamps of the state; both are set by the mesh's own clock.
        self._state.start_time = 0.0

    def next_wait(
        self, attempt: int, elapsed: float, error: BaseException | None, *, pause: float | None = None
    ) -> float | None:
        """Seconds to wait after attempt number ``attempt``, or None to stop.

        ``elapsed``: seconds since the call began. ``pause``: the wait, where something else than the ``wait`` strategy
        decides it; ``stop`` is asked all the same, and told of it (``stop_before_delay``). A strategy that raises is
        logged, and stops.
        """
        try:
            return self._ask(attempt, elapsed, error, pause)
        except Exception:
            logger.exception("a retry strategy failed; the call ends with the error it has")
            return None

    def _ask(self, attempt: int, elapsed: float, error: BaseException | None, pause: float | None) -> float | None:
        state = self._state
        state.attempt_number = attempt
        if error is not None:
            state.set_exception((type(error), error, error.__traceback__))
        else:
            state.set_result(None)
        state.outcome_timestamp = elapsed
        if pause is None:
            pause = max(0.0, float((self._retry.wait or _default_wait())(state)))
            if pause == inf:
                return None
        state.upcoming_sleep = pause
        if self._retry.stop is not None and self._retry.stop(state):
            return None
        state.idle_for += pause
        return pause


@functools.cache
def _default_wait() -> Wait:
    from tenacity import wait_random_exponential

    return wait_random_exponential(multiplier=_BACKOFF_BASE, max=_BACKOFF_CAP)
