"""What a gRPC status says of the attempt that ended with it: whose fault it was, and whether another one is safe.

gRPC's core tells its Python users neither how far a request got nor who made up a status; for some codes only the
text of ``details()`` does. That text has no version, so every piece of it that meshlb relies on stands in this
module and nowhere else, each with a test against a real server, and whatever matches nothing counts as "may have been
processed".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import grpc

from meshlb.model import CANCELLED, OK, Outcome, OutcomeKind, Sent
from meshlb.node import NOT_STARTED
from meshlb.serving import PUSHBACK

# -- the texts -----------------------------------------------------------------------------------------------------

_NO_CONNECTION: Final = ("failed to connect to all addresses", "errors resolving ", "DNS resolution failed")
"""UNAVAILABLE: refused, unreachable, no TLS, connect timeout, no HTTP/2, no such host. The call never got a
connection."""

_TOO_MANY_FILES: Final = "Too many open files"
"""Within the text above: this process has no file descriptor left. No endpoint's fault."""

_PLUGIN_FAILED: Final = "Getting metadata from plugin failed"
"""UNAVAILABLE: the caller's own call credentials raised."""

_CHANNEL_CLOSED: Final = ("Channel closed!", "Channel deallocated!")
"""CANCELLED: the sub-channel was closed under the call, here."""

_LOCALLY_CANCELLED: Final = ("Locally cancelled by application!", "Cancelled upon garbage collection!")
"""CANCELLED: by the caller."""

_DEADLINE_PASSED: Final = "Deadline Exceeded"
"""DEADLINE_EXCEEDED: by the client's own clock. Any other text is a status that the server sent."""

_LOCAL_TEXTS: Final = (
    "Exception serializing request!",  # INTERNAL
    "Invalid metadata",  # INTERNAL
    "Exception iterating requests!",  # UNKNOWN
    "CLIENT: Sent message larger than max",  # RESOURCE_EXHAUSTED
    "Established channel does not have a sufficient security level",  # UNAUTHENTICATED
)
"""The request itself was no good, which this process found out alone."""

_REPLY_REFUSED: Final = ("Exception deserializing response!", "CLIENT: Received message larger than max")
"""INTERNAL and RESOURCE_EXHAUSTED: the server answered, but this process would not take the answer."""

_REQUEST_REFUSED: Final = ("SERVER: Received message larger than max", "received metadata size exceeds")
"""RESOURCE_EXHAUSTED: about the size of this one message, so no sign of overload."""

_CLOSED_ERRORS: Final = ("Cannot invoke RPC", "Channel is closed", "Channel closed")
"""ValueError, and cygrpc.UsageError under asyncio: the sub-channel was closed before the call began."""

# -- the outcomes --------------------------------------------------------------------------------------------------

_Code = grpc.StatusCode

_CONNECT_FAILED: Final = Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason="UNAVAILABLE")
_NO_FILES: Final = Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, retryable=True, reason="too many open files")
_CLOSED_UNDER_CALL: Final = Outcome(OutcomeKind.IGNORED, Sent.MAYBE, retryable=True, reason="connection closed")

TIMED_OUT: Final = Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason="DEADLINE_EXCEEDED", timed_out=True)
"""No response within the time that the attempt had. The adapter knows whether the call itself has time left."""

SILENT: Final = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, reason="stream idle", timed_out=True)
"""A stream of responses that had begun, and then said nothing for too long."""

_FAILED: Final = {
    # Retryable where the status says "not now" or "not here"; INTERNAL, UNKNOWN and DATA_LOSS say that something
    # broke while the request was processed, which another endpoint will most likely repeat.
    _Code.UNAVAILABLE: (OutcomeKind.FAILURE, True),
    _Code.INTERNAL: (OutcomeKind.FAILURE, False),
    _Code.UNKNOWN: (OutcomeKind.FAILURE, False),
    _Code.DATA_LOSS: (OutcomeKind.FAILURE, False),
    _Code.DEADLINE_EXCEEDED: (OutcomeKind.FAILURE, False),
    _Code.RESOURCE_EXHAUSTED: (OutcomeKind.OVERLOAD, True),
    # CANCELLED, but not by us: how a grpcio server refuses calls beyond its pending limit, and what a few calls get
    # while a server shuts down gracefully.
    _Code.CANCELLED: (OutcomeKind.OVERLOAD, True),
}


def classify(
    code: grpc.StatusCode,
    details: str | None,
    trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    *,
    initial_metadata: Iterable[tuple[str, str | bytes]] | None = (),
    locally_cancelled: bool = False,
) -> Outcome:
    """The outcome of an attempt that ended with this status.

    ``initial_metadata``: what is known to have been received; if it is not empty, the server did answer.
    ``locally_cancelled``: the caller cancelled the call, or closed the channel under it.
    """
    if code is _Code.OK:
        return OK
    text = details or ""
    if locally_cancelled or (code is _Code.CANCELLED and text.startswith(_LOCALLY_CANCELLED)):
        return CANCELLED
    answered = bool(initial_metadata)
    if not answered:
        local = _made_here(code, text)
        if local is not None:
            return local
    if text.startswith(_REPLY_REFUSED) or f"({_REPLY_REFUSED[1]}" in text:  # within "Stream removed (...)"
        return Outcome(OutcomeKind.IGNORED, Sent.ANSWERED, reason=code.name)
    if code is _Code.RESOURCE_EXHAUSTED and text.startswith(_REQUEST_REFUSED):
        return Outcome(OutcomeKind.OK, Sent.ANSWERED, reason=code.name)
    if code not in _FAILED:
        return Outcome(OutcomeKind.OK, Sent.ANSWERED, reason=code.name)  # the application's own answer
    kind, retryable = _FAILED[code]
    retry_after = pushback(trailing_metadata)
    sent = Sent.MAYBE if code in (_Code.UNAVAILABLE, _Code.CANCELLED) and not answered else Sent.ANSWERED
    return Outcome(kind, sent, retryable, retry_after, code.name, hint_binds=retry_after is not None)


def _made_here(code: grpc.StatusCode, text: str) -> Outcome | None:
    """The outcome if no server had a part in the status."""
    if code is _Code.UNAVAILABLE:
        if text.startswith(_NO_CONNECTION):
            return _NO_FILES if _TOO_MANY_FILES in text else _CONNECT_FAILED
        if text.startswith(_PLUGIN_FAILED):
            return Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason="call credentials")
    elif code is _Code.CANCELLED:
        if text.startswith(_CHANNEL_CLOSED):
            return _CLOSED_UNDER_CALL
    elif code is _Code.DEADLINE_EXCEEDED:
        if _DEADLINE_PASSED in text:  # or within "Stream removed (...)"
            return TIMED_OUT
    elif text.startswith(_LOCAL_TEXTS):
        return Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason=code.name)
    return None


def classify_local(exception: BaseException) -> Outcome:
    """The outcome of an attempt whose start raised this, which was no status.

    A sub-channel that was closed between the pick and the call is worth another pick: nothing was sent.
    """
    if not isinstance(exception, Exception):
        return CANCELLED  # KeyboardInterrupt, GeneratorExit, asyncio.CancelledError
    if str(exception).startswith(_CLOSED_ERRORS):
        return NOT_STARTED
    return Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason=type(exception).__name__)


def pushback(trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Seconds until the server wants the next attempt; negative if it wants none; None if it does not say.

    gRFC A6: a negative or unparsable value means none; so do two values, as in grpc-go.
    """
    values = [value for key, value in trailing_metadata or () if key == PUSHBACK]
    if not values:
        return None
    value = values[0]
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if len(values) > 1 or not (text.isascii() and text.isdigit()):
        return -1.0
    return int(text) / 1000.0
