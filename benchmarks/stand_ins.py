"""Other sides that answer at once, in the process: with them a loop measures what is done around a call alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, ClassVar, Self

import grpc
import grpc.aio
import httpx

_MESSAGES = 1
"""Responses of a stream."""


class _Answered(grpc.RpcError, grpc.Call, grpc.Future):
    """A call of gRPC's that goes well: without messages it has ended by the time that it is asked, and a stream tells
    of its end when that is read."""

    def __init__(self, messages: int = 0) -> None:
        self._left = messages
        self._callbacks: list[Callable[[], None]] = []
        self._is_over = not messages

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if not self._left:
            self._is_over = True
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()
            raise StopIteration
        self._left -= 1
        return b""

    def result(self, timeout: float | None = None) -> Any:
        return b""

    def exception(self, timeout: float | None = None) -> None:
        return None

    def traceback(self, timeout: float | None = None) -> None:
        return None

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self._is_over:
            self._callbacks.append(callback)
        return not self._is_over

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        if not self.add_callback(lambda: fn(self)):
            fn(self)

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    def details(self) -> str:
        return ""

    def initial_metadata(self) -> Any:
        return ()

    def trailing_metadata(self) -> Any:
        return ()

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def running(self) -> bool:
        return not self._is_over

    def done(self) -> bool:
        return self._is_over

    def is_active(self) -> bool:
        return not self._is_over

    def time_remaining(self) -> None:
        return None


class _Factories:
    """What a stub asks of a channel."""

    multi_callable: ClassVar[Any]

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self.multi_callable("unary_unary", request_serializer)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self.multi_callable("unary_stream", request_serializer)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self.multi_callable("stream_unary", request_serializer)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> Any:
        return self.multi_callable("stream_stream", request_serializer)


class _MultiCallable:
    def __init__(self, kind: str, serializer: Callable[[Any], bytes] | None) -> None:
        self._takes_stream = kind.startswith("stream")
        self._gives_stream = kind.endswith("stream")
        self._serialize = serializer or bytes

    def _read(self, request: Any) -> None:
        if self._takes_stream:
            for message in request:
                self._serialize(message)
        else:
            self._serialize(request)

    def __call__(self, request: Any, *options: Any) -> Any:
        self._read(request)
        return _Answered(_MESSAGES) if self._gives_stream else b""

    def future(self, request: Any, *options: Any) -> Any:
        self._read(request)
        return _Answered()


class Channel(_Factories):
    """Stands in for gRPC's own; what a stub and meshlb ask of it, and no more."""

    multi_callable = _MultiCallable

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        pass

    def unsubscribe(self, callback: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Answering(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """An inner transport whose responses are there at once."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=_Body())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=_Body())


class _Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"ok"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"ok"


class _AioAnswered:
    """A call of grpc.aio's that is answered as soon as all of its request is there.

    ``requests``: an iterator of messages, as the caller gave it. ``written``: they come by ``write``.
    """

    def __init__(
        self,
        messages: int = 0,
        requests: Any = None,
        serialize: Callable[[Any], bytes] = bytes,
        *,
        written: bool = False,
    ) -> None:
        self._left = messages
        self._requests = requests
        self._serialize = serialize
        self._asked = None if not written else asyncio.get_running_loop().create_future()
        self._is_over = not messages and requests is None and not written
        self._callbacks: list[Callable[[Any], None]] = []

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._all_asked().__await__()
        self._end()
        return b""

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def _all_asked(self) -> None:
        if self._asked is not None:
            await self._asked
        elif self._requests is not None:
            async for message in self._requests:
                self._serialize(message)
            self._requests = None

    async def read(self) -> Any:
        await self._all_asked()
        if self._left:
            self._left -= 1
            return b""
        self._end()
        return grpc.aio.EOF

    def _end(self) -> None:
        self._is_over = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    async def write(self, message: Any) -> None:
        self._serialize(message)

    async def done_writing(self) -> None:
        if self._asked is not None:
            self._asked.set_result(None)

    async def wait_for_connection(self) -> None:
        pass

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._is_over:
            callback(self)
        else:
            self._callbacks.append(callback)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    async def details(self) -> str:
        return ""

    async def initial_metadata(self) -> Any:
        return ()

    async def trailing_metadata(self) -> Any:
        return ()

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def done(self) -> bool:
        return self._is_over

    def time_remaining(self) -> None:
        return None


class _AioMultiCallable:
    def __init__(self, kind: str, serializer: Callable[[Any], bytes] | None) -> None:
        self._takes_stream = kind.startswith("stream")
        self._gives_stream = kind.endswith("stream")
        self._serialize = serializer or bytes

    def __call__(self, request: Any = None, **options: Any) -> _AioAnswered:
        messages = _MESSAGES if self._gives_stream else 0
        if not self._takes_stream:
            self._serialize(request)
            return _AioAnswered(messages)
        return _AioAnswered(messages, request, self._serialize, written=request is None)


class AioChannel(_Factories):
    """Stands in for grpc.aio's own."""

    multi_callable = _AioMultiCallable

    async def close(self, grace: float | None = None) -> None:
        pass
