"""Multi-callables with a stream of responses, and the stream that the caller reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from meshlb.grpc._driver import Driver
from meshlb.grpc._errors import DeadlineExceeded, LocalRpcError
from meshlb.grpc._future import MeshCall
from meshlb.grpc._idle import Silence
from meshlb.grpc._method import Method
from meshlb.grpc._requests import Payload, RequestSource
from meshlb.grpc._types import StreamStreamMultiCallable, UnaryStreamMultiCallable


class StreamCall(MeshCall):
    """The responses of one call, as an iterator that is Call and Future too.

    Until the first response has been read, a failed attempt can be followed by another one behind the caller's back.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._reader: Any = None
        self._silence: Silence | None = None

    def __iter__(self) -> StreamCall:
        return self

    def __next__(self) -> Any:
        reader = self._reader
        if reader is None:
            return self._first()
        silence = self._silence
        if silence is not None:
            silence.begin()
        try:
            response = next(reader)
        except (StopIteration, grpc.RpcError):
            self._driver.settle(reader)
            if silence is not None:
                silence.over()
                if isinstance(self._driver.final, DeadlineExceeded):
                    raise self._driver.final from None
            raise
        if silence is not None:
            silence.end()
        return response

    next = __next__

    def _first(self) -> Any:
        driver = self._driver
        while True:
            inner = driver.current()
            if isinstance(inner, LocalRpcError):
                raise inner
            try:
                response = next(inner)
            except (StopIteration, grpc.RpcError) as error:
                if driver.settle(inner):
                    raise
                # Another attempt is on its way. The traceback would keep this object alive by way of this frame, and
                # so keep the call from being cancelled when the caller drops it.
                error.__traceback__ = None
                continue
            if driver.answered(inner):
                self._reader = inner
                idle = driver.channel.cluster.config.stream_idle_timeout
                if idle is not None:
                    self._silence = Silence(driver, inner, idle)
                return response


class UnaryStream(Method, UnaryStreamMultiCallable):
    """One request, a stream of responses."""

    kind = "unary_stream"
    streams = True

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        invocation = self.invocation(
            Payload(request), None, timeout, metadata, credentials, wait_for_ready, compression
        )
        return StreamCall(Driver(self, invocation, verb="__call__"))


class StreamStream(Method, StreamStreamMultiCallable):
    """A stream of requests, a stream of responses."""

    kind = "stream_stream"
    streams = True

    def __call__(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        source = RequestSource(request_iterator)
        invocation = self.invocation(None, source, timeout, metadata, credentials, wait_for_ready, compression)
        return StreamCall(Driver(self, invocation, verb="__call__"))
