"""The request side of a call that sends a stream: from an iterator, or message by message.

Native calls are always written to, so that one can be followed by another: the messages that the current attempt has
been given are remembered, within limits, and given to the next attempt first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, Final

from meshlb.call import Safety
from meshlb.grpc.aio._connecting import Connecting
from meshlb.grpc.aio._native import ALREADY_FINISHED, API_STYLE, HALF_CLOSED, AioRpcError, InternalError, UsageError

if TYPE_CHECKING:
    from meshlb.grpc.aio._loops import LoopChannels
    from meshlb.grpc.aio._multicallable import MultiCallable

logger = logging.getLogger("meshlb.grpc.aio")

_REPLAY_LIMIT: Final = 256 * 1024
"""Bytes of messages remembered per call; beyond, the call is committed to its endpoint. The default of gRPC's own
retries (gRFC A6, ``grpc.per_rpc_retry_buffer_size``)."""

_OVER = (AioRpcError, asyncio.InvalidStateError)
"""What writing to a native call raises when the call has ended."""


class StreamRequest(Connecting):
    """A call that takes an iterator of requests, or ``write()`` and ``done_writing()``."""

    _requests: Any = None
    """The user's iterator."""
    _log_size = 0
    _accepted = 0
    """How many messages the user has handed over."""
    _delivered = 0
    """How many of them the current attempt has been given."""
    _done_writing_flag = False  # the name is grpc's: its intercepted calls look at it
    _replay: asyncio.Task[None] | None = None
    """Gives a further attempt what its predecessors were given; nobody else writes meanwhile."""
    _completed: Any = None
    """The native call that has been given the whole request."""
    _last: Any = None
    """The native call that takes messages, once it is clear that no other will ever have to."""

    def __init__(self, method: MultiCallable, here: LoopChannels, requests: Any, *rest: Any) -> None:
        self._log = []
        self._requests = requests
        super().__init__(method, here, None, *rest)
        if requests is not None and not self._done:
            self._consumer = here.loop.create_task(self._consume(requests))

    @property
    def _complete(self) -> bool:
        return self._completed is self._native

    def _safety(self) -> Safety:
        return Safety.NEVER if self._log is None else super()._safety()

    # -- writing -----------------------------------------------------------------------------------------------

    async def write(self, request: Any) -> None:
        """Send one message. Raises AioRpcError if the RPC failed meanwhile, InvalidStateError if it has ended."""
        self._require_writer()
        if self._done:
            if self._attempts == 0 and self._ended is not None and self._ended.exception is not None:
                # There was nobody to call. gRPC would find that out while the first message waits for a connection.
                raise self._ended.error()
            raise asyncio.InvalidStateError(ALREADY_FINISHED)
        if self._done_writing_flag:
            raise asyncio.InvalidStateError(HALF_CLOSED)
        await self._send(request)

    async def done_writing(self) -> None:
        """Say that there are no more messages. Idempotent."""
        self._require_writer()
        await self._half_close()

    def _require_writer(self) -> None:
        if self._requests is not None:
            raise UsageError(API_STYLE)

    async def _send(self, message: Any) -> None:
        self._accepted += 1
        number = self._accepted
        if self._log is not None:
            self._remember(message)
        while self._delivered < number:
            native = self._native
            if native is None:
                if self._ended is not None:
                    raise self._ended.error()
                await self._turn_or_cancel()
                continue
            try:
                if self._replay is not None:
                    await asyncio.wait({self._replay})
                    continue
                if self._connected is native:
                    await native.write(message)
                else:
                    await self._write_first(native, message, self._consumer)
            except asyncio.CancelledError:
                if self._is_cancelled_here(native):
                    raise
                continue
            except _OVER:
                if self._native is native:
                    raise
                continue
            if self._native is native:
                self._delivered = number
                if self._log is None:
                    self._last = native

    async def _half_close(self) -> None:
        if self._done or self._done_writing_flag:
            return
        self._done_writing_flag = True
        native = self._native
        if native is None or self._replay is not None:
            return  # the replay ends with it
        await self._finish_request(native)

    async def _finish_request(self, native: Any) -> None:
        try:
            await native.done_writing()
        except asyncio.CancelledError:
            if self._is_cancelled_here(native):
                raise
        except InternalError:
            await native.code()  # the attempt has failed, which grpc.aio says after this
            if self._native is native:  # else another attempt takes its place, and its replay ends with this
                raise
        else:
            if self._native is native:
                self._completed = native
                if self._method.times_attempts:
                    self._limit_attempt()

    # -- a further attempt -------------------------------------------------------------------------------------

    def _remember(self, message: Any) -> None:
        log = self._log
        if log is None:
            return
        taken = log and self._connected is not None and self._connected is self._native
        if self._committed or (taken and not self._remembers):
            # A connection has what came before: what is not idempotent will not be sent again. (A message that remains
            # the only one is kept: gRPC may take one for a connection that does not come about.)
            self._log = None
            return
        if self._remembers is None:
            # A native call that an attempt interceptor holds takes messages that it has not sent.
            self._remembers = self._method.idempotent or self._method.channel.intercepts_attempts
        size = self._size_of(message) if self._remembers else 0
        if log and self._log_size + size > _REPLAY_LIMIT:
            self._log = None  # what is still being replayed goes on from its own reference
            return
        self._log_size += size
        log.append(message)

    def _size_of(self, message: Any) -> int:
        try:
            if (byte_size := getattr(message, "ByteSize", None)) is not None:
                return int(byte_size())
            serializer = self._method.request_serializer
            return len(message if serializer is None else serializer(message))
        except Exception:
            return _REPLAY_LIMIT + 1  # it cannot be sent; grpc will say why

    def _begun(self) -> None:
        self._delivered = 0
        self._replay = None
        log = self._log
        if log or self._done_writing_flag:
            self._replay = self._here.loop.create_task(self._replay_to(self._native, log or []))
        super()._begun()

    async def _replay_to(self, native: Any, log: list[Any]) -> None:
        try:
            index = 0
            while index < len(log):
                if self._connected is native:
                    await native.write(log[index])
                else:
                    await self._write_first(native, log[index], None)
                index += 1
                if self._native is not native:
                    return
                self._delivered = index
            if self._done_writing_flag:
                await self._finish_request(native)
        except (*_OVER, asyncio.CancelledError):
            pass  # this attempt has ended too, and its done-callback has decided what follows
        finally:
            if self._replay is asyncio.current_task():
                self._replay = None

    # -- an iterator of the user's -----------------------------------------------------------------------------

    async def _consume(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        try:
            if isinstance(requests, AsyncIterable):
                async for request in requests:
                    try:
                        await (self._send(request) if self._last is None else self._last.write(request))
                    except _OVER as error:
                        self._left_over(error)
                        return
            else:
                for request in requests:
                    try:
                        await (self._send(request) if self._last is None else self._last.write(request))
                    except _OVER as error:
                        self._left_over(error)
                        return
            if self._last is None:
                await self._half_close()
            elif not self._done:
                self._done_writing_flag = True
                await self._finish_request(self._last)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # What an iterator of the user's raises ends the RPC, as in grpc.aio; nobody awaits this task.
            logger.debug("%s: the iterator of requests raised", self._method.path, exc_info=True)
            self.cancel()

    def _left_over(self, error: Exception) -> None:
        logger.debug("%s: the RPC ended before its requests did: %s", self._method.path, error)

    def cancel(self) -> bool:
        """Cancel the RPC; False if it has ended."""
        cancelled = super().cancel()
        if cancelled and self._consumer is not None:
            self._consumer.cancel()
        return cancelled
