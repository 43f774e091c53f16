"""Response bodies that hold the attempt's lease until they are closed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import anyio

from meshlb.model import ABANDONED, Outcome, OutcomeKind, Sent

if TYPE_CHECKING:
    from meshlb._http.exchange import Exchange

logger = logging.getLogger("meshlb.http")

_GRACE: Final = 0.02
"""Seconds by which a silent stream is given up later than the client library would: its own error comes first."""


class LeaseStream:
    """The body of a response, in the place of the inner transport's own.

    Closing it ends the attempt, however much was read: the endpoint has answered. An error while reading ends it as a
    failure, and goes on to the caller as it is. A stream that is dropped unclosed is noticed when it is collected.

    Made by ``Exchange.accept`` alone, which fills it in by hand: every response has one.
    """

    inner: Any
    exchange: Exchange
    closed = True  # until it has been filled in; __del__ asks

    def _broken(self, error: BaseException) -> None:
        """Reading or closing raised."""
        if isinstance(error, GeneratorExit):
            return  # no error: the reader has stopped, and will close
        binding = self.exchange.binding
        if isinstance(error, binding.deadline_exceeded):
            outcome = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, reason=type(error).__name__, timed_out=True)
        else:
            outcome = binding.errors.outcome(error)
        self.exchange.finish(outcome)

    def _deadline_error(self) -> Exception:
        """What the caller gets when the time for the whole call is up before he has read the response."""
        exchange = self.exchange
        error: Exception = exchange.binding.deadline_exceeded(
            f"{exchange.request.method} {exchange.request.url}: the response was not complete within "
            f"{exchange.timeout:g} s (ServiceConfig.timeout, or the request's own)",
            request=exchange.request,
        )
        return error

    def _abandoned(self, close: Callable[[], object] | None) -> None:
        """The response was collected without having been closed. Called from ``__del__``: the collector may run
        within any lock, so the work (``close`` gives the connection back) is left to the control loop."""
        self.exchange.route.call_soon(_close_abandoned, self.exchange, close)


class SyncLeaseStream(LeaseStream):
    """See LeaseStream. To be combined with the package's SyncByteStream."""

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self.exchange.deadline is None:
                yield from self.inner
            else:
                for chunk in self.inner:
                    yield chunk
                    if self.exchange.remaining() <= 0:
                        raise self._deadline_error()
        except BaseException as error:
            self._broken(error)
            raise

    def close(self) -> None:
        self.closed = True
        try:
            self.inner.close()
        except BaseException as error:
            self._broken(error)
            raise
        finally:
            self.exchange.finish()

    def __del__(self) -> None:
        if not self.closed:
            self._abandoned(self.inner.close)


class AsyncLeaseStream(LeaseStream):
    """See LeaseStream. To be combined with the package's AsyncByteStream."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        exchange = self.exchange
        if exchange.deadline is None and exchange.route.idle_limit is None:
            return _Chunks(aiter(self.inner), self._broken)
        return _Chunks(self._in_time(), self._broken)

    async def _in_time(self) -> AsyncIterator[bytes]:
        chunks = aiter(self.inner)
        exchange = self.exchange
        idle = exchange.route.idle_limit
        while True:
            remaining = exchange.remaining()
            # The client library's own timeout sees a silent connection; this sees a silent stream of a connection that
            # others share (HTTP/2).
            limit = remaining if idle is None else min(remaining, idle + _GRACE)
            # Cancelled from within, the inner streams end properly; left suspended, they would be for the collector.
            with anyio.move_on_after(limit) as scope:
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
            if scope.cancelled_caught:
                raise self._deadline_error() if limit == remaining else self._idle_error()
            yield chunk

    def _idle_error(self) -> Exception:
        """What the caller gets when the response has been silent for too long."""
        exchange = self.exchange
        error: Exception = exchange.binding.read_timeout(
            f"{exchange.request.method} {exchange.request.url}: the response was silent for "
            f"{exchange.route.idle_limit:g} s (ServiceConfig.stream_idle_timeout)",
            request=exchange.request,
        )
        return error

    async def aclose(self) -> None:
        self.closed = True
        try:
            await self.inner.aclose()
        except BaseException as error:
            self._broken(error)
            raise
        finally:
            self.exchange.finish()

    def __del__(self) -> None:
        if not self.closed:
            self._abandoned(None)  # its connection can only be closed on its own loop, which may be gone


class _Chunks:
    """Passes chunks on, and errors to whom they concern, too. Not a generator: an event loop keeps a list of all of
    those that run, which costs as much as everything else that is done here for a body."""

    __slots__ = ("_broken", "_chunks")

    def __init__(self, chunks: AsyncIterator[bytes], broken: Callable[[BaseException], None]) -> None:
        self._chunks = chunks
        self._broken = broken

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            raise
        except BaseException as error:
            self._broken(error)
            raise


def _close_abandoned(exchange: Exchange, close: Callable[[], object] | None) -> None:
    exchange.finish(ABANDONED)
    if close is not None:
        try:
            close()
        except Exception:
            logger.debug("closing a response that nobody closed failed", exc_info=True)
