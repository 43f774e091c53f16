"""Requests that can be sent again: a message serialised once, and a stream that remembers what it has sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

Serializer = Callable[[Any], bytes]

REPLAY_LIMIT: Final = 256 * 1024
"""Bytes of a request stream that are kept for another attempt: the per-RPC retry buffer of gRPC's core. A longer
stream is sent once."""

_OVERHEAD: Final = 64
"""Bytes that remembering a message takes, whatever its size: endless empty messages fill memory too."""


class Payload:
    """A message, serialised when it is first sent. Who changes it afterwards, as gRPC lets him, changes no retry."""

    __slots__ = ("data", "message")

    def __init__(self, message: Any) -> None:
        self.message = message
        self.data: bytes | None = None


def payload_serializer(serializer: Serializer | None) -> Callable[[Payload], bytes]:
    """A serialiser for Payloads of messages that ``serializer`` takes. What it raises, gRPC handles as its own."""

    def serialize(payload: Payload) -> bytes:
        # Two attempts' threads may be here at once. The message is dropped after the data is there, and read before.
        message, data = payload.message, payload.data
        if data is None:
            data = message if serializer is None else serializer(message)
            payload.data = data
            payload.message = None
        return data

    return serialize


class RequestSource:
    """The caller's request iterator, shared by the attempts of one call.

    Each attempt's native consumer thread pulls through an iterator of its own. Pulls of the caller's iterator are
    serialised: an earlier attempt's thread may still be blocked in it, and what it gets there belongs to the current
    attempt.
    """

    def __init__(self, iterator: Iterator[Any], limit: int = REPLAY_LIMIT) -> None:
        self._iterator = iterator
        self._limit = limit
        self._changed = threading.Condition()
        self._kept: list[Payload] = []
        self._dropped = 0  # how many were forgotten at the front of _kept
        self._bytes = 0
        self._keeping = True
        self._pulling = False
        self._ended: BaseException | None = None
        self._current: Requests | None = None

    @property
    def replayable(self) -> bool:
        """Whether another attempt can send everything from the beginning."""
        return self._dropped == 0 and self._keeping

    def attempt(self) -> Requests:
        """The requests for a new attempt, from the beginning; the former attempt's end where they are."""
        with self._changed:
            self._current = requests = Requests(self)
            self._changed.notify_all()
            return requests

    def commit(self) -> None:
        """There will be no other attempt: forget what has been sent."""
        with self._changed:
            self._keeping = False
            if self._current is not None:
                del self._kept[: self._current.position - self._dropped]
                self._dropped = self._current.position

    def close(self) -> None:
        """The call has ended: let go of whoever waits for a request."""
        with self._changed:
            self._current = None
            self._keeping = False
            self._kept.clear()
            self._changed.notify_all()

    def next(self, requests: Requests) -> Payload:
        with self._changed:
            while True:
                if requests is not self._current:
                    raise StopIteration
                at = requests.position - self._dropped
                if at < len(self._kept):
                    return self._advance(requests, at)
                if self._ended is not None:
                    raise StopIteration if isinstance(self._ended, StopIteration) else self._ended
                if not self._pulling:
                    break
                self._changed.wait()
            self._pulling = True
        payload, ended = None, None
        try:
            payload = Payload(next(self._iterator))
        except BaseException as error:
            ended = error
        with self._changed:
            self._pulling = False
            if payload is not None:
                self._kept.append(payload)
            self._ended = ended
            self._changed.notify_all()
        return self.next(requests)

    def _advance(self, requests: Requests, at: int) -> Payload:
        payload = self._kept[at]
        requests.position += 1
        # What was handed out before this one has been serialised by now, so its size is known.
        if self._keeping and at == len(self._kept) - 1 and at > 0:
            self._bytes += len(self._kept[at - 1].data or b"") + _OVERHEAD
            self._keeping = self._bytes <= self._limit
        if not self._keeping:
            del self._kept[: at + 1]
            self._dropped = requests.position
        return payload


class Requests:
    """One attempt's pass over a RequestSource."""

    __slots__ = ("_source", "position")

    def __init__(self, source: RequestSource) -> None:
        self._source = source
        self.position = 0

    def __iter__(self) -> Requests:
        return self

    def __next__(self) -> Payload:
        return self._source.next(self)
