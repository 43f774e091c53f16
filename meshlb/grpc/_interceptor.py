"""The mesh for a channel that the program already has: an interceptor that answers calls through a mesh channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.errors import ConfigError
from meshlb.grpc._channel import MeshChannel, insecure_channel, secure_channel
from meshlb.grpc._types import (
    StreamStreamClientInterceptor,
    StreamUnaryClientInterceptor,
    UnaryStreamClientInterceptor,
    UnaryUnaryClientInterceptor,
)

if TYPE_CHECKING:
    from meshlb.mesh import Mesh


class MeshInterceptor(
    UnaryUnaryClientInterceptor,
    UnaryStreamClientInterceptor,
    StreamUnaryClientInterceptor,
    StreamStreamClientInterceptor,
):
    """Sends the calls of ``grpc.intercept_channel(channel, MeshInterceptor(mesh, "orders"))`` to the instances.

    Prefer ``insecure_channel`` where you can make the channel yourself: an interceptor is never told whether its caller
    blocks, so every call costs what a ``future()`` costs, about twice a blocking call. Nor is it told the messages'
    classes. Requests are serialised by their own ``SerializeToString``; the class of a response is looked up in
    protobuf's default descriptor pool, or in ``responses`` (``{"/shop.Orders/Get": Order}``).

    ``service``: a name, or any target of the mesh. ``credentials``, ``options``, ``compression``: as for
    ``secure_channel``, for the connections to the instances. ``fallback``: send calls to the intercepted channel while
    the registry knows no instance of the service. List it last, so that it is the innermost of several interceptors:
    it does not call what comes after it.

    Raises ConfigError for a target that is no service, MeshClosed if the mesh is closed. ``close`` it, or use it as a
    context manager; the channel that it intercepts does not.
    """

    def __init__(
        self,
        mesh: Mesh | None,
        service: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] | None = None,
        compression: grpc.Compression | None = None,
        responses: Mapping[str, Any] | None = None,
        fallback: bool = False,
    ) -> None:
        if credentials is None:
            channel = insecure_channel(service, options, compression, mesh=mesh)
        else:
            channel = secure_channel(service, credentials, options, compression, mesh=mesh)
        if not isinstance(channel, MeshChannel):
            channel.close()
            raise ConfigError(f"MeshInterceptor: {service!r} is not a service of the mesh")
        self._channel = channel
        self._responses = dict(responses or {})
        self._fallback = fallback
        self._multicallables: dict[tuple[str, str], Any] = {}

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        if self._unknown():
            return continuation(details, request)
        return self._multicallable("unary_unary", details).future(request, *_options(details))

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        if self._unknown():
            return continuation(details, request)
        return self._multicallable("unary_stream", details)(request, *_options(details))

    def intercept_stream_unary(
        self, continuation: Callable[..., Any], details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        if self._unknown():
            return continuation(details, request_iterator)
        return self._multicallable("stream_unary", details).future(request_iterator, *_options(details))

    def intercept_stream_stream(
        self, continuation: Callable[..., Any], details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        if self._unknown():
            return continuation(details, request_iterator)
        return self._multicallable("stream_stream", details)(request_iterator, *_options(details))

    def close(self) -> None:
        """Cancel the calls under way and close the connections to the instances."""
        self._channel.close()

    def __enter__(self) -> MeshInterceptor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _unknown(self) -> bool:
        """Whether the call is for the intercepted channel. A registry that has not answered yet is waited for."""
        cluster = self._channel.cluster
        return self._fallback and cluster.age is not None and not cluster.nodes

    def _multicallable(self, kind: str, details: Any) -> Any:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        multicallable = self._multicallables.get((kind, method))
        if multicallable is None:
            multicallable = getattr(self._channel, kind)(method, _serialize, self._deserializer(method))
            self._multicallables[kind, method] = multicallable
        return multicallable

    def _deserializer(self, method: str) -> Callable[[bytes], Any]:
        message = self._responses.get(method) or _declared_response(method)
        if message is None:
            raise ConfigError(
                f"MeshInterceptor: the response class of {method} is not in protobuf's default descriptor pool; "
                f"give it: MeshInterceptor(..., responses={{{method!r}: ...}})"
            )
        deserializer: Callable[[bytes], Any] = message.FromString
        return deserializer


def _options(details: Any) -> tuple[Any, ...]:
    # wait_for_ready and compression came to the details later than the others.
    return (
        details.timeout,
        details.metadata,
        details.credentials,
        getattr(details, "wait_for_ready", None),
        getattr(details, "compression", None),
    )


def _serialize(message: Any) -> bytes:
    data: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return data


def _declared_response(method: str) -> Any:
    try:
        from google.protobuf import descriptor_pool, message_factory
    except ImportError:
        return None
    try:
        found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return None
    return message_factory.GetMessageClass(found.output_type)
