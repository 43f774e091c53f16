"""Hedged requests of async clients: each attempt in a task of its own, the first answer wins."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from meshlb._http.hedged_exchange import HedgedExchange
    from meshlb._http.pools import Inner
    from meshlb.hedging import HedgedCall
    from meshlb.node import Lease

Send = Callable[["HedgedExchange", "Inner"], Awaitable[Any]]


class Flight:
    """One attempt: what it sends and, in the end, the response or the error."""

    __slots__ = ("error", "exchange", "inner", "response")

    def __init__(self, exchange: HedgedExchange, inner: Inner) -> None:
        self.exchange = exchange
        self.inner = inner
        self.response: Any = None
        self.error: Exception | None = None

    async def discard(self) -> None:
        """Nobody wants its response."""
        response, self.response = self.response, None
        if response is not None:
            with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
                await response.aclose()


class HedgedRequest:
    """The attempts of one request. Decisions are made in the caller's task."""

    def __init__(self, exchange: HedgedExchange, call: HedgedCall, send: Send) -> None:
        self._first: HedgedExchange | None = exchange
        self._exchange = exchange
        self._call = call
        self._send = send
        self._landed: deque[Flight] = deque()
        self._changed = anyio.Event()
        self._flying: set[Flight] = set()
        self._last: Flight | None = None

    async def send(self, lease: Lease, stream_class: Any) -> Any:
        """The response of whichever attempt is first. Raises the last error if all fail."""
        returned = False
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as attempts:
                try:
                    self._end(await self._race(attempts, lease))
                except Exception as error:  # a task group would wrap it
                    failure = error
                finally:
                    attempts.cancel_scope.cancel()
            if failure is not None:
                raise failure
            last = self._last
            assert last is not None
            if last.error is not None:
                try:
                    raise last.error
                finally:
                    last.error = None  # or it would hold this frame, which holds it
            response = last.exchange.accept(last.response, stream_class, judged=True)
            returned = True
            return response
        finally:
            failure = None  # as above
            self._end(None)
            for flight in self._landed:
                await flight.discard()
            if not returned and self._last is not None:
                await self._last.discard()

    async def _race(self, attempts: TaskGroup, lease: Lease) -> Flight | None:
        """The attempt that was answered; None if the last one's failure is the end."""
        self._launch(attempts, lease)
        while True:
            flight = await self._wait()
            last = self._last
            if flight is None:
                further = self._call.next()
                if further is not None:
                    if last is not None:
                        await last.discard()
                    self._launch(attempts, further)
                elif self._call.is_over and last is not None:
                    return None
                continue
            self._flying.discard(flight)
            self._last = flight
            if last is not None:
                await last.discard()
            if flight.error is not None:
                if flight.exchange.hedge_failed(flight.error):
                    return None
            elif flight.exchange.hedge_answered(flight.response):
                return flight

    async def _wait(self) -> Flight | None:
        """The next attempt that has ended; None when it is time for another one."""
        with anyio.move_on_after(self._call.due()):
            while not self._landed:
                self._changed = anyio.Event()
                await self._changed.wait()
        return self._landed.popleft() if self._landed else None

    def _launch(self, attempts: TaskGroup, lease: Lease) -> None:
        exchange = self._first or self._exchange.sibling()
        self._first = None
        flight = Flight(exchange, exchange.prepare(lease))
        self._call.begun(lease)
        self._flying.add(flight)
        attempts.start_soon(self._run, flight)

    async def _run(self, flight: Flight) -> None:
        trace = flight.exchange.trace
        try:
            with contextlib.nullcontext() if trace is None else trace.active():
                flight.response = await self._send(flight.exchange, flight.inner)
        except Exception as error:  # handed to the caller's task
            flight.error = error
        self._landed.append(flight)
        self._changed.set()

    def _end(self, winner: Flight | None) -> None:
        """Close the leases of all other attempts. Idempotent."""
        self._call.won(None if winner is None else winner.exchange.lease)
        for flight in self._flying:
            flight.exchange.lost(to_another=winner is not None)
        self._flying.clear()
