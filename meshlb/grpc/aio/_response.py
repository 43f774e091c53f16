"""The response side of a call: one message to await, or a stream to read."""

from __future__ import annotations

import enum
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.grpc import _status
from meshlb.grpc.aio._call import MeshCall
from meshlb.grpc.aio._ended import ended_with
from meshlb.grpc.aio._errors import DeadlineExceeded
from meshlb.grpc.aio._native import API_STYLE, EOF, UsageError, is_immediate
from meshlb.grpc.aio._timed import TimedAttempt
from meshlb.model import CANCELLED

if TYPE_CHECKING:
    from meshlb.node import Lease
    from meshlb.telemetry import AttemptTrace


_AT_ONCE: Final = 0.001
"""Seconds after the beginning of an attempt in which nobody is late to read its response: what its latency may be
overrated by. To look whether there is a response already costs more than the rest of the reading."""


class UnaryResponse(MeshCall):
    """A call that is awaited for its one response message."""

    def __await__(self) -> Generator[Any, None, Any]:
        while True:
            native = self._native
            if native is None:
                if self._ended is not None:
                    raise self._ended.error()
                yield from self._turn_or_cancel().__await__()
                continue
            try:
                return (yield from native.__await__())
            except BaseException as error:
                if self._is_for_caller(native, error):
                    raise


class Style(enum.Enum):
    """How the user reads a stream; the two may not be mixed."""

    ITERATOR = enum.auto()
    READER = enum.auto()


class StreamResponse(TimedAttempt):
    """A call whose response is read with ``async for`` or ``read()``.

    Another endpoint may take over until the first message, or initial metadata, has reached the caller.

    A stream that its user has dropped is cancelled, so nothing here may hold it but coroutines of his: grpc's
    callbacks get weak references.
    """

    cancelled_when_dropped = True
    _style: Style | None = None
    _iterator: weakref.ref[AsyncGenerator[Any, None]] | None = None
    _is_limited = False
    """The service's configured timeout ends before the caller's."""
    _own_deadline: float | None = None
    """Then: the caller's."""
    _iterated = False
    """The iterator has come to its end."""

    def _limit(self, timeout: float | None) -> None:
        # The configured timeout is about when the response begins; the stream may go on for as long as the caller says.
        self._is_limited = True
        self._own_deadline = None if timeout is None else self._method.cluster.clock() + timeout

    def _attempt_timeout(self) -> float | None:
        return self.time_remaining()

    def _response_limit(self) -> float | None:
        return self._remaining() if self._is_limited else None

    def time_remaining(self) -> float | None:
        """Seconds until the deadline of the whole call, not negative; None without one."""
        if not self._is_limited:
            return self._remaining()
        return None if self._own_deadline is None else max(0.0, self._own_deadline - self._method.cluster.clock())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call ``callback(self)`` when the RPC ends; at once if it has ended. So the call is kept until then."""
        if not self._done:
            self._here.kept.add(self)
        super().add_done_callback(callback)

    # -- reading -----------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._style is not Style.ITERATOR:
            self._read_in(Style.ITERATOR)
        iterator = None if self._iterator is None else self._iterator()
        if iterator is None:
            iterator = self._messages()
            self._iterator = weakref.ref(iterator)
        return iterator

    async def _messages(self) -> AsyncGenerator[Any, None]:
        # The native call's own iterator runs within this one, so that a message costs one frame of ours and no more.
        while not self._iterated:
            native = self._native
            try:
                if native is None:
                    await self._next_attempt()
                    continue
                late = not self._committed and self._is_late(native)
                messages = native if self._method.longest_silence is None else self._unless_silent(native)
                async for message in messages:
                    if not self._committed:
                        if self._native is not native:
                            break
                        self._answered(late=late)
                    yield message
                else:
                    self._iterated = self._native is native
            except GeneratorExit:
                raise
            except BaseException as error:
                if native is None or self._is_for_caller(native, error):
                    self._iterated = True
                    raise

    async def read(self) -> Any:
        """The next message, or ``grpc.aio.EOF`` after the last one."""
        if self._style is not Style.READER and not self._done:
            self._read_in(Style.READER)
        while True:
            native = self._native
            if native is None:
                await self._next_attempt()
                continue
            late = not self._committed and self._is_late(native)
            try:
                if self._method.longest_silence is None or not self._committed:
                    message = await native.read()
                else:
                    with self._watch_silence(native):
                        message = await native.read()
            except BaseException as error:
                if self._is_for_caller(native, error):
                    raise
                continue
            if self._native is not native:
                continue
            if not self._committed and message is not EOF:
                self._answered(late=late)
            return message

    async def _next_attempt(self) -> None:
        """Wait for it. Raises what the call has ended with."""
        if self._ended is not None:
            raise self._ended.error()
        await self._turn_or_cancel()

    def _is_late(self, native: Any) -> bool:
        """Whether the response may have been there before anybody asked for it."""
        elapsed = self._method.cluster.clock() - self._lease.started
        return elapsed > _AT_ONCE and is_immediate(native.initial_metadata())

    async def _unless_silent(self, native: Any) -> AsyncGenerator[Any, None]:
        """The messages of a native call, for as long as each comes in time."""
        messages = aiter(native)
        while True:
            with self._watch_silence(native):
                try:
                    message = await anext(messages)
                except StopAsyncIteration:
                    return
            yield message

    @contextmanager
    def _watch_silence(self, native: Any) -> Iterator[None]:
        """Give the stream up when the next message takes too long."""
        idle = self._method.longest_silence
        if idle is None or self._done or not self._committed:
            yield
            return
        watch = self._here.loop.call_later(idle, self._silent, native, idle)
        try:
            yield
        finally:
            watch.cancel()

    def _silent(self, native: Any, idle: float) -> None:
        if self._done or native is not self._native:
            return
        error = DeadlineExceeded(
            f"Deadline Exceeded: no message from {self._lease.endpoint.address} for {idle:g} s "
            "(ServiceConfig.stream_idle_timeout)"
        )
        self._native = None
        self._settle(_status.SILENT, grpc.StatusCode.DEADLINE_EXCEEDED)
        self._end(ended_with(error))
        native.cancel()

    def _read_in(self, style: Style) -> None:
        if self._style is None:
            self._style = style
        elif self._style is not style:
            raise UsageError(API_STYLE)

    # -- a stream that nobody reads any more -------------------------------------------------------------------

    def __del__(self) -> None:
        native = self._native
        if self._done or native is None:
            return
        self._here.active.pop(id(self), None)
        try:
            # The collector may run in any thread, and inside of any lock.
            self._here.loop.call_soon_threadsafe(_abandon, native, self._lease, self._trace)
        except RuntimeError:
            pass  # the loop is closed, and the RPC ended with it


def _abandon(native: Any, lease: Lease, trace: AttemptTrace | None) -> None:
    native.cancel()
    lease.close(CANCELLED)
    if trace is not None:
        trace.finish("CANCELLED", CANCELLED, lease.latency)
