"""``Retry.retry_on``: which ends of an attempt call for another one, in the user's words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from meshlb.errors import ConfigError
from meshlb.model import Outcome, OutcomeKind, Sent

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = logging.getLogger("meshlb.retry")

Predicate = Callable[["RetryCallState"], bool]
RetryOn = Predicate | Iterable[int | str | Any]

GRPC_CODES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
"""In the order of their numbers (google.rpc.Code)."""

_HTTP_ERRORS: Final = (
    "ConnectError", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "ReadError", "WriteError", "CloseError",
    "RemoteProtocolError",
)  # fmt: skip


def checked_retry_on(field: str, given: object) -> Predicate | frozenset[str] | None:
    """A predicate as it is; a collection as the names of what ends an attempt ("503", "UNAVAILABLE", "ReadTimeout").

    Raises ConfigError naming ``field``.
    """
    if given is None:
        return None
    if callable(given):
        if isinstance(given, type):
            raise ConfigError(f"{field}: {given!r} is a class; give one of its objects: {given.__name__}(...)")
        return given
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"{field}: {given!r} is neither a tenacity retry predicate nor a collection of statuses")
    names = frozenset(_name(field, entry) for entry in given)
    if not names:
        raise ConfigError(f"{field}: empty; Retry(max_attempts=1) or ServiceConfig(retry=None) makes no retries")
    return names


def _name(field: str, entry: object) -> str:
    if isinstance(entry, bool):
        raise ConfigError(f"{field}: {entry!r} is not a status")
    if isinstance(entry, int):
        if 300 <= entry <= 599:  # http.HTTPStatus among them
            return str(int(entry))
        raise ConfigError(f"{field}: {entry!r} is not an HTTP status from 300 to 599")
    name = entry if isinstance(entry, str) else getattr(entry, "name", None)  # grpc.StatusCode has a name
    if isinstance(name, str):
        if name.isascii() and name.isdigit():
            return _name(field, int(name))
        if name in _HTTP_ERRORS or (name.upper() in GRPC_CODES and name.upper() != "OK"):
            return name if name in _HTTP_ERRORS else name.upper()
    raise ConfigError(
        f"{field}: {entry!r} is none of: an HTTP status, a gRPC code ({', '.join(GRPC_CODES[1:])}), "
        f"an error of the HTTP client ({', '.join(_HTTP_ERRORS)})"
    )


def is_retryable(
    retry_on: Predicate | frozenset[str],
    outcome: Outcome,
    code: str,
    *,
    error: BaseException | None = None,
    result: Any = None,
    attempt: int = 1,
    elapsed: float = 0.0,
) -> bool:
    """Whether an attempt that ended so may be followed by another one, as far as ``retry_on`` says.

    It replaces the verdict table's "retryable", and nothing else: what is not safe to send again is not sent again.
    What is this process's own doing (IGNORED) keeps the table's verdict; so does, with a collection, what provably
    reached nobody, since that is a first sending. ``code``: the end in a word ("503", "UNAVAILABLE", "ReadTimeout").
    A predicate that raises is logged, and the table's verdict stands.
    """
    if outcome.kind is OutcomeKind.IGNORED:
        return outcome.retryable
    if isinstance(retry_on, frozenset):
        return outcome.retryable if outcome.sent is Sent.NOT_SENT else code in retry_on
    try:
        return bool(retry_on(call_state(attempt, elapsed, error, result)))
    except Exception:
        logger.exception("Retry.retry_on failed; the attempt is judged without it")
        return outcome.retryable


def call_state(attempt: int, elapsed: float, error: BaseException | None, result: Any = None) -> RetryCallState:
    """tenacity's view of a call: its attempt number ``attempt`` has ended, ``elapsed`` seconds after its beginning."""
    from tenacity import RetryCallState

    nothing: Any = None
    state = RetryCallState(retry_object=nothing, fn=None, args=(), kwargs={})
    state.attempt_number = attempt
    # `seconds_since_start` is the difference of two stamps of the state; both are set by the mesh's own clock.
    state.start_time = 0.0
    set_outcome(state, elapsed, error, result)
    return state


def set_outcome(state: RetryCallState, elapsed: float, error: BaseException | None, result: Any = None) -> None:
    """Tell the state how its attempt has ended."""
    if error is not None:
        state.set_exception((type(error), error, error.__traceback__))
    else:
        state.set_result(result)
    state.outcome_timestamp = elapsed
