"""Multi-callables with a single response: unary-unary and stream-unary."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.grpc._beginning import Beginning
from meshlb.grpc._blocking import BlockingMethod
from meshlb.grpc._future import FutureCall
from meshlb.grpc._requests import RequestSource
from meshlb.grpc._sessions import context_and_metadata
from meshlb.grpc._types import StreamUnaryMultiCallable, UnaryUnaryMultiCallable
from meshlb.model import NO_CONTEXT
from meshlb.node import REFUSED
from meshlb.serving import surroundings

if TYPE_CHECKING:
    from meshlb.node import Lease


class UnaryResponse(BlockingMethod, Beginning):
    """What both kinds with a single response share."""

    call_class = FutureCall

    def call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        """Make a blocking call; ``request`` is an iterator if ``request_streams``."""
        source = RequestSource(request, self.serializer) if self.request_streams else None
        lease = None
        if (
            self._is_plain
            and not wait_for_ready
            and (timeout is None or timeout > 0)
            and (metadata is None or type(metadata) is tuple)
            and surroundings() is None
        ):
            # The fast path: everything added to a bare call that goes well stands here, in pick, and in Node.run.
            cluster, telemetry = self._cluster, self._telemetry
            context, sent = NO_CONTEXT, metadata
            if self._reads_calls:
                context, sent = context_and_metadata(cluster, self._method, metadata)
            started = cluster.clock()
            if started < telemetry.quiet_until and not telemetry.current():
                view = cluster.view
                node = view.picker.pick(context)
                natives = self._natives if source is None else self._raw_natives
                if node is not None and (known := natives.get(node)) is not None:
                    sub, native = known
                    failed, body = self._failed, request
                    if source is not None:
                        failed, body = partial(failed, source=source), source.attempt()
                    response = node.run(
                        started, sub, failed, native, body, timeout, sent, credentials, None, compression
                    )
                    if response is not REFUSED:
                        budget = cluster.budget
                        if budget is not None:
                            if started < budget.until:
                                budget.note()
                            else:
                                budget.deposit(started)
                        return response
                lease = cluster.try_start_on(node, view, context)
        invocation = self.invocation(request, source, timeout, metadata, credentials, wait_for_ready, compression)
        return self.run(invocation, with_call=False, lease=lease)

    def _failed(
        self,
        lease: Lease,
        error: BaseException,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
        *,
        source: RequestSource | None = None,
    ) -> Any:
        """Go on where the fast path's attempt has failed."""
        if self._cluster.budget is not None:
            self._cluster.budget.deposit(lease.started)
        try:
            invocation = self.invocation(request, source, timeout, metadata, credentials, wait_for_ready, compression)
            return self.run(invocation, with_call=False, lease=lease, error=error)
        finally:
            del error  # or it would hold this frame, which holds it


class UnaryUnary(UnaryResponse, UnaryUnaryMultiCallable):
    """One request, one response."""

    kind = "unary_unary"

    __call__ = UnaryResponse.call

    future = Beginning.begin

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


class StreamUnary(UnaryResponse, StreamUnaryMultiCallable):
    """A stream of requests, one response."""

    kind = "stream_unary"
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
        return self.call(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)

    def with_call(
        self,
        request_iterator: Iterator[Any],
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> tuple[Any, grpc.Call]:
        source = RequestSource(request_iterator, self.serializer)
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
        return self.begin(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)
