"""Writing to a native call that may have no connection yet, and never get one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.grpc.aio._native import ALREADY_FINISHED, AioRpcError
from meshlb.grpc.aio._timed import TimedAttempt

if TYPE_CHECKING:
    from meshlb.model import Outcome


class Connecting(TimedAttempt):
    """A call that gives messages to its attempts.

    grpc.aio lets a writer wait until there is a connection. A native call that is cancelled before that never tells
    him.
    """

    _log: list[Any] | None
    """The messages so far; None if they cannot be sent again."""
    _remembers: bool | None = None
    """Keep messages that a connection has taken. Found out for the first message."""
    _connected: Any = None
    """The native call that is known to have a connection."""
    _consumer: asyncio.Task[None] | None = None
    """Passes on what the user's iterator gives."""
    _connecting = False
    """The consumer has given a message to a native call that is not known to have a connection."""
    _interrupted = False
    """It has been told by a cancellation that this is in vain."""

    async def _write_first(self, native: Any, message: Any, consumer: asyncio.Task[None] | None) -> None:
        """Write to an attempt that may have no connection yet. Returns, too, when another one has taken its place.

        ``consumer``, if it is the task that writes, is told of the attempt's end by a cancellation: that spares it
        another task.
        """
        interrupted = False
        try:
            if consumer is None:
                await self._unless_over(native, native.write(message))
            else:
                self._connecting = True
                try:
                    await native.write(message)
                except asyncio.CancelledError:
                    if not self._interrupted or consumer.cancelling() > 1:
                        raise
                finally:
                    self._connecting = False
                    interrupted, self._interrupted = self._interrupted, False
                    if interrupted:
                        consumer.uncancel()
        except asyncio.InvalidStateError:
            if self._native is native:
                await self._raise_status(native)  # it failed just before; the writer would have waited for just that
            raise
        if self._native is native:
            if interrupted:
                await self._raise_status(native)
            self._connected = native

    def _go_on(self, outcome: Outcome, fallback: Any, code: grpc.StatusCode | None, error: BaseException) -> None:
        try:
            super()._go_on(outcome, fallback, code, error)
        finally:
            consumer = self._consumer
            # Where it is the consumer itself that has brought this about, it does not wait.
            waits = self._connecting and not self._interrupted and asyncio.current_task() is not consumer
            if waits and consumer is not None:
                self._interrupted = True
                consumer.cancel()

    async def _unless_over(self, native: Any, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait for an attempt's connection, but not longer than for its end.

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


def _resolve(turn: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # or asyncio would report that nobody looked at it
    if not turn.done():
        turn.set_result(None)
