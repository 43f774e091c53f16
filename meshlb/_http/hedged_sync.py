"""Hedged requests of blocking clients: each attempt on a thread of its own, the first answer wins."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import socket
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from meshlb._http.workers import workers

if TYPE_CHECKING:
    from meshlb._http.hedged_exchange import HedgedExchange
    from meshlb.hedging import HedgedCall
    from meshlb.node import Lease


class Flight:
    """One attempt: what it sends and, in the end, the response or the error."""

    __slots__ = ("error", "exchange", "response", "transport")

    def __init__(self, exchange: HedgedExchange, transport: Any) -> None:
        self.exchange = exchange
        self.transport = transport
        self.response: Any = None
        self.error: BaseException | None = None

    def fly(self) -> None:
        """Send the request and wait for the response's headers."""
        trace = self.exchange.trace
        try:
            with contextlib.nullcontext() if trace is None else trace.active():
                self.response = self.transport.handle_request(self.exchange.attempt)
        except BaseException as error:  # handed to the caller's thread
            self.error = error

    def discard(self) -> None:
        """Nobody wants its response."""
        if self.response is not None:
            with contextlib.suppress(Exception):
                self.response.close()


class HedgedRequest:
    """The attempts of one request. Run by the caller's thread, who alone makes decisions."""

    def __init__(self, exchange: HedgedExchange, call: HedgedCall) -> None:
        self._first: HedgedExchange | None = exchange
        self._exchange = exchange
        self._call = call
        self._landed: SimpleQueue[Flight] = SimpleQueue()
        self._lock = threading.Lock()
        self._over = False
        self._flying: set[Flight] = set()

    def send(self, lease: Lease, stream_class: Any) -> Any:
        """The response of whichever attempt is first. Raises the last error if all fail."""
        last: Flight | None = None
        winner: Flight | None = None
        try:
            self._launch(lease)
            while True:
                flight = self._wait()
                if flight is None:
                    further = self._call.next()
                    if further is not None:
                        if last is not None:
                            last.discard()  # its connection may be the one that is wanted now
                        self._launch(further)
                    elif self._call.is_over and last is not None:
                        break
                    continue
                self._flying.discard(flight)
                if last is not None:
                    last.discard()
                last = flight
                if flight.error is not None:
                    if flight.exchange.hedge_failed(flight.error):
                        break
                elif flight.exchange.hedge_answered(flight.response):
                    winner = flight
                    break
            self._end(winner)
        except BaseException:
            self._end(None)
            if last is not None:
                last.discard()
            raise
        if last.error is not None:
            try:
                raise last.error
            finally:
                last.error = None  # or it would hold this frame, which holds it
        return last.exchange.accept(last.response, stream_class, judged=True)

    def _wait(self) -> Flight | None:
        """The next attempt that has ended; None when it is time for another one."""
        try:
            return self._landed.get(timeout=self._call.due())
        except Empty:
            return None

    def _launch(self, lease: Lease) -> None:
        exchange = self._first or self._exchange.sibling()
        self._first = None
        inner = exchange.prepare(lease)
        flight = Flight(exchange, inner.transport)
        self._call.begun(lease)
        self._flying.add(flight)
        workers.run(functools.partial(contextvars.copy_context().run, self._run, flight))

    def _run(self, flight: Flight) -> None:
        flight.fly()
        with self._lock:
            wanted = not self._over
            if wanted:
                self._landed.put(flight)
        if not wanted:
            flight.discard()

    def _end(self, winner: Flight | None) -> None:
        self._call.won(None if winner is None else winner.exchange.lease)
        with self._lock:
            self._over = True
        for flight in self._flying:
            flight.exchange.lost(to_another=winner is not None)
            interrupt(flight.transport, flight.exchange.attempt)
        while not self._landed.empty():
            self._landed.get().discard()


def interrupt(transport: Any, attempt: Any) -> None:
    """End the waiting of a thread that is in ``transport.handle_request(attempt)``.

    A blocking transport offers no way. Left alone, the attempt would end with its own timeouts, and without any it
    would hold its thread for ever; so its socket is looked for where httpcore keeps it and shut down, if it is there
    and serves this request alone (HTTP/1). If these parts have moved, the timeouts are what is left.
    """
    with contextlib.suppress(Exception):
        for waiting in tuple(transport._pool._requests):
            if waiting.request.extensions is attempt.extensions:
                connection = waiting.connection._connection
                if hasattr(connection, "_h11_state"):
                    used = connection._network_stream.get_extra_info("socket")
                    socket.socket.shutdown(used, socket.SHUT_RDWR)  # not ssl's, which would change what is being read
                return
