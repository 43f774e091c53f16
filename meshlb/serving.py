"""What surrounds a call: the request that this process is serving while it makes the call, and the time left for it.

A server, or anything that works at something for somebody, notes it with ``deadline`` or ``serving``; our server
middleware does. Every call of httpx, gRPC and ``cluster.lease`` made within looks here, once:

* it gets at most the time that is left, and none is begun when there is none;
* a call made for a request that is itself a retry counts as a retry of its own, so that a budget of 20 % bounds the
  extra load of all layers together, and not of each anew;
* one that failed in spite of its retries says so to the request, and the request's caller is told not to retry.

All of it goes where context variables go: into tasks and ``asyncio.to_thread``, not into threads of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Final

from meshlb._validate import number

ATTEMPT_COUNT: Final = "x-envoy-attempt-count"
"""Request header of HTTP: which attempt this is, from 1. Envoy's; sent with those alone that are no first attempt."""

OVERLOADED: Final = "x-envoy-overloaded"
"""Response header of HTTP: do not retry this, here or elsewhere. Envoy sends it when it refuses for overload, and never
retries a response that has it, whatever its retry policy."""

PREVIOUS_ATTEMPTS: Final = "grpc-previous-rpc-attempts"
"""Request metadata of every attempt but the first: how many came before it (gRFC A6). gRPC's core keeps this name to
itself: it arrives only if the channel's options switch core's own retries off."""

ATTEMPT_METADATA: Final = (PREVIOUS_ATTEMPTS, "meshlb-previous-attempts")
"""The same under both names: the convention's, and one that always arrives."""

PUSHBACK: Final = "grpc-retry-pushback-ms"
"""Trailing metadata: when the server wants the next attempt, in milliseconds; negative for never (gRFC A6)."""

_MOST_ATTEMPTS: Final = 1_000_000

_LONGEST: Final = 86_400.0
"""Seconds. A deadline that is further away than a day is none."""


class ServedRequest:
    """A request that is being served.

    ``previous_attempts``: how many attempts, in whatever layer, came before the one that has led here (0: none).
    ``in_vain``: a call made for it has failed although it was retried as far as that goes, or because whoever was
    called forbade a retry. Another instance, asked for the same, would do the same once more.
    """

    __slots__ = ("in_vain", "previous_attempts")

    def __init__(self, previous_attempts: int = 0) -> None:
        self.previous_attempts = previous_attempts
        self.in_vain = False


class Surroundings:
    """A deadline (a reading of ``time.monotonic``), a request, or both. Immutable."""

    __slots__ = ("deadline", "request")

    def __init__(self, deadline: float | None, request: ServedRequest | None) -> None:
        self.deadline = deadline
        self.request = request

    def limited(self, timeout: float | None) -> float | None:
        """Seconds that a call may take which would have ``timeout`` by itself; 0 or less: it must not begin."""
        if self.deadline is None:
            return timeout
        remaining = self.deadline - monotonic()
        return remaining if timeout is None or remaining < timeout else timeout

    @property
    def previous_attempts(self) -> int:
        """Attempts that came before the one being served."""
        return 0 if self.request is None else self.request.previous_attempts


_current: Final[ContextVar[Surroundings | None]] = ContextVar("meshlb_surroundings", default=None)

surroundings: Final = _current.get
"""What surrounds the calls that this thread or task makes now; None, as for most programs, if nothing does."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Give what is done within the block at most so many seconds: every call that it makes, here and in what it starts.

    An outer block's deadline holds too, if it is earlier. 0 or less: every call fails at once. None lifts the deadline,
    for work that goes on after the request that has started it.

    Raises ConfigError for what is no number of seconds.
    """
    if seconds is not None:
        number("deadline", seconds)
    outer = _current.get()
    until = None if seconds is None else _earlier(outer, seconds)
    token = _current.set(Surroundings(until, None if outer is None else outer.request))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def serving(timeout: float | None = None, previous_attempts: int = 0) -> Iterator[ServedRequest]:
    """Serve a request within the block. For server middleware: at the end, a failure of a request that is ``in_vain``
    should go out with ``x-envoy-overloaded`` (HTTP) or ``grpc-retry-pushback-ms: -1`` (gRPC).

    ``timeout``: seconds that its caller waits (None: he did not say). ``previous_attempts``: as he says.
    """
    request = ServedRequest(previous_attempts)
    outer = _current.get()
    token = _current.set(Surroundings(_inherited(outer, timeout), request))
    try:
        yield request
    finally:
        _current.reset(token)


def note_served(timeout: float | None = None, previous_attempts: int = 0) -> ServedRequest:
    """``serving`` for the rest of this context: for a server that gives each request a context of its own."""
    request = ServedRequest(previous_attempts)
    _current.set(Surroundings(_inherited(_current.get(), timeout), request))
    return request


def note_in_vain() -> None:
    """Say to the request that is being served here, if there is one, that a call for it failed and is in vain."""
    outer = _current.get()
    if outer is not None and outer.request is not None:
        outer.request.in_vain = True


def parse_milliseconds(value: str | None) -> float | None:
    """Seconds of a header that says how long a caller waits; None without one, or for one that says nothing sensible
    (Envoy: 0 is no timeout)."""
    number_ = _digits(value)
    return None if not number_ else min(number_ / 1000.0, _LONGEST)


def parse_attempts(value: str | None, *, first: int) -> int:
    """Attempts that came before, from a header in which the first one has the number ``first``."""
    return max(0, min(_digits(value) or 0, _MOST_ATTEMPTS) - first)


def _digits(value: str | None) -> int | None:
    if value is None:
        return None
    value = value.strip()
    return int(value) if value.isascii() and value.isdigit() and len(value) < 16 else None


def _inherited(outer: Surroundings | None, timeout: float | None) -> float | None:
    if timeout is None or timeout > _LONGEST:
        return None if outer is None else outer.deadline
    return _earlier(outer, timeout)


def _earlier(outer: Surroundings | None, seconds: float) -> float:
    until = monotonic() + seconds
    return until if outer is None or outer.deadline is None else min(until, outer.deadline)
