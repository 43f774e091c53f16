"""The four multicallables: what a stub calls to make an RPC."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Final

import grpc
import grpc.aio

from meshlb.grpc._idempotency import is_declared
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
        self._name = path.decode() if isinstance(path, bytes) else path
        self.policy = policy = channel.policies.of(self._name)
        self._is_intercepted = self.kind in channel.intercepted_kinds
        self._is_direct = not self._is_intercepted and policy.hedge is None
        """Each call is one of ``call_class``, there and then."""
        self._idempotent: bool | None = None
        # What each call asks, so that it finds an attribute, and none where there is nothing to be done.
        config = self.cluster.config
        self.timeout = policy.timeout
        self.limit = config.timeout
        self.per_try_timeout = None if policy.retry is None else policy.retry.per_try_timeout
        self.times_attempts = self.limit is not None or self.per_try_timeout is not None
        """An attempt's time is not the call's."""
        self.longest_silence = config.stream_idle_timeout
        self.patient = policy.patient
        self.reads_calls = self.cluster.reads_calls
        self.wants_reports = self.cluster.wants_reports
        self.tells_successes = policy.hedge is not None or policy.throttle is not None

    @property
    def idempotent(self) -> bool:
        """Whether the method may be processed more than once."""
        known = self._idempotent
        if known is None:
            known = self.policy.idempotent
            if known or is_declared(self._name):
                self._idempotent = known  # else a module that declares it may be loaded later
        return known

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
        if self._is_direct:
            here = self.channel.here()
            return self.call_class(self, here, request, timeout, metadata, credentials, wait_for_ready, compression)
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
        if self._is_direct:
            here = self.channel.here()
            return self.call_class(self, here, request, timeout, metadata, credentials, wait_for_ready, compression)
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
        if self._is_direct:
            here = self.channel.here()
            return self.call_class(
                self, here, request_iterator, timeout, metadata, credentials, wait_for_ready, compression
            )
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
        if self._is_direct:
            here = self.channel.here()
            return self.call_class(
                self, here, request_iterator, timeout, metadata, credentials, wait_for_ready, compression
            )
        return self.start(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)
