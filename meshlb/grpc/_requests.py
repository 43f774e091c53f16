"""A stream of requests that can be sent again: it remembers what it has sent."""

from __future__ import annotations

import logging
import threading
from _thread import RLock  # threading.RLock is a Python function that calls this one
from collections.abc import Callable, Iterator
from typing import Any, Final

logger = logging.getLogger("meshlb.grpc")

Serializer = Callable[[Any], bytes]

REPLAY_LIMIT: Final = 256 * 1024
"""Bytes of a request stream that are kept for another attempt: the per-RPC retry buffer of gRPC's core. A longer
stream is sent once."""

_OVERHEAD: Final = 64
"""Bytes that remembering a message takes, whatever its size: endless empty messages fill memory too."""


_END: Final = object()

_STOPPED: Final = StopIteration()
"""An iterator that has ended as it should; one for all of them, as to raise and catch it takes half a microsecond."""


def serialized(serializer: Serializer | None, message: Any) -> Any:
    """The bytes of a message. Who changes it afterwards, as gRPC lets him, changes no retry."""
    try:
        return message if serializer is None else serializer(message)
    except Exception:
        return refused()


def refused() -> Any:
    """Log that a serialiser has raised. None in place of the bytes makes gRPC end the call as it does then."""
    logger.exception("a request could not be serialised")
    return None


class RequestSource:
    """The caller's request iterator, shared by the attempts of one call.

    Each attempt's native consumer thread pulls through a generator of its own, and gets serialised messages. Pulls of
    the caller's iterator are serialised, too: an earlier attempt's thread may still be blocked in it, and what it gets
    there belongs to the current attempt.

    Most calls have one attempt, whose thread takes no lock. It says so (``_first_pulls``) and then looks whether it is
    still wanted (``_first_over``); whoever ends it sets this and then looks at that, so one of the two sees the other.
    """

    __slots__ = ("_attempt", "_bytes", "_changed", "_dropped", "_ended", "_first_over", "_first_pulls", "_iterator",
                 "_keeping", "_kept", "_limit", "_lock", "_position", "_pulling", "_serializer")  # fmt: skip

    def __init__(
        self, iterator: Iterator[Any], serializer: Serializer | None = None, limit: int = REPLAY_LIMIT
    ) -> None:
        self._iterator = iterator
        self._serializer = serializer
        self._limit = limit
        self._kept: list[Any] = []
        self._bytes = 0  # of all messages pulled, as long as they are kept
        self._keeping = True
        self._ended: BaseException | None = None
        self._attempt = 0  # the current one's number
        self._first_pulls = self._first_over = False
        # For later attempts alone:
        self._lock = RLock()  # a signal's handler may cancel the call
        self._changed: threading.Condition | None = None  # once somebody has to wait
        self._dropped = 0  # how many were forgotten at the front of _kept
        self._pulling = False
        self._position = 0  # how many messages the current one has got

    def attempt(self) -> Iterator[Any]:
        """The requests for a new attempt, from the beginning; the former attempt's end where they are."""
        if not self._attempt:
            self._attempt = 1
            return self._first()
        with self._lock:
            self._move_on()
            self._position = 0
            return self._further(self._attempt)

    def rewind(self) -> bool:
        """The current attempt is over. Whether another one can send everything from the beginning."""
        with self._lock:
            self._move_on()
            return self._dropped == 0 and self._keeping

    def commit(self) -> None:
        """There will be no other attempt: forget what has been sent."""
        if not self._first_over:
            self._keeping = False
            self._kept.clear()
            return
        with self._lock:
            self._keeping = False
            del self._kept[: self._position - self._dropped]
            self._dropped = self._position

    def close(self) -> None:
        """The call has ended: let go of whoever waits for a request."""
        if self._attempt == 1:
            self._first_over = True
            self._keeping = False
            self._kept.clear()
            return
        with self._lock:
            self._move_on()
            self._keeping = False
            self._kept.clear()

    def _move_on(self) -> None:
        self._first_over = True
        self._attempt += 1
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._changed is not None:
                self._changed.notify_all()

    # Generators, and in one piece: a message costs no Python call but the caller's own.

    def _first(self) -> Iterator[Any]:
        """The first attempt's requests."""
        kept, iterator, serializer = self._kept, self._iterator, self._serializer
        while True:
            self._first_pulls = True
            if self._first_over:
                break
            try:
                message = next(iterator, _END)
                if message is _END:
                    self._ended = _STOPPED
                    break
                try:
                    data = message if serializer is None else serializer(message)
                except Exception:
                    data = refused()
            except BaseException as error:
                self._ended = error
                break
            if self._keeping:
                # The last message does not count: it may be the only one, and then there would be no retry.
                if self._bytes > self._limit:
                    self._keeping = False
                    if not self._first_over:  # or another attempt may have been promised all of it
                        kept.clear()
                self._bytes += _OVERHEAD + (len(data) if type(data) is bytes else 0)
            if self._keeping or self._first_over:
                kept.append(data)
            self._first_pulls = False
            if self._first_over:
                break
            yield data
        self._first_pulls = False
        if self._first_over:
            self._wake()
        elif self._ended is not None and not isinstance(self._ended, StopIteration):
            raise self._ended

    def _further(self, attempt: int) -> Iterator[Any]:
        """A later attempt's requests. The lock is not held when it yields."""
        lock, kept, iterator, serializer = self._lock, self._kept, self._iterator, self._serializer
        data: Any
        while True:
            with lock:
                if attempt != self._attempt:
                    return
                at = self._position - self._dropped
                if at < len(kept):
                    data = kept[at]
                    self._position += 1
                    if not self._keeping:
                        del kept[: at + 1]
                        self._dropped = self._position
                elif self._ended is not None:
                    break
                elif self._pulling or self._first_pulls:
                    if self._changed is None:
                        self._changed = threading.Condition(lock)
                    self._changed.wait()
                    continue
                else:
                    self._pulling = True
                    at = -1
            if at < 0:
                ended = None
                try:
                    data = serialized(serializer, next(iterator))
                except BaseException as error:
                    ended = error
                with lock:
                    self._pulling = False
                    self._ended = ended
                    if ended is None:
                        if self._keeping:
                            self._keeping = self._bytes <= self._limit
                            self._bytes += _size(data)
                        kept.append(data)
                    self._wake()
                continue
            yield data
        if not isinstance(self._ended, StopIteration):
            raise self._ended


def _size(data: Any) -> int:
    return _OVERHEAD + (len(data) if type(data) is bytes else 0)
