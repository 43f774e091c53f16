"""Multi-callables with a stream of responses, and the stream that the caller reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import grpc

from meshlb.grpc._beginning import Beginning
from meshlb.grpc._errors import DeadlineExceeded, LocalRpcError
from meshlb.grpc._future import MeshCall
from meshlb.grpc._idle import Silence
from meshlb.grpc._types import StreamStreamMultiCallable, UnaryStreamMultiCallable


class StreamCall(MeshCall):
    """The responses of one call, as an iterator that is Call and Future too.

    Until the first response has been read, a failed attempt can be followed by another one behind the caller's back.
    """

    __slots__ = ()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        reader = self._reader
        if reader is None:
            return self._first()
        self._awaited = True
        try:
            return next(reader)
        except (StopIteration, grpc.RpcError) as error:
            if self._driver is not None or not self._lease.closed:  # else it is known
                self._is_over(reader, error)
            raise
        finally:
            self._awaited = False
            if self._over and not self._lease.closed:
                self._settled()

    def next(self) -> Any:
        return self.__next__()

    def _first(self) -> Any:
        while True:
            driver = self._driver
            if driver is None:
                inner = self._inner
            else:
                inner = driver.current()
                if isinstance(inner, LocalRpcError):
                    raise inner
            self._awaited = True
            try:
                response = next(inner)
                if driver is None:
                    lease = self._lease
                    lease.node.answered(lease, healthy=True)
                    # Asked after that: who takes the call over from now on sees by the lease that there was an answer.
                    driver = self._driver
                    if driver is None and self._source is not None:
                        self._source.commit()
                if driver is None or driver.answered(inner):
                    self._reader = inner
                    return response
            except (StopIteration, grpc.RpcError) as error:
                if self._is_over(inner, error):
                    raise
                # Another attempt is on its way. The traceback would keep this object alive by way of this frame, and
                # so keep the call from being cancelled when the caller drops it.
                error.__traceback__ = None
            finally:
                self._awaited = False
                if self._over and not self._lease.closed:
                    self._settled()

    def _is_over(self, inner: Any, error: BaseException) -> bool:
        """Whether the call has ended with the attempt whose stream has ended like this."""
        if self._driver is None and isinstance(error, StopIteration):
            if not self._lease.closed:
                self._went_well()
            if self._driver is None:
                return True
        return self._taken_over().settle(inner)


class TimedStreamCall(StreamCall):
    """The same, with a limit to its silence (``ServiceConfig.stream_idle_timeout``)."""

    __slots__ = ()

    _silence: Silence | None = None

    def __next__(self) -> Any:
        silence = self._silence
        if silence is None:
            response = super().__next__()
            driver = self._taken_over()
            idle = driver.channel.cluster.config.stream_idle_timeout
            assert idle is not None
            self._silence = Silence(driver, self._reader, idle)
            return response
        silence.begin()
        try:
            response = super().__next__()
        except (StopIteration, grpc.RpcError):
            silence.over()
            final = self._final()
            if isinstance(final, DeadlineExceeded):
                raise final from None
            raise
        silence.end()
        return response


class Streaming(Beginning):
    """What both kinds of response streams share."""

    streams = True
    call_class = StreamCall

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._cluster.config.stream_idle_timeout is not None:
            self.call_class = TimedStreamCall


class UnaryStream(Streaming, UnaryStreamMultiCallable):
    """One request, a stream of responses."""

    kind = "unary_stream"

    __call__ = Beginning.begin


class StreamStream(Streaming, StreamStreamMultiCallable):
    """A stream of requests, a stream of responses."""

    kind = "stream_stream"
    request_streams = True

    def __call__(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return self.begin(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)
