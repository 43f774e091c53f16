"""Whose fault an HTTP attempt's end was, and how far the request got: the one table of verdicts.

====================================  ========  ========  =========  ==============================================
What happened                         Kind      Sent      Retryable  Why
====================================  ========  ========  =========  ==============================================
ConnectError, ConnectTimeout          FAILURE   NOT_SENT  yes        refused, unreachable, TLS handshake failed
... because of EMFILE and the like    IGNORED   NOT_SENT  no         this process or host ran out of something
ProxyError                            FAILURE   NOT_SENT  yes        the tunnel to the endpoint was refused
PoolTimeout                           IGNORED   NOT_SENT  no         the caller's own limits; a retry adds to it
ReadTimeout, WriteTimeout             FAILURE   MAYBE     yes
ReadError, WriteError, CloseError     FAILURE   MAYBE     yes        reset; a stale keep-alive looks like this too
RemoteProtocolError                   FAILURE   MAYBE     yes        closed without an answer, garbage, truncated
... for HTTP/2 REFUSED_STREAM         FAILURE   NOT_SENT  yes        RFC 9113 8.7: guaranteed not processed
LocalProtocolError, other httpx       IGNORED   MAYBE     no         the request itself is wrong
the request body's own exception      IGNORED   MAYBE     no         the caller's iterator raised it
OSError of a user's transport         FAILURE   MAYBE     yes        NOT_SENT if the connection was refused
any other exception                   IGNORED   MAYBE     no         a bug, not an endpoint
cancellation, KeyboardInterrupt       IGNORED   MAYBE     no
502, 503, 504                         FAILURE   ANSWERED  yes        Retry-After of a 503 is this instance's own
429                                   OVERLOAD  ANSWERED  yes        Retry-After is meant for the service
501, 505                              OK        ANSWERED  no         about the request; every instance says the same
other 5xx                             FAILURE   ANSWERED  no         the application failed, and may have acted
everything else                       OK        ANSWERED  no
a failure with ``x-envoy-overloaded`` as above  ANSWERED  no         a retry is forbidden: that is, a negative pushback
====================================  ========  ========  =========  ==============================================

Whether a retryable attempt may in fact be made again is decided from idempotency and the body (``call.Safety``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

from meshlb.model import CANCELLED, LOCAL_ERRNOS, OK, Outcome, OutcomeKind, Sent
from meshlb.scope import outcome_of
from meshlb.serving import OVERLOADED

_LONGEST_RETRY_AFTER: Final = 86_400.0
"""A longer Retry-After means the same as a day, and is not worth overflowing something."""

_REFUSED_STREAM: Final = 0x7
"""RFC 9113 7."""

_MOST_CAUSES: Final = 32
"""Links of an exception's chain that are looked at; those of httpx, httpcore, anyio and the socket are a dozen."""

Verdict = tuple[OutcomeKind, Sent, bool]

_UNREACHED: Final[Verdict] = (OutcomeKind.FAILURE, Sent.NOT_SENT, True)
_BROKEN: Final[Verdict] = (OutcomeKind.FAILURE, Sent.MAYBE, True)
_SATURATED: Final[Verdict] = (OutcomeKind.IGNORED, Sent.NOT_SENT, False)
_CALLERS: Final[Verdict] = (OutcomeKind.IGNORED, Sent.MAYBE, False)

# The first class that fits counts, so the special ones come first.
_ERRORS: Final[tuple[tuple[str, Verdict], ...]] = (
    ("ConnectError", _UNREACHED),
    ("ConnectTimeout", _UNREACHED),
    ("ProxyError", _UNREACHED),
    ("PoolTimeout", _SATURATED),
    ("LocalProtocolError", _CALLERS),
    ("UnsupportedProtocol", _CALLERS),
    ("TimeoutException", _BROKEN),
    ("NetworkError", _BROKEN),
    ("RemoteProtocolError", _BROKEN),
)


class ErrorTable:
    """The verdicts on one package's exceptions. Safe from any thread."""

    def __init__(self, module: Any) -> None:
        self._rows = tuple((getattr(module, name), verdict) for name, verdict in _ERRORS)
        self._timeout: type[BaseException] = module.TimeoutException
        self._outcomes: dict[type[BaseException], Outcome] = {}

    def outcome(self, error: BaseException, body_error: BaseException | None = None) -> Outcome:
        """The outcome of an attempt that ended with ``error``. ``body_error``: what the caller's own request body
        raised, if it did; it may be an exception of the same package, when the body is another response's."""
        if not isinstance(error, Exception):
            return CANCELLED
        if error is body_error:
            return Outcome(*_CALLERS[:2], reason=type(error).__name__)
        outcome = self._outcomes.get(type(error))
        if outcome is None:
            verdict = next((verdict for kind, verdict in self._rows if isinstance(error, kind)), None)
            if verdict is None and isinstance(error, OSError):
                return outcome_of(error)
            timed_out = isinstance(error, self._timeout)
            reason = type(error).__name__
            outcome = self._outcomes[type(error)] = Outcome(*(verdict or _CALLERS), reason=reason, timed_out=timed_out)
        if outcome.kind is OutcomeKind.FAILURE:
            if _is_local(error):
                return Outcome(OutcomeKind.IGNORED, outcome.sent, reason=outcome.reason)
            if outcome.sent is Sent.MAYBE and _is_refused_stream(error):
                return Outcome(*_UNREACHED, reason="REFUSED_STREAM")
        return outcome


_FAILED: Final = {
    status: Outcome(OutcomeKind.FAILURE, retryable=status in (502, 503, 504), reason=str(status))
    for status in range(500, 600)
    if status not in (501, 505)
}
_OVERLOADED: Final = Outcome(OutcomeKind.OVERLOAD, retryable=True, reason="429", hint_binds=True)


ALWAYS_OK: Final = frozenset({*range(100, 500), 501, 505} - {429})
"""The statuses whose outcome is OK whatever the headers say."""


def outcome_of_response(status: int, headers: Mapping[str, str]) -> Outcome:
    """The outcome of an attempt that was answered, as far as status and headers tell."""
    if status < 500:
        if status != 429:
            return OK
        hint = -1.0 if OVERLOADED in headers else parse_retry_after(headers.get("retry-after"))
        return _OVERLOADED if hint is None else _with_hint(_OVERLOADED, hint)
    outcome = _FAILED.get(status, OK)
    if outcome is not OK and OVERLOADED in headers:
        return _with_hint(outcome, -1.0)
    if status == 503 and (hint := parse_retry_after(headers.get("retry-after"))) is not None:
        return _with_hint(outcome, hint)
    return outcome


def _with_hint(outcome: Outcome, hint: float) -> Outcome:
    return Outcome(
        outcome.kind,
        retryable=outcome.retryable,
        retry_after=hint,
        reason=outcome.reason,
        hint_binds=outcome.hint_binds,
    )


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110 10.2.3: whole seconds or a date), from 0 to a day; None without one
    or for one that says neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), _LONGEST_RETRY_AFTER)
    try:
        delay = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return min(max(0.0, delay), _LONGEST_RETRY_AFTER)


def _is_local(error: BaseException) -> bool:
    return any(isinstance(cause, OSError) and cause.errno in LOCAL_ERRNOS for cause in _causes(error))


def _is_refused_stream(error: BaseException) -> bool:
    # httpcore's exception carries h2's StreamReset event; httpx's own only its text.
    return any(
        getattr(event, "error_code", None) == _REFUSED_STREAM and getattr(event, "remote_reset", False)
        for cause in _causes(error)
        for event in cause.args[:1]
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it came from.

    httpcore drops ``__cause__`` on the way (``raise exc from None``), but its exceptions hold theirs as argument.
    anyio and trio, which try several addresses, leave a group. ``__context__`` is not looked at: it may be whatever
    the caller was handling when he made the call.
    """
    pending: list[object] = [error]
    for _ in range(_MOST_CAUSES):
        if not pending:
            return
        current = pending.pop()
        if isinstance(current, BaseException):
            yield current
            pending += current.args[:1]
            pending.append(current.__cause__)
            if isinstance(current, BaseExceptionGroup):
                pending += current.exceptions
