"""The channel: a ``grpc.Channel`` whose calls go to the instances of a service."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.experimental

from meshlb import control
from meshlb.default import default_mesh
from meshlb.errors import ConfigError
from meshlb.grpc._connectivity import Connectivity
from meshlb.grpc._options import Options, checked
from meshlb.grpc._policy import Given, MethodPolicies, native_options
from meshlb.grpc._probing import RPCProber
from meshlb.grpc._stream import StreamStream, UnaryStream
from meshlb.grpc._subchannel import SubChannel, opener
from meshlb.grpc._target import parse
from meshlb.grpc._types import (
    StreamStreamMultiCallable,
    StreamUnaryMultiCallable,
    UnaryStreamMultiCallable,
    UnaryUnaryMultiCallable,
)
from meshlb.grpc._unary import StreamUnary, UnaryUnary
from meshlb.model import Outcome, OutcomeKind, Sent
from meshlb.resilience import BreakerState
from meshlb.resources import EndpointResources
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.mesh import Mesh
    from meshlb.node import Node


class Waiter(Protocol):
    """A call that has no attempt under way, so that gRPC cannot tell it that the channel was closed."""

    def channel_closed(self) -> None: ...


class MeshChannel(grpc.Channel):
    """Calls to one service, each to the instance that the mesh chooses. Made by ``insecure_channel`` and
    ``secure_channel``; safe from any thread. Closing it does not close the mesh."""

    def __init__(
        self,
        mesh: Mesh,
        cluster: Cluster,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]] | None,
        compression: grpc.Compression | None,
        service_config: Given = None,
    ) -> None:
        self.mesh = mesh
        self.cluster = cluster
        self.secure = credentials is not None
        self.closing = Signal()
        self.policies = MethodPolicies(cluster, checked(options), service_config)
        options = self.policies.options
        self.single_threaded = _single_threaded(options)
        self._waiters: set[Waiter] = set()
        # The cluster holds the resources, as their listener: they must not hold this channel, or dropping it would
        # not end them.
        self._connectivity = connectivity = Connectivity(mesh, cluster)
        open_sub_channel = opener(cluster, credentials, options, compression, connectivity.sub_channel_closed)

        def make(node: Node) -> SubChannel:
            sub = open_sub_channel(node)
            connectivity.sub_channel_made(node, sub)
            return sub

        # Kept in the child of a fork: dropping an inherited native channel there may hang.
        resources = EndpointResources(
            cluster, make, SubChannel.close, withhold=SubChannel.withhold, keep_after_fork=True
        )
        self._resources = resources
        self.existing_sub_channel = resources.get
        connectivity.get = resources.get
        self._prober = RPCProber(resources.get)  # kept here: the cluster knows it for as long as it lives
        if cluster.probing is not None:
            cluster.probing.add(self._prober)
        weakref.finalize(self, _release, mesh, resources).atexit = False
        control.on_fork(self)

    # -- grpc.Channel ------------------------------------------------------------------------------------------

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        _registered_method: bool | None = False,
    ) -> UnaryUnaryMultiCallable:
        return UnaryUnary(self, method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        _registered_method: bool | None = False,
    ) -> UnaryStreamMultiCallable:
        return UnaryStream(self, method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        _registered_method: bool | None = False,
    ) -> StreamUnaryMultiCallable:
        return StreamUnary(self, method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        _registered_method: bool | None = False,
    ) -> StreamStreamMultiCallable:
        return StreamStream(self, method, request_serializer, response_deserializer, _registered_method)

    def subscribe(
        self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool | None = False
    ) -> None:
        """Call back with the state of the channel, now and at every change. ``try_to_connect``: connect to an
        endpoint, and to another one if that fails, until one is READY."""
        if not self.closed:
            self._connectivity.subscribe(callback, connect=bool(try_to_connect))

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        self._connectivity.unsubscribe(callback)

    def close(self) -> None:
        """Cancel the calls under way and close the connections. Idempotent; later calls raise ValueError."""
        self.closing.set()
        for waiter in tuple(self._waiters):
            waiter.channel_closed()
        self._connectivity.close()
        self._prober.close()
        self._resources.close()

    def __enter__(self) -> MeshChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- for the calls -----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self.closing.is_set()

    existing_sub_channel: Callable[[Node], SubChannel]
    """The sub-channel of an endpoint, as it is."""

    def sub_channel(self, node: Node) -> SubChannel:
        """The sub-channel for an attempt on an endpoint. Raises RuntimeError after ``close``."""
        sub = self.existing_sub_channel(node)
        return self.renewed(node, sub) if sub.unreachable else sub

    def renewed(self, node: Node, sub: SubChannel) -> SubChannel:
        """A new sub-channel for a breaker's probe of an endpoint that could not be connected.

        While gRPC waits for its back-off to end, a call fails without a try to connect; so the old one would report on
        the past. For calls that are no probe that is just right.
        """
        breaker = node.breaker
        if breaker is None or breaker.state is not BreakerState.HALF_OPEN or node.in_flight > 1:
            return sub
        self._resources.endpoint_removed(node)
        return self.existing_sub_channel(node)

    def note(self, node: Node, outcome: Outcome) -> None:
        """Remember what a failed attempt, whose lease is still open, says of the endpoint's sub-channel."""
        if outcome.sent is Sent.NOT_SENT and outcome.kind is OutcomeKind.FAILURE and not self.closed:
            with contextlib.suppress(RuntimeError):  # closed just now
                self.existing_sub_channel(node).unreachable = True

    def add_waiter(self, waiter: Waiter) -> None:
        """Have ``waiter`` told when the channel is closed. Takes no lock, as ``remove_waiter`` is called in
        finalisers; adding to and removing from a set are atomic."""
        self._waiters.add(waiter)

    def remove_waiter(self, waiter: Waiter) -> None:
        self._waiters.discard(waiter)

    @contextlib.contextmanager
    def waiting(self, waiter: Waiter) -> Iterator[None]:
        """Have ``waiter`` told when the channel is closed, for the time of the block."""
        self._waiters.add(waiter)
        try:
            if self.closed:
                waiter.channel_closed()
            yield
        finally:
            self._waiters.discard(waiter)

    def after_fork_in_child(self) -> None:
        self._waiters = set()
        self._connectivity.after_fork_in_child()
        if not self.closed:
            self.closing = Signal()

    def __repr__(self) -> str:
        return f"<meshlb.grpc channel to {self.cluster.query}{' (closed)' if self.closed else ''}>"


def insecure_channel(
    target: str,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    *,
    mesh: Mesh | None = None,
    service_config: Given = None,
) -> grpc.Channel:
    """A channel without TLS, as ``grpc.insecure_channel``.

    ``target``: ``consul:///orders``, with ``?tag=``, ``dc=``, ``filter=`` and ``policy=`` if need be; the same of
    another Consul, ``consul://agent:8500/orders``; a list, ``static:///a:1,b:2``; or a service's bare name. Any other
    target is gRPC's own, and so is the channel then. ``options``: channel options of the connection to each
    endpoint; they win over those that meshlb sets. ``mesh``: None means the process's default mesh.
    ``service_config``: a gRPC service config (JSON or a mapping), which comes before the option ``grpc.service_config``
    and ``ServiceConfig.service_config``; meshlb itself acts by it, the connections make no retries of their own.

    Raises ConfigError for a target that makes no sense and for wrong options, MeshClosed if the mesh is closed.
    """
    cluster = parse(target, mesh)
    if cluster is None:
        return grpc.insecure_channel(target, native_options(options, service_config), compression)
    return MeshChannel(mesh or default_mesh(), cluster, None, options, compression, service_config)


def secure_channel(
    target: str,
    credentials: grpc.ChannelCredentials,
    options: Sequence[tuple[str, Any]] | None = None,
    compression: grpc.Compression | None = None,
    *,
    mesh: Mesh | None = None,
    service_config: Given = None,
) -> grpc.Channel:
    """A channel with TLS or other channel credentials, as ``grpc.secure_channel``; see ``insecure_channel``.

    Certificates are verified for the service's name, unless ``options`` sets ``grpc.default_authority`` or
    ``grpc.ssl_target_name_override``. Raises ConfigError if there are no credentials.
    """
    if credentials is None:
        raise ConfigError("credentials: None; insecure_channel makes a channel without TLS")
    cluster = parse(target, mesh)
    if cluster is None:
        return grpc.secure_channel(target, credentials, native_options(options, service_config), compression)
    return MeshChannel(mesh or default_mesh(), cluster, credentials, options, compression, service_config)


def _single_threaded(options: Options) -> bool:
    """Whether gRPC will read response streams on the caller's thread alone, as it can be told to."""
    option = grpc.experimental.ChannelOptions.SingleThreadedUnaryStream
    return os.getenv("GRPC_SINGLE_THREADED_UNARY_STREAM") is not None or any(name == option for name, _ in options)


def _release(mesh: Mesh, resources: EndpointResources[SubChannel]) -> None:
    """Close what a dropped channel has left. Off the collector's thread, which may hold any lock."""
    if not mesh.call_soon(resources.close):
        threading.Thread(target=resources.close, name="meshlb-grpc-release", daemon=True).start()
