"""What the multi-callables of all four kinds share: a method, its sub-channels' own multi-callables, and its limits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from meshlb.grpc._attempts import Attempts
from meshlb.grpc._requests import RequestSource, payload_serializer
from meshlb.grpc._sessions import context_and_metadata
from meshlb.model import NO_CONTEXT
from meshlb.serving import surroundings

if TYPE_CHECKING:
    from meshlb.grpc._channel import MeshChannel
    from meshlb.grpc._subchannel import SubChannel
    from meshlb.model import CallContext
    from meshlb.serving import Surroundings

_making: Final = threading.Lock()
"""Held while a native multi-callable is made: registering a method on a channel is not thread-safe in gRPC."""


class Invocation:
    """What the caller asked for, once: the same for every attempt."""

    __slots__ = ("around", "compression", "context", "credentials", "metadata", "patient", "request", "source",
                 "timeout")  # fmt: skip

    def __init__(
        self,
        request: Any,
        source: RequestSource | None,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
        around: Surroundings | None,
        context: CallContext,
    ) -> None:
        self.around = around
        self.context = context
        """What a policy looks at."""
        self.request = request
        self.source = source
        self.timeout = timeout
        # It may be any iterable, and is read once for each attempt.
        self.metadata = metadata if metadata is None or type(metadata) is tuple else tuple(metadata)
        self.credentials = credentials
        # Never passed down: a sub-channel has one endpoint, and would wait for it until the deadline while others
        # could be called.
        self.patient = bool(wait_for_ready)
        self.compression = compression

    def body(self) -> Any:
        """What an attempt's native call takes: the request, or the request stream from its beginning."""
        return self.request if self.source is None else self.source.attempt()

    @property
    def replayable(self) -> bool:
        return self.source is None or self.source.replayable

    def end(self) -> None:
        """There will be no other attempt."""
        if self.source is not None:
            self.source.close()


class Method:
    """One RPC method on a mesh channel."""

    kind: ClassVar[str]
    """The name of the factory on ``grpc.Channel``: ``unary_unary``..."""

    streams: ClassVar[bool] = False
    """Whether the response is a stream."""

    def __init__(
        self,
        channel: MeshChannel,
        method: str,
        request_serializer: Callable[[Any], bytes] | None,
        response_deserializer: Callable[[bytes], Any] | None,
        registered: bool | None,
    ) -> None:
        self._channel = channel
        self._cluster = channel.cluster
        self._method = method.decode() if isinstance(method, bytes) else method
        self._serializer = request_serializer
        self._payload_serializer = payload_serializer(request_serializer)
        self._deserializer = response_deserializer
        # Generated code of grpcio 1.63 and later passes it; older runtimes do not know it.
        self._registered = (True,) if registered else ()
        self._natives: dict[SubChannel, Any] = {}
        self._payload_natives: dict[SubChannel, Any] = {}
        self._sub_channel = channel.sub_channel
        self._rpc_attempt = channel.mesh.telemetry.rpc_attempt
        self.policy = channel.policies.of(self._method)
        self._limit = channel.cluster.config.timeout
        self._reads_calls = channel.cluster.reads_calls
        self._wants_reports = channel.cluster.wants_reports

    @property
    def channel(self) -> MeshChannel:
        return self._channel

    @property
    def name(self) -> str:
        """``/package.Service/Method``."""
        return self._method

    def native(self, sub: SubChannel) -> Any:
        """gRPC's own multi-callable on a sub-channel, for messages as the caller gives them."""
        native = self._natives.get(sub)
        return self._make(sub, self._natives, self._serializer) if native is None else native

    def payload_native(self, sub: SubChannel) -> Any:
        """The same, for Payloads: where an attempt may come after the caller has got his message back."""
        native = self._payload_natives.get(sub)
        return self._make(sub, self._payload_natives, self._payload_serializer) if native is None else native

    def _make(self, sub: SubChannel, natives: dict[SubChannel, Any], serializer: Callable[[Any], bytes] | None) -> Any:
        with _making:
            native = natives.get(sub)
            if native is None:
                factory = getattr(sub.channel, self.kind)
                native = factory(self._method, serializer, self._deserializer, *self._registered)
                for gone in [known for known in natives if known.closed]:
                    del natives[gone]
                natives[sub] = native
            return native

    def invocation(
        self,
        request: Any,
        source: RequestSource | None,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
        context: CallContext | None = None,
    ) -> Invocation:
        """What the caller asked for, with the method's own settings where he did not say.

        ``context``: None if it is still to be found out, from the surroundings and the metadata of this very call.
        """
        if context is None:
            context = NO_CONTEXT
            if self._reads_calls:
                metadata = None if metadata is None else tuple(metadata)
                context, metadata = context_and_metadata(self._cluster, self._method, metadata)
        policy = self.policy
        ready = policy.patient if wait_for_ready is None else wait_for_ready
        timeout = policy.limited(timeout)
        around = surroundings()
        if around is not None:
            timeout = self._cluster.limited(around, timeout)
        return Invocation(request, source, timeout, metadata, credentials, ready, compression, around, context)

    def attempts(self, invocation: Invocation, *, started: float) -> Attempts:
        """The course of a new call: the caller's timeout, with the service's configured one as the upper bound."""
        timeout = invocation.timeout
        if self._limit is not None and (timeout is None or timeout > self._limit):
            timeout = self._limit
        return Attempts(
            self._cluster,
            self._method,
            invocation.context,
            started=started,
            timeout=timeout,
            patient=invocation.patient,
            policy=self.policy,
            around=invocation.around,
        )
