"""The four multicallables: what a stub calls to make an RPC."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Final

import grpc
import grpc.aio

from meshlb.grpc.aio._call import MeshCall
from meshlb.grpc.aio._hedged import HedgedUnaryCall
from meshlb.grpc.aio._kinds import StreamStreamCall, StreamUnaryCall, UnaryStreamCall, UnaryUnaryCall
from meshlb.grpc.aio._native import (
    StreamStreamMultiCallableABC,
    StreamUnaryMultiCallableABC,
    UnaryStreamMultiCallableABC,
    UnaryUnaryMultiCallableABC,
)

if TYPE_CHECKING:
    from meshlb.grpc.aio._channel import MeshChannel

intercepted: Final[ContextVar[MultiCallable]] = ContextVar("meshlb_grpc_aio_intercepted")
"""What the innermost interceptor of a call goes on with. Interceptors run in a task that is made with the call, and so
in a copy of the context that the call was made in."""


class MultiCallable:
    """A method of the service, as a stub holds it."""

    kind: ClassVar[str]
    call_class: ClassVar[type[MeshCall]]

    def __init__(
        self,
        channel: MeshChannel,
        path: str,
        request_serializer: Any,
        response_deserializer: Any,
        registered: bool | None,
    ) -> None:
        self.channel = channel
        self.cluster = channel.cluster
        self.telemetry = channel.mesh.telemetry
        self.path = path
        self.request_serializer = request_serializer
        self.response_deserializer = response_deserializer
        self.registered = registered
        self.key = channel.method_key((self.kind, path, request_serializer, response_deserializer, registered))
        """Stands for all of that, and is quick to look up: stubs that are made anew share native multicallables."""
        self.policy = channel.policies.of(path.decode() if isinstance(path, bytes) else path)
        retry = self.policy.retry
        self.per_try_timeout = None if retry is None else retry.per_try_timeout
        self._is_intercepted = self.kind in channel.intercepted_kinds

    @property
    def idempotent(self) -> bool:
        """Whether the method may be processed more than once."""
        return self.policy.idempotent

    def _kind_of_call(self) -> type[MeshCall]:
        """The class of the next call."""
        return self.call_class

    def start(
        self,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> Any:
        """Make an RPC, through the user's interceptors if there are any."""
        here = self.channel.here()
        if not self._is_intercepted:
            kind = self._kind_of_call()
            return kind(self, here, request, timeout, metadata, credentials, wait_for_ready, compression)
        token = intercepted.set(self)
        try:
            return self.channel.front(here).callable(self)(
                request,
                timeout=timeout,
                metadata=metadata,
                credentials=credentials,
                wait_for_ready=wait_for_ready,
                compression=compression,
            )
        finally:
            intercepted.reset(token)

    def proceed(self, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        """Make the RPC that the interceptors want. Compression, if any, stands in the metadata by now."""
        path = details.method.decode() if isinstance(details.method, bytes) else details.method
        method = self if path == self.path else self._renamed(path)
        return method._kind_of_call()(
            method,
            self.channel.here(),
            request,
            details.timeout,
            details.metadata,
            details.credentials,
            details.wait_for_ready,
            None,
        )

    def _renamed(self, path: str) -> MultiCallable:
        return type(self)(self.channel, path, self.request_serializer, self.response_deserializer, self.registered)


class UnaryUnaryMultiCallable(MultiCallable, UnaryUnaryMultiCallableABC):
    """One request, one response."""

    kind = "unary_unary"
    call_class = UnaryUnaryCall

    def _kind_of_call(self) -> type[MeshCall]:
        timer = self.policy.timer
        if timer is None or timer.delay() is None or not self.idempotent:
            return UnaryUnaryCall
        return HedgedUnaryCall

    def __call__(  # type: ignore[override]  # the stubs lack the "*" that grpc.aio has
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        return self.start(request, timeout, metadata, credentials, wait_for_ready, compression)


class UnaryStreamMultiCallable(MultiCallable, UnaryStreamMultiCallableABC):
    """One request, a stream of responses."""

    kind = "unary_stream"
    call_class = UnaryStreamCall

    def __call__(  # type: ignore[override]  # as above
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        return self.start(request, timeout, metadata, credentials, wait_for_ready, compression)


class StreamUnaryMultiCallable(MultiCallable, StreamUnaryMultiCallableABC):
    """A stream of requests, one response."""

    kind = "stream_unary"
    call_class = StreamUnaryCall

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        return self.start(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)


class StreamStreamMultiCallable(MultiCallable, StreamStreamMultiCallableABC):
    """Streams in both directions."""

    kind = "stream_stream"
    call_class = StreamStreamCall

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        return self.start(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)
