"""One RPC of a mesh channel, as grpc.aio's users know it: status, metadata, cancellation, callbacks."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from meshlb.grpc._sessions import set_cookie
from meshlb.grpc.aio._attempts import Attempts
from meshlb.grpc.aio._ended import CANCELLED
from meshlb.grpc.aio._native import AioRpcError, is_immediate


class MeshCall(Attempts):
    """What the four kinds of call have in common (``grpc.aio.Call``)."""

    def cancel(self) -> bool:
        """Cancel the RPC; False if it has ended."""
        if self._done:
            return False
        self._cancel_asked = True
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()
        if self._retry is not None:
            self._retry.give_up()
        native = self._native
        if native is None:
            self._end(CANCELLED)
            return True
        return self._cancel_attempt(native)

    def cancelled(self) -> bool:
        """Whether the RPC ended with CANCELLED, here or at the server."""
        if not self._done:
            return False
        if self._ended is not None:
            return self._ended.code is grpc.StatusCode.CANCELLED
        return bool(self._native.cancelled())

    def time_remaining(self) -> float | None:
        """Seconds until the deadline of the whole call, not negative; None without one."""
        return self._remaining()

    async def initial_metadata(self) -> grpc.aio.Metadata:
        """The metadata at the head of the response. Once it was seen, no other endpoint can take over."""
        while True:
            native = self._native
            if native is None:
                if self._ended is not None:
                    return grpc.aio.Metadata()
                await self._turn()
                continue
            late = self._committed or is_immediate(native.initial_metadata())
            metadata: grpc.aio.Metadata = await native.initial_metadata()
            if native is self._native:
                if metadata and not self._committed:
                    self._answered(late=late)
                if self._context.session is not None:
                    return await self._with_cookie(native, metadata)
                return metadata

    async def _with_cookie(self, native: Any, metadata: grpc.aio.Metadata) -> grpc.aio.Metadata:
        """The metadata, with the session's cookie if the caller does not have it. As in ``Driver.set_cookie``."""
        if native.done() and not self._committed and await native.code() is not grpc.StatusCode.OK:
            return metadata
        channel = self._method.channel
        entry = set_cookie(channel.cluster, self._context, secure=channel.secure)
        return metadata if entry is None else grpc.aio.Metadata(*metadata, (entry.key, entry.value))

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        """The metadata at the end of the RPC."""
        await self.ended()
        if self._ended is not None:
            return grpc.aio.Metadata()
        trailing: grpc.aio.Metadata = await self._native.trailing_metadata()
        return trailing

    async def code(self) -> grpc.StatusCode:
        """The status of the RPC, once it has ended."""
        await self.ended()
        if self._ended is not None:
            return self._ended.code
        code: grpc.StatusCode = await self._native.code()
        return code

    async def details(self) -> str:
        """The details of the status."""
        await self.ended()
        if self._ended is not None:
            return self._ended.details
        details: str = await self._native.details()
        return details

    async def debug_error_string(self) -> str | None:
        """What gRPC's core says of the error, for people."""
        await self.ended()
        if self._ended is not None:
            return self._ended.details
        debug: str | None = await self._native.debug_error_string()
        return debug

    async def wait_for_connection(self) -> None:
        """Wait until the request is on a connection. Raises AioRpcError if the RPC failed instead."""
        while True:
            native = self._native
            if native is None:
                if self._ended is not None:
                    raise self._ended.error()
                await self._turn_or_cancel()
                continue
            try:
                await native.wait_for_connection()
            except BaseException as error:
                if self._is_for_caller(native, error):
                    raise
            if self._native is native:
                return

    def __repr__(self) -> str:
        if self._ended is not None:
            state = f"{self._ended.code}: {self._ended.details}"
        else:
            state = "waiting for an endpoint" if self._native is None else repr(self._native)
        return f"<{type(self).__name__} {self._method.path} {state}>"

    # -- for the subclasses -----------------------------------------------------------------------------------

    async def _turn_or_cancel(self) -> None:
        """``_turn`` for an operation whose cancellation cancels the RPC, as grpc.aio has it."""
        try:
            await self._turn()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _cancel_attempt(self, native: Any) -> bool:
        if native.cancel():
            return True
        self._attempt_done(native)  # it has just ended, and its done-callback is on its way
        return False

    def _is_for_caller(self, native: Any, error: BaseException) -> bool:
        """Whether what ``native`` has raised is what the caller sees; if not, another attempt takes over."""
        if isinstance(error, asyncio.CancelledError):
            return self._is_cancelled_here(native)
        if not isinstance(error, Exception):
            return True
        if self._native is not native:
            return False
        if not isinstance(error, AioRpcError):
            # No status came of it: metadata that gRPC refuses, or an attempt interceptor of the user's.
            self._cancel_attempt(native)
        return True

    def _is_cancelled_here(self, native: Any) -> bool:
        """After a CancelledError out of ``native``: whether it is for the caller. If not, only the attempt was
        cancelled, by us. Cancels the rest of the RPC if the caller's task is being cancelled."""
        task = asyncio.current_task()
        if self._native is not native and (task is None or not task.cancelling()):
            return False
        self.cancel()
        return True
