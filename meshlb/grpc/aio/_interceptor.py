"""The mesh for a channel that the program already has: interceptors that answer its calls through a mesh channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from meshlb.default import default_mesh
from meshlb.errors import ConfigError
from meshlb.grpc._interceptor import _declared_response, _serialize
from meshlb.grpc._target import parse
from meshlb.grpc.aio._channel import MeshChannel
from meshlb.grpc.aio._native import (
    StreamStreamInterceptor,
    StreamUnaryInterceptor,
    UnaryStreamInterceptor,
    UnaryUnaryInterceptor,
)

if TYPE_CHECKING:
    from meshlb.mesh import Mesh


class AioMeshInterceptor:
    """Sends the calls of a ``grpc.aio`` channel to the instances of a service.

    ::

        channel = grpc.aio.insecure_channel(target, interceptors=AioMeshInterceptor.all(mesh, "orders"))

    grpc.aio takes one interceptor for each kind of call, and ``all`` makes the four. Prefer ``insecure_channel`` of
    this package where you can make the channel yourself: an interceptor costs a task a call, and is not told the
    messages' classes.
    """

    def __init__(self, mesh_channel: MeshChannel, responses: Mapping[str, Any], fallback: bool) -> None:
        self._channel = mesh_channel
        self._responses = responses
        self._fallback = fallback
        self._multicallables: dict[str, Any] = {}

    @staticmethod
    def all(
        mesh: Mesh | None,
        service: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] | None = None,
        compression: grpc.Compression | None = None,
        responses: Mapping[str, Any] | None = None,
        fallback: bool = False,
    ) -> list[Any]:
        """The interceptors for all kinds of call; they have to be the innermost ones of their channel.

        ``service``: a name, or any target of the mesh. ``credentials``, ``options``, ``compression``: for the
        connections to the instances. Requests are serialised by their own ``SerializeToString``; the class of a
        response is looked up in protobuf's default descriptor pool, or in ``responses``
        (``{"/shop.Orders/Get": Order}``). ``fallback``: send calls to the intercepted channel while the registry knows
        no instance of the service.

        Raises ConfigError for a target that is no service, MeshClosed if the mesh is closed. The connections are closed
        with their event loop, or by ``close`` of any of the four.
        """
        cluster = parse(service, mesh)
        if cluster is None:
            raise ConfigError(f"AioMeshInterceptor: {service!r} is not a service of the mesh")
        channel = MeshChannel(mesh or default_mesh(), cluster, credentials, options, compression, None, None)
        return [kind(channel, dict(responses or {}), fallback) for kind in _KINDS]

    async def close(self) -> None:
        """Cancel the calls under way and close the connections to the instances."""
        await self._channel.close()

    async def _answer(self, kind: str, continuation: Any, details: Any, request: Any) -> Any:
        cluster = self._channel.cluster
        if self._fallback and cluster.age is not None and not cluster.nodes:
            return await continuation(details, request)
        path = details.method.decode() if isinstance(details.method, bytes) else details.method
        multicallable = self._multicallables.get(path)
        if multicallable is None:
            multicallable = getattr(self._channel, kind)(path, _serialize, self._deserializer(path))
            self._multicallables[path] = multicallable
        return multicallable(
            request,
            timeout=details.timeout,
            metadata=details.metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )

    def _deserializer(self, path: str) -> Any:
        message = self._responses.get(path) or _declared_response(path)
        if message is None:
            raise ConfigError(
                f"AioMeshInterceptor: the response class of {path} is not in protobuf's default descriptor pool; "
                f"give it: AioMeshInterceptor.all(..., responses={{{path!r}: ...}})"
            )
        return message.FromString


class _UnaryUnary(AioMeshInterceptor, UnaryUnaryInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._answer("unary_unary", continuation, client_call_details, request)


class _UnaryStream(AioMeshInterceptor, UnaryStreamInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._answer("unary_stream", continuation, client_call_details, request)


class _StreamUnary(AioMeshInterceptor, StreamUnaryInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._answer("stream_unary", continuation, client_call_details, request_iterator)


class _StreamStream(AioMeshInterceptor, StreamStreamInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._answer("stream_stream", continuation, client_call_details, request_iterator)


_KINDS: tuple[type[AioMeshInterceptor], ...] = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
