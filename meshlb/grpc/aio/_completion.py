"""How an RPC ends, and how that is told to those who wait for it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshlb.grpc.aio._ended import Ended

if TYPE_CHECKING:
    from meshlb.grpc.aio._loops import LoopChannels


class Completion:
    """The end of an RPC, once for all its attempts.

    No ``__slots__``: grpc's abstract classes give each call a dict anyway, and class-level defaults spare the common
    call the attributes that only a failing one needs. Used by its own loop's thread alone.
    """

    _here: LoopChannels
    _ref: weakref.ref[Any]
    _native: Any = None
    """The current attempt; of a call that has ended, the one whose status it has. None between two attempts."""
    _ended: Ended | None = None
    """The end of a call that no attempt gave a status to."""
    _done = False
    _callbacks: list[Callable[[Any], None]] | None = None
    _waiters: list[asyncio.Future[None]] | None = None
    _timer: asyncio.TimerHandle | None = None
    """What will be done unless the call ends before."""

    def done(self) -> bool:
        """Whether the RPC has ended, with all its attempts."""
        return self._done

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call ``callback(self)`` when the RPC ends; at once if it has ended."""
        if self._done:
            callback(self)
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    async def ended(self) -> None:
        """Wait until the RPC has ended. Being cancelled meanwhile does not cancel it."""
        while not self._done:
            await self._turn()

    def _end(self, ended: Ended) -> None:
        """End without a status from an attempt."""
        if not self._done:
            self._native = None
            self._ended = ended
            self._finish()

    def _finish(self) -> None:
        # Every call comes here, and few have any of what is looked for.
        self._done = True
        self._here.active.pop(id(self), None)
        if self._timer is not None:
            self._stop_timer()
        if self._waiters is not None:
            self._wake()
        if self._callbacks is not None:
            self._call_back()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _call_back(self) -> None:
        self._here.kept.discard(self)
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            try:
                callback(self)
            except Exception as error:
                # It would end the native call's task with the user's mistake instead of the response.
                self._here.loop.call_exception_handler(
                    {"message": "a done-callback of an RPC failed", "exception": error, "callback": callback}
                )

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def _turn(self) -> asyncio.Future[None]:
        """A future that is resolved when an attempt begins or the call ends."""
        waiter = self._here.loop.create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        return waiter
