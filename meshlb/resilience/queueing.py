"""A call's wait for a place among those that its service's limits allow: on a thread, or on an event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from meshlb.resilience.limits import ConcurrencyLimiter, Ticket

T = TypeVar("T")


class Queueing(Generic[T]):
    """What both kinds of waiting share.

    ``attempt()``: tries to begin an attempt, at this call's turn. ``remaining()``: seconds that the call may go on
    waiting, 0 or less when it may not. ``error(why)``: what is raised then, and if the queue is full.
    """

    __slots__ = ("_attempt", "_error", "_limiter", "_remaining")

    def __init__(
        self,
        limiter: ConcurrencyLimiter,
        attempt: Callable[[], T | None],
        remaining: Callable[[], float],
        error: Callable[[str], Exception],
    ) -> None:
        self._limiter = limiter
        self._attempt = attempt
        self._remaining = remaining
        self._error = error

    def run(self) -> T | None:
        """Block this thread until the attempt has begun; None if it is not the limits that prevent it."""
        ticket = self._enter()
        try:
            while True:
                while not ticket.granted:
                    ticket.signal.wait(self._patience())
                begun, over = self._try(ticket)
                if over:
                    return begun
        finally:
            self._limiter.leave(ticket)

    async def run_async(self) -> T | None:
        """``run`` for a task of an asyncio or trio loop."""
        ticket = self._enter()
        try:
            while True:
                while not ticket.granted:
                    await ticket.signal.wait_async(self._patience())
                begun, over = self._try(ticket)
                if over:
                    return begun
        finally:
            self._limiter.leave(ticket)

    def _enter(self) -> Ticket:
        ticket = self._limiter.enter()
        if ticket is None:
            raise self._error(f"{self._limiter.options.max_queue} calls are waiting already (Limits.max_queue)")
        return ticket

    def _patience(self) -> float:
        seconds = self._remaining()
        if seconds <= 0:
            self._limiter.reject()
            raise self._error("the call has waited for as long as it may (Limits.queue_timeout, or its own deadline)")
        return seconds

    def _try(self, ticket: Ticket) -> tuple[T | None, bool]:
        refusals = self._limiter.refusals
        begun = self._attempt()
        if begun is not None or self._limiter.refusals == refusals:
            return begun, True
        self._limiter.put_back(ticket)
        return None, False
