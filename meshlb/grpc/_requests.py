"""A stream of requests that can be sent again: it remembers what it has sent."""

from __future__ import annotations

import logging
import threading
from _thread import RLock  # threading.RLock is a Python function that calls this one
from collections.abc import Callable, Iterator
from functools import partial
from types import GeneratorType
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

    __slots__ = ("__dict__", "_attempt", "_ended", "_first_over", "_first_pulls", "_iterator", "_kept", "_serializer",
                 "keeping")  # fmt: skip

    def __init__(self, iterator: Iterator[Any], serializer: Serializer | None = None) -> None:
        self._iterator = iterator
        self._serializer = serializer
        self._kept: list[Any] = []
        self.keeping = True
        """Whether another attempt may be made. While there is only the first one, setting it to False does for
        ``commit``, which is a call; what has been sent is forgotten at the next request then."""
        self._ended: BaseException | None = None
        self._attempt = 0  # the current one's number
        self._first_pulls = self._first_over = False

    def attempt(self) -> Iterator[Any]:
        """The requests for a new attempt, from the beginning; the former attempt's end where they are."""
        if not self._attempt:
            self._attempt = 1
            return self._first()
        later = self._move_on()
        later.size = sum(map(_size, self._kept))
        return self._further(later, self._attempt)

    def rewind(self) -> bool:
        """The current attempt is over. Whether another one can send everything from the beginning."""
        later = self._move_on()
        with later.lock:
            return later.dropped == 0 and self.keeping

    def commit(self) -> None:
        """There will be no other attempt: forget what has been sent."""
        if not self._first_over:
            self.keeping = False
            self._kept.clear()
            return
        later = self._for_later()
        with later.lock:
            self.keeping = False
            del self._kept[: later.position - later.dropped]
            later.dropped = later.position

    def close(self) -> None:
        """The call has ended: let go of whoever waits for a request."""
        if self._attempt == 1:
            self._first_over = True
            self.keeping = False
            self._kept.clear()
            return
        later = self._move_on()
        with later.lock:
            self.keeping = False
            self._kept.clear()

    def _for_later(self) -> _Later:
        # One step, without a lock: several threads may be here, and a signal's handler in the midst of one.
        later: _Later = vars(self).setdefault("later", _Later())
        return later

    def _move_on(self) -> _Later:
        later = self._for_later()
        with later.lock:
            self._first_over = True
            self._attempt += 1
            later.position = 0
            later.wake()
        return later

    # Generators, and in one piece: a message costs no Python call but the caller's own.

    def _first(self) -> Iterator[Any]:
        """The first attempt's requests."""
        kept, iterator, serializer, size = self._kept, self._iterator, self._serializer, 0
        self._first_pulls = True
        try:
            if type(iterator) not in _BY_THE_BOOK and not _is_its_own(iterator):
                iterator = iter(partial(next, iterator), _END)  # gRPC asks for no more than __next__, and for that
            if not self._first_over:
                for message in iterator:
                    try:
                        data = message if serializer is None else serializer(message)
                    except Exception:
                        data = refused()
                    # The last message does not count: it may be the only one, and then there would be no retry.
                    if self.keeping and size > REPLAY_LIMIT:
                        self.keeping = False
                    if self.keeping:
                        size += _OVERHEAD + (len(data) if type(data) is bytes else 0)
                        kept.append(data)
                    elif self._first_over:
                        kept.append(data)  # another attempt may have been promised all of it
                    elif kept:
                        kept.clear()
                    self._first_pulls = False
                    if self._first_over:
                        break
                    yield data
                    self._first_pulls = True
                    if self._first_over:
                        break
                else:
                    self._ended = _STOPPED
        except GeneratorExit:
            raise  # whoever pulled does not want any more; the caller's iterator has not ended
        except BaseException as error:
            self._ended = error
            if not self._first_over:
                raise
        finally:
            self._first_pulls = False
            if self._first_over:
                later = self._for_later()
                with later.lock:
                    later.wake()

    def _further(self, later: _Later, attempt: int) -> Iterator[Any]:
        """A later attempt's requests. The lock is not held when it yields."""
        lock, kept, iterator, serializer = later.lock, self._kept, self._iterator, self._serializer
        data: Any
        while True:
            with lock:
                if attempt != self._attempt:
                    return
                at = later.position - later.dropped
                if at < len(kept):
                    data = kept[at]
                    later.position += 1
                    if not self.keeping:
                        del kept[: at + 1]
                        later.dropped = later.position
                elif self._ended is not None:
                    break
                elif later.pulling or self._first_pulls:
                    if later.changed is None:
                        later.changed = threading.Condition(lock)
                    later.changed.wait()
                    continue
                else:
                    later.pulling = True
                    at = -1
            if at < 0:
                ended = None
                try:
                    data = serialized(serializer, next(iterator))
                except BaseException as error:
                    ended = error
                with lock:
                    later.pulling = False
                    self._ended = ended
                    if ended is None:
                        if self.keeping:
                            self.keeping = later.size <= REPLAY_LIMIT
                            later.size += _size(data)
                        kept.append(data)
                    later.wake()
                continue
            yield data
        if not isinstance(self._ended, StopIteration):
            raise self._ended


class _Later:
    """What attempts after the first one need."""

    __slots__ = ("changed", "dropped", "lock", "position", "pulling", "size")

    def __init__(self) -> None:
        self.lock = RLock()  # a signal's handler may cancel the call
        self.changed: threading.Condition | None = None  # once somebody has to wait
        self.dropped = 0  # how many messages were forgotten at the front of those that are kept
        self.pulling = False
        self.position = 0  # how many messages the current attempt has got
        self.size = 0  # bytes of all that are kept, but for one that a former attempt has still pulled

    def wake(self) -> None:
        """Let those look again who wait; with the lock held."""
        if self.changed is not None:
            self.changed.notify_all()


_BY_THE_BOOK: Final = frozenset({GeneratorType, type(iter([])), type(iter(()))})


def _is_its_own(iterator: Any) -> bool:
    """Whether it is an iterator by the book, which gives itself when it is asked for one."""
    try:
        return iter(iterator) is iterator
    except Exception:
        return False


def _size(data: Any) -> int:
    return _OVERHEAD + (len(data) if type(data) is bytes else 0)
