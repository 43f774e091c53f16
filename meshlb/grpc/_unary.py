"""Multi-callables with a single response: unary-unary and stream-unary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from meshlb.grpc._blocking import BlockingMethod
from meshlb.grpc._driver import Driver
from meshlb.grpc._future import FutureCall
from meshlb.grpc._requests import Payload, RequestSource
from meshlb.grpc._sessions import context_and_metadata
from meshlb.grpc._types import StreamUnaryMultiCallable, UnaryUnaryMultiCallable
from meshlb.model import NO_CONTEXT
from meshlb.serving import surroundings


class UnaryUnary(BlockingMethod, UnaryUnaryMultiCallable):
    """One request, one response."""

    kind = "unary_unary"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._try_start = self._cluster.try_start
        # Without limits of ours the caller's timeout is the attempt's, and without reports the response is all.
        retry = self.policy.retry
        self._is_plain = (
            self._limit is None
            and (retry is None or retry.per_try_timeout is None)
            and self.policy.is_plain
            and self._cluster.throttling is None
            and not self._wants_reports
        )

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        # The fast path, by hand: everything added to a bare call stands here (and in try_start and close).
        lease = trace = error = context = None
        if self._reads_calls:
            if metadata is not None and type(metadata) is not tuple:
                metadata = tuple(metadata)  # it may be any iterable, and is read more than once
            context, metadata = context_and_metadata(self._cluster, self._method, metadata)
        if self._is_plain and not wait_for_ready and (timeout is None or timeout > 0) and surroundings() is None:
            lease = self._try_start(context or NO_CONTEXT)
            if lease is not None:
                trace = self._rpc_attempt(self._cluster, lease, method=self._method)
                if trace is None and (metadata is None or type(metadata) is tuple):
                    try:
                        sub = self._sub_channel(lease.node)
                        native = self._natives.get(sub)
                        if native is None:
                            native = self.native(sub)
                        response = native(request, timeout, metadata, credentials, None, compression)
                    except BaseException as failure:
                        error = failure
                    else:
                        lease.close()
                        return response
        try:
            invocation = self.invocation(
                request, None, timeout, metadata, credentials, wait_for_ready, compression, context
            )
            return self.run(invocation, with_call=False, lease=lease, trace=trace, error=error)
        finally:
            error = None  # or it would hold this frame, which holds it

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> tuple[Any, grpc.Call]:
        invocation = self.invocation(request, None, timeout, metadata, credentials, wait_for_ready, compression)
        response: tuple[Any, grpc.Call] = self.run(invocation, with_call=True)
        return response

    def future(
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
        return FutureCall(Driver(self, invocation, verb="future"))


class StreamUnary(BlockingMethod, StreamUnaryMultiCallable):
    """A stream of requests, one response."""

    kind = "stream_unary"

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
        return self.run(invocation, with_call=False)

    def with_call(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> tuple[Any, grpc.Call]:
        source = RequestSource(request_iterator)
        invocation = self.invocation(None, source, timeout, metadata, credentials, wait_for_ready, compression)
        response: tuple[Any, grpc.Call] = self.run(invocation, with_call=True)
        return response

    def future(
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
        return FutureCall(Driver(self, invocation, verb="future"))
