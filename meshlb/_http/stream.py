"""Response bodies that hold the attempt's lease until they are closed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Final

import anyio

if TYPE_CHECKING:
    from meshlb._http.exchange import Exchange


_GRACE: Final = 0.02
"""Seconds by which a silent stream is given up later than the client library would: its own error comes first."""


class LeaseStream:
    """The body of a response, in the place of the inner transport's own.

    Closing it ends the attempt, however much was read: the endpoint has answered. An error while reading ends it as a
    failure, and goes on to the caller as it is. A stream that is dropped unclosed is noticed when it is collected.
    """

    def __init__(self, stream: Any, exchange: Exchange) -> None:
        self._stream = stream
        self._exchange = exchange
        self._closed = False

    def _broken(self, error: BaseException) -> None:
        if not isinstance(error, GeneratorExit):  # no error: the reader has stopped, and will close
            self._exchange.broken(error)


class SyncLeaseStream(LeaseStream):
    """See LeaseStream. To be combined with the package's SyncByteStream."""

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self._exchange.deadline is None:
                yield from self._stream
            else:
                for chunk in self._stream:
                    yield chunk
                    if self._exchange.remaining() <= 0:
                        raise self._exchange.deadline_error()
        except BaseException as error:
            self._broken(error)
            raise

    def close(self) -> None:
        self._closed = True
        try:
            self._stream.close()
        except BaseException as error:
            self._broken(error)
            raise
        finally:
            self._exchange.finished()

    def __del__(self) -> None:
        if not self._closed:
            self._exchange.abandoned(self._stream.close)


class AsyncLeaseStream(LeaseStream):
    """See LeaseStream. To be combined with the package's AsyncByteStream."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            if self._exchange.deadline is None and self._exchange.idle_limit is None:
                async for chunk in self._stream:
                    yield chunk
            else:
                async for chunk in self._in_time():
                    yield chunk
        except BaseException as error:
            self._broken(error)
            raise

    async def _in_time(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        idle = self._exchange.idle_limit
        while True:
            remaining = self._exchange.remaining()
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
                raise self._exchange.deadline_error() if limit == remaining else self._exchange.idle_error()
            yield chunk

    async def aclose(self) -> None:
        self._closed = True
        try:
            await self._stream.aclose()
        except BaseException as error:
            self._broken(error)
            raise
        finally:
            self._exchange.finished()

    def __del__(self) -> None:
        if not self._closed:
            self._exchange.abandoned(None)  # its connection can only be closed on its own loop, which may be gone
