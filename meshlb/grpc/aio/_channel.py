"""The channel: a ``grpc.aio.Channel`` whose calls go to the instances of a service."""

from __future__ import annotations

import asyncio
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from meshlb import control
from meshlb.errors import MeshError
from meshlb.grpc._options import checked, subchannel_options, subchannel_target
from meshlb.grpc._policy import Given, MethodPolicies
from meshlb.grpc._probing import OwnChannelsProber
from meshlb.grpc.aio._connectivity import state_of
from meshlb.grpc.aio._errors import as_aio_error
from meshlb.grpc.aio._interceptors import front_channel, intercepted_kinds
from meshlb.grpc.aio._loops import LoopChannels, NativeChannel, running_loop
from meshlb.grpc.aio._multicallable import (
    StreamStreamMultiCallable,
    StreamUnaryMultiCallable,
    UnaryStreamMultiCallable,
    UnaryUnaryMultiCallable,
)
from meshlb.grpc.aio._native import CHANNEL_CLOSED, UsageError, unpatched
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.mesh import Mesh
    from meshlb.node import Node

_MOST_METHODS: Final = 1024
"""Methods remembered. Far above what a service has; it bounds a program that makes serializers anew for every call,
and so a new method each time."""

_STATE_POLL: Final = 0.02
"""Seconds between two looks at the state while somebody waits for it to change. Nobody does for long, and watching the
sub-channels natively would leave a watch behind in gRPC's core for each that is given up."""

_CLOSE_TIMEOUT: Final = 1.0
"""Seconds, beyond the grace, that ``close`` waits for another loop to close what it holds."""


class MeshChannel(grpc.aio.Channel):
    """Made by ``insecure_channel`` and ``secure_channel``. Usable from several event loops, each in its own thread.

    Nothing is connected before the first call, and nothing needs a running loop before that.
    """

    def __init__(
        self,
        mesh: Mesh,
        cluster: Cluster,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]] | None,
        compression: grpc.Compression | None,
        interceptors: Sequence[Any] | None,
        attempt_interceptors: Sequence[Any] | None,
        service_config: Given = None,
    ) -> None:
        self.mesh = mesh
        self.cluster = cluster
        self.secure = credentials is not None
        self.policies = MethodPolicies(cluster, checked(options), service_config)
        options = self.policies.options
        self.intercepted_kinds = intercepted_kinds(interceptors)
        self.intercepts_attempts = bool(intercepted_kinds(attempt_interceptors))
        self._interceptors = tuple(interceptors or ())
        # No method: what makes connections is known to the cluster, and must not keep a channel that nobody holds.
        self._connect: Callable[[Node], grpc.aio.Channel] = partial(
            _connect,
            credentials,
            subchannel_options(options, cluster.config, cluster.service),
            compression,
            tuple(attempt_interceptors or ()) or None,
        )
        self._keys: dict[Any, object] = {}
        self._prober: OwnChannelsProber | None = None
        if cluster.probing is not None:
            self._prober = OwnChannelsProber(cluster, credentials, options, compression)
            cluster.probing.add(self._prober)
        self._closed = False
        self._loops: dict[asyncio.AbstractEventLoop, LoopChannels] = {}
        self._inherited: list[dict[asyncio.AbstractEventLoop, LoopChannels]] = []
        self._lock = threading.Lock()
        control.on_fork(self)

    # -- what multicallables and calls use ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._closed

    def here(self) -> LoopChannels:
        """What this channel holds in the running event loop. Raises UsageError after ``close``."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = _current_loop()
        here = self._loops.get(loop)
        return self._enter(loop) if here is None else here

    def front(self, here: LoopChannels) -> NativeChannel:
        """The native channel that runs the user's interceptors in that loop."""
        front = here.front
        if front is None:
            front = here.front = NativeChannel(front_channel(self._interceptors))
        return front

    def leave(self, here: LoopChannels) -> None:
        """Forget what was held in a loop that ends."""
        with self._lock:
            if self._loops.get(here.loop) is here:
                del self._loops[here.loop]

    def method_key(self, method: tuple[Any, ...]) -> object:
        """The one object that stands for a method with these serializers on this channel."""
        if len(self._keys) >= _MOST_METHODS:
            self._keys.clear()
        return self._keys.setdefault(method, object())

    def _enter(self, loop: asyncio.AbstractEventLoop) -> LoopChannels:
        with self._lock:
            if self._closed:
                raise UsageError(CHANNEL_CLOSED)
            here = self._loops.get(loop)
            if here is not None:
                return here
            dead = [other for other in self._loops if other.is_closed()]
            gone = [self._loops.pop(other) for other in dead]
            here = self._loops[loop] = LoopChannels(loop, self.cluster, self._connect)
        here.end_with_loop(partial(_leave, weakref.ref(self), weakref.ref(here)))
        for channels in gone:
            channels.discard()
        return here

    # -- grpc.aio.Channel: multicallables ----------------------------------------------------------------------

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> UnaryUnaryMultiCallable:
        """A method with one request and one response."""
        return UnaryUnaryMultiCallable(self, method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> UnaryStreamMultiCallable:
        """A method with one request and a stream of responses."""
        return UnaryStreamMultiCallable(self, method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> StreamUnaryMultiCallable:
        """A method with a stream of requests and one response."""
        return StreamUnaryMultiCallable(self, method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> StreamStreamMultiCallable:
        """A method with streams in both directions."""
        return StreamStreamMultiCallable(self, method, request_serializer, response_deserializer, _registered_method)

    # -- grpc.aio.Channel: state -------------------------------------------------------------------------------

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The state of the sub-channels of the running loop, taken together.

        ``try_to_connect``: if there is no connection, start one to an instance.
        """
        if self._closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return state_of(self.cluster, self.here(), connect=try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the state is not ``last_observed_state``, which it is not when the channel is closed meanwhile.

        Raises UsageError if it is closed already.
        """
        if self._closed:
            raise UsageError(CHANNEL_CLOSED)
        while self.get_state() is last_observed_state:
            await asyncio.sleep(_STATE_POLL)

    async def channel_ready(self) -> None:
        """Wait until an instance is connected, for as long as that takes.

        Raises UsageError after ``close``, and MeshClosed (an AioRpcError, too) if the mesh is closed.
        """
        while True:
            if self._closed:
                raise UsageError(CHANNEL_CLOSED)
            try:
                await self.cluster.wait_ready_async()
            except MeshError as error:
                raise as_aio_error(error) from None
            if self.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
                return
            await asyncio.sleep(_STATE_POLL)

    # -- the end -----------------------------------------------------------------------------------------------

    async def close(self, grace: float | None = None) -> None:
        """Take no more calls, give those under way ``grace`` seconds, then cancel them and close the connections.

        In every loop that the channel was used in. Idempotent; the mesh stays open. Raises ValueError for a negative
        grace.
        """
        if self._closed:
            return
        if grace is not None and grace < 0:
            raise ValueError(f"grace must be non-negative, got {grace}.")
        with self._lock:
            self._closed = True
            loops, self._loops = self._loops, {}
        if self._prober is not None:
            self._prober.close()
        await asyncio.gather(*(self._close_in(channels, grace) for channels in loops.values()))

    async def _close_in(self, channels: LoopChannels, grace: float | None) -> None:
        loop = channels.loop
        if loop is running_loop():
            await channels.close(grace)
            return
        closed = Signal()
        try:
            if loop.is_running():
                loop.call_soon_threadsafe(channels.close_soon, grace, closed)
                await closed.wait_async((grace or 0.0) + _CLOSE_TIMEOUT)
        except RuntimeError:
            pass  # it was closed meanwhile
        channels.discard()

    async def __aenter__(self) -> MeshChannel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(None)

    def __del__(self) -> None:
        # Nobody can make calls any more, and none is under way: those hold the channel. On the control loop, since
        # the collector may run inside of any lock; without one the mesh is closed, and all connections with it.
        loops = getattr(self, "_loops", None)
        if loops:
            self.mesh.call_soon(_discard, tuple(loops.values()))
        prober = getattr(self, "_prober", None)
        if prober is not None:
            self.mesh.call_soon(prober.close)

    def after_fork_in_child(self) -> None:
        """Leave what the parent holds to the parent."""
        self._lock = threading.Lock()
        self._inherited.append(self._loops)
        self._loops = {}

    def __repr__(self) -> str:
        return f"<MeshChannel {self.cluster.query}{' closed' if self._closed else ''}>"


def _leave(channel_ref: weakref.ref[MeshChannel], here_ref: weakref.ref[LoopChannels]) -> None:
    channel, here = channel_ref(), here_ref()
    if here is not None:
        if channel is not None:
            channel.leave(here)
        here.end()


def _connect(
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
    compression: grpc.Compression | None,
    interceptors: Sequence[Any] | None,
    node: Node,
) -> grpc.aio.Channel:
    target = subchannel_target(node.endpoint)
    if credentials is None:
        return unpatched("insecure_channel")(target, options, compression, interceptors)
    return unpatched("secure_channel")(target, credentials, options, compression, interceptors)


def _discard(loops: tuple[LoopChannels, ...]) -> None:
    for channels in loops:
        channels.discard()


def _current_loop() -> asyncio.AbstractEventLoop:
    """The loop that this thread will run, for calls that are made before it does (grpc.aio allows that)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return asyncio.get_event_loop()
