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
from meshlb.model import OK


class StreamCall(MeshCall):
    """The responses of one call, as an iterator that is Call and Future too.

    Until the first response has been read, a failed attempt can be followed by another one behind the caller's back.
    """

    __slots__ = ()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        # In one piece, for what a stream does that goes well; _driven_first has the rest.
        reader = inner = self._reader
        if reader is None:
            if self._driver is not None:
                return self._driven_first()
            inner = self._inner
        self._awaited = True
        try:
            response = next(inner)
            if reader is not None:
                return response
            lease = self._lease
            lease.node.answered(lease)
            # Asked after that: who takes the call over from now on sees by the lease that there was an answer.
            driver = self._driver
            if driver is None:
                source = self._source
                if source is not None:
                    source.keeping = False
            elif not driver.answered(inner):
                return self._driven_first()
            self._reader = inner
            return response
        except StopIteration:
            if self._driver is None:
                lease = self._lease
                if not lease.closed:  # `_went_well`, written out
                    lease.node.finish(lease, OK)
                    self._source = None
            if self._driver is None or self._driver.settle(inner) or reader is not None:
                raise
        except grpc.RpcError as error:
            if self._taken_over().settle(inner) or reader is not None:
                raise
            # Another attempt is on its way. The traceback would keep this object alive by way of this frame, and so
            # keep the call from being cancelled when the caller drops it.
            error.__traceback__ = None
        finally:
            self._awaited = False
            if self._over and not self._lease.closed:
                self._settled()
        return self._driven_first()

    def next(self) -> Any:
        return self.__next__()

    def _driven_first(self) -> Any:
        """The first response, of whatever attempt of the driver's has one."""
        driver = self._taken_over()
        while True:
            inner = driver.current()
            if isinstance(inner, LocalRpcError):
                raise inner
            try:
                response = next(inner)
                if driver.answered(inner):
                    self._reader = inner
                    return response
            except (StopIteration, grpc.RpcError) as error:
                if driver.settle(inner):
                    raise
                error.__traceback__ = None  # as above


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
