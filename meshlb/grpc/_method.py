"""What the multi-callables of all four kinds share: a method, its sub-channels' own multi-callables, and its limits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from meshlb.grpc._attempts import Attempts
from meshlb.grpc._requests import RequestSource
from meshlb.grpc._sessions import context_and_metadata
from meshlb.model import NO_CONTEXT
from meshlb.serving import surroundings

if TYPE_CHECKING:
    from meshlb.grpc._channel import MeshChannel
    from meshlb.grpc._subchannel import SubChannel
    from meshlb.model import CallContext
    from meshlb.node import Node
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
        """What an attempt's native call takes: the request, or the (serialised) request stream from its beginning."""
        return self.request if self.source is None else self.source.attempt()

    def rewind(self) -> bool:
        """The attempt under way is over. Whether another one can send the same."""
        return self.source is None or self.source.rewind()

    def end(self) -> None:
        """There will be no other attempt."""
        if self.source is not None:
            self.source.close()


class Method:
    """One RPC method on a mesh channel."""

    kind: ClassVar[str]
    """The name of the factory on ``grpc.Channel``: ``unary_unary``..."""

    streams: bool = False
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
        self.serializer = request_serializer
        self._deserializer = response_deserializer
        # Generated code of grpcio 1.63 and later passes it; older runtimes do not know it.
        self._registered = (True,) if registered else ()
        self._natives: dict[Node, tuple[SubChannel, Any]] = {}
        self._raw_natives: dict[Node, tuple[SubChannel, Any]] = {}
        self._sub_channel = channel.sub_channel
        self._rpc_attempt = channel.mesh.telemetry.rpc_attempt
        self.policy = channel.policies.of(self._method)
        self._limit = channel.cluster.config.timeout
        self._reads_calls = channel.cluster.reads_calls
        self._wants_reports = channel.cluster.wants_reports
        self._telemetry = channel.mesh.telemetry
        self.single_threaded = channel.single_threaded and self.kind == "unary_stream"
        """Whether responses are read on the caller's thread alone, and the end of a call is noticed by that alone."""
        cluster, retry = channel.cluster, self.policy.retry
        # Without limits of ours the caller's timeout is the attempt's, and without reports the response is all.
        self._is_plain = (
            self._limit is None
            and (retry is None or retry.per_try_timeout is None)
            and self.policy.is_plain
            and cluster.throttling is None
            and cluster.limiter is None
            and cluster.stickiness is None
            and not self._wants_reports
            and not self.single_threaded
            and not (self.streams and cluster.config.stream_idle_timeout is not None)
        )

    @property
    def channel(self) -> MeshChannel:
        return self._channel

    @property
    def name(self) -> str:
        """``/package.Service/Method``."""
        return self._method

    def native(self, node: Node) -> Any:
        """gRPC's own multi-callable on an endpoint's sub-channel, for messages as the caller gives them."""
        return self._native(node, self._natives, self.serializer)

    def raw_native(self, node: Node) -> Any:
        """The same, for messages that have been serialised: where an attempt may come after the caller has got his
        message back."""
        return self._native(node, self._raw_natives, None)

    def _native(
        self,
        node: Node,
        natives: dict[Node, tuple[SubChannel, Any]],
        serializer: Callable[[Any], bytes] | None,
    ) -> Any:
        sub = self._sub_channel(node)
        known = natives.get(node)
        if known is None or known[0] is not sub:
            with _making:
                for gone in [other for other, (of, _) in tuple(natives.items()) if of.closed]:
                    del natives[gone]
                factory = getattr(sub.channel, self.kind)
                native = factory(self._method, serializer, self._deserializer, *self._registered)
                known = natives[node] = (sub, native)
        return known[1]

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
