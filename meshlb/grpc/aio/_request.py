"""The request side of a call that sends a stream: from an iterator, or message by message.

Native calls are always written to, so that one can be followed by another: the messages that the current attempt has
been given are remembered, within limits, and given to the next attempt first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.call import Safety
from meshlb.grpc.aio._native import ALREADY_FINISHED, API_STYLE, HALF_CLOSED, AioRpcError, InternalError, UsageError
from meshlb.grpc.aio._timed import TimedAttempt

if TYPE_CHECKING:
    from meshlb.grpc.aio._multicallable import MultiCallable

logger = logging.getLogger("meshlb.grpc.aio")

_REPLAY_LIMIT: Final = 256 * 1024
"""Bytes of messages remembered per call; beyond, the call is committed to its endpoint. The default of gRPC's own
retries (gRFC A6, ``grpc.per_rpc_retry_buffer_size``)."""

_OVER = (AioRpcError, asyncio.InvalidStateError)
"""What writing to a native call raises when the call has ended."""


class StreamRequest(TimedAttempt):
    """A call that takes an iterator of requests, or ``write()`` and ``done_writing()``."""

    _log: list[Any] | None
    """The messages so far; None if they cannot be sent again."""
    _log_size = 0
    _remembers: bool
    """Keep messages that a connection has taken."""
    _accepted = 0
    """How many messages the user has handed over."""
    _delivered = 0
    """How many of them the current attempt has been given."""
    _done_writing_flag = False  # the name is grpc's: its intercepted calls look at it
    _replay: asyncio.Task[None] | None = None
    """Gives a further attempt what its predecessors were given; nobody else writes meanwhile."""
    _connected: Any = None
    """The native call that is known to have a connection."""
    _consumer: asyncio.Task[None] | None = None

    def __init__(self, *arguments: Any) -> None:
        self._log = []
        method: MultiCallable = arguments[0]
        # A native call that an attempt interceptor holds takes messages that it has not sent.
        self._remembers = method.idempotent or method.channel.intercepts_attempts
        super().__init__(*arguments)
        if self._request is not None and not self._done:
            self._consumer = self._here.loop.create_task(self._consume(self._request))

    def _open(self, multicallable: Any, timeout: float | None, metadata: Any) -> Any:
        self._complete = False
        return multicallable(
            None,
            timeout=timeout,
            metadata=metadata,
            credentials=self._credentials,
            wait_for_ready=False,
            compression=self._compression,
        )

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
        if self._request is not None:
            raise UsageError(API_STYLE)

    async def _send(self, message: Any) -> None:
        self._accepted += 1
        number = self._accepted
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
                await self._write_to(native, message)
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

    async def _write_to(self, native: Any, message: Any) -> None:
        """Write to an attempt. Returns, too, when another attempt has taken its place."""
        if self._connected is native:
            await native.write(message)
            return
        try:
            await self._unless_over(native, native.write(message))
        except asyncio.InvalidStateError:
            if self._native is native:
                await self._raise_status(native)  # it failed just before; the writer would have waited for just that
            raise
        if self._native is native:
            self._connected = native
            if not self._remembers:
                self._log = None  # a connection has the message: what is not idempotent will not be sent again

    async def _unless_over(self, native: Any, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait for an attempt's connection, but not longer than for its end: a native call that is cancelled before it
        has a connection never tells those who wait for that.

        Raises what grpc raises if the attempt was the last one.
        """
        turn = self._turn()
        task = self._here.loop.create_task(waiting)
        task.add_done_callback(partial(_resolve, turn))
        try:
            await turn
        finally:
            if not task.done():
                task.cancel()
        if self._native is native:
            if task.done():
                task.result()
            else:
                await self._raise_status(native)

    async def _raise_status(self, native: Any) -> None:
        code = await native.code()
        if code is grpc.StatusCode.OK:
            raise asyncio.InvalidStateError(ALREADY_FINISHED)
        if self._cancel_asked:
            raise asyncio.CancelledError
        initial, trailing = await native.initial_metadata(), await native.trailing_metadata()
        raise AioRpcError(code, initial, trailing, await native.details(), await native.debug_error_string())

    async def wait_for_connection(self) -> None:
        """Wait until the RPC is on a connection. Raises AioRpcError if it failed instead."""
        while True:
            native = self._native
            if native is None:
                if self._ended is not None:
                    raise self._ended.error()
                await self._turn_or_cancel()
                continue
            try:
                await self._unless_over(native, native.wait_for_connection())
            except asyncio.CancelledError:
                if self._is_cancelled_here(native):
                    raise
            except AioRpcError:
                if self._native is native:
                    raise
            if self._native is native:
                return

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
                self._complete = True
                self._limit_attempt()

    # -- a further attempt -------------------------------------------------------------------------------------

    def _remember(self, message: Any) -> None:
        log = self._log
        if log is None:
            return
        if self._committed:
            self._log = None
            return
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
                await self._write_to(native, log[index])
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
                    if not await self._pass_on(request):
                        return
            else:
                for request in requests:
                    if not await self._pass_on(request):
                        return
            await self._half_close()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # What an iterator of the user's raises ends the RPC, as in grpc.aio; nobody awaits this task.
            logger.debug("%s: the iterator of requests raised", self._method.path, exc_info=True)
            self.cancel()

    async def _pass_on(self, request: Any) -> bool:
        try:
            await self._send(request)
        except _OVER as error:
            logger.debug("%s: the RPC ended before its requests did: %s", self._method.path, error)
            return False
        return True

    def cancel(self) -> bool:
        """Cancel the RPC; False if it has ended."""
        cancelled = super().cancel()
        if cancelled and self._consumer is not None:
            self._consumer.cancel()
        return cancelled


def _resolve(turn: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # or asyncio would report that nobody looked at it
    if not turn.done():
        turn.set_result(None)
