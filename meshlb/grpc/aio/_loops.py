"""What one channel holds in one event loop: a native sub-channel an endpoint, and the calls under way.

Everything of grpc.aio belongs to the loop that it was made in. One channel object may be used from several loops (one
a thread, or one after the other), so it has one ``LoopChannels`` for each.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.grpc.aio._loop_guard import LoopGuard
from meshlb.grpc.aio._native import immediate
from meshlb.node import Node
from meshlb.resources import EndpointResources
from meshlb.topology.eligibility import Standing

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.grpc.aio._call import MeshCall
    from meshlb.grpc.aio._multicallable import MultiCallable
    from meshlb.waiting import Signal

_MOST_CALLABLES: Final = 1024
"""Methods remembered per sub-channel; as for the channel."""


class NativeChannel:
    """A channel of grpc.aio, with the multicallables made on it."""

    __slots__ = ("callables", "channel", "closing")

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.closing = False
        """Set before it is closed: calls that end from then on may have been cut by that."""
        self.callables: dict[Any, Any] = {}
        """The multicallables made so far, by ``MultiCallable.key``."""

    def callable(self, method: MultiCallable) -> Any:
        """grpc's own multicallable of that method on this channel."""
        made = self.callables.get(method.key)
        if made is None:
            if len(self.callables) >= _MOST_CALLABLES:
                self.callables.clear()
            factory = getattr(self.channel, method.kind)
            made = self.callables[method.key] = factory(
                method.path, method.request_serializer, method.response_deserializer, method.registered
            )
        return made

    def close(self) -> None:
        """Close it, in its loop. Without a grace there is nothing to wait for, so no task is needed."""
        self.closing = True
        immediate(self.channel.close())


class SubChannel(NativeChannel):
    """The channel to one endpoint."""

    __slots__ = ("node", "unreachable")

    def __init__(self, node: Node, channel: Any) -> None:
        super().__init__(channel)
        self.node = node
        self.unreachable = False
        """Whether the last attempt found no connection."""

    def state(self, *, connect: bool = False) -> grpc.ChannelConnectivity:
        """What grpc says of the connection; ``connect``: have it made if there is none."""
        state: grpc.ChannelConnectivity = self.channel.get_state(connect)
        return state


class LoopChannels:
    """The sub-channels and active calls of one channel in one loop."""

    __slots__ = ("__weakref__", "_guard", "_make", "_resources", "active", "find", "front", "kept", "loop",
                 "subchannels", "wants_connection")  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, cluster: Cluster, make: Callable[[Node], Any]) -> None:
        self.loop = loop
        self.active: dict[int, weakref.ref[MeshCall]] = {}
        """Calls that have not ended, by id: what ``close`` has to cancel. Weak, so that a stream that its user has
        dropped can be told."""
        self.kept: set[MeshCall] = set()
        """Those among them that live until they end, though their user may have dropped them: somebody is to be told
        of the end."""
        self.front: NativeChannel | None = None
        """The native channel that runs the user's interceptors; made by the first call that needs one."""
        self.subchannels: set[SubChannel] = set()
        self.wants_connection = False
        """A connection was asked for before the registry had answered: the next look at the state makes one."""
        self._make = make
        self._guard: LoopGuard | None = None
        # Kept after fork: finalising a native channel of the parent in the child may hang.
        self._resources = EndpointResources(cluster, self._open, self._end, keep_after_fork=True)
        self.find: Callable[[Node], SubChannel] = self._resources.get
        """``get``, for who looks himself whether the sub-channel is ``unreachable``."""

    def end_with_loop(self, end: Callable[[], None]) -> None:
        """Have ``end`` called before the loop is closed, for a channel that outlives its loops.

        Otherwise the connections would stay until the channel is used in another loop, and grpc.aio would keep its
        poller thread, which the child of a fork does not have.
        """
        if running_loop() is self.loop:
            self._guard = LoopGuard(end)

    def get(self, node: Node) -> SubChannel:
        """The sub-channel to an endpoint; a lease on it must be held. RuntimeError after ``close``."""
        subchannel = self._resources.get(node)
        return self.reconsidered(subchannel) if subchannel.unreachable else subchannel

    def forget(self, node: Node) -> None:
        """Close the sub-channel to an endpoint; the next call makes a new one."""
        self._resources.endpoint_removed(node)

    def reconsidered(self, subchannel: SubChannel) -> SubChannel:
        """The same sub-channel, or for a breaker's probe a new one.

        A sub-channel whose connection failed waits before it connects again, and fails calls at once meanwhile. A
        probe would only ask about that waiting; a new sub-channel asks the endpoint.
        """
        node = subchannel.node
        if node.standing is Standing.HALF_OPEN and subchannel.state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            self.forget(node)
            return self._resources.get(node)
        return subchannel

    def _open(self, node: Node) -> SubChannel:
        subchannel = SubChannel(node, self._make(node))
        self.subchannels.add(subchannel)
        return subchannel

    def _end(self, subchannel: SubChannel) -> None:
        """Close a sub-channel, from whatever thread: at once in its own loop, else as soon as that loop comes to it."""
        self.subchannels.discard(subchannel)
        if running_loop() is self.loop:
            subchannel.close()
            return
        try:
            self.loop.call_soon_threadsafe(subchannel.close)
        except RuntimeError:
            subchannel.closing = True  # the loop is closed: dropping the last reference ends the connection

    async def close(self, grace: float | None) -> None:
        """End the calls, after at most ``grace`` seconds, and the sub-channels. Runs in its own loop."""
        calls = [call for ref in list(self.active.values()) if (call := ref()) is not None]
        if grace:
            deadline = self.loop.time() + grace
            if calls:
                await asyncio.wait([self.loop.create_task(call.ended()) for call in calls], timeout=grace)
            if self.front is not None:  # what interceptors do after their calls
                await self.front.channel.close(max(0.0, deadline - self.loop.time()))
        self.end()

    def end(self) -> None:
        """Cancel the calls, and close everything. Runs in its own loop."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.release()
        for ref in list(self.active.values()):
            if (call := ref()) is not None:
                call.cancel()
        if self.front is not None:
            self.front.close()
        self.discard()

    def close_soon(self, grace: float | None, closed: Signal) -> None:
        """Start ``close``, and set the signal when it is done. Runs in its own loop."""
        task = self.loop.create_task(self.close(grace))
        task.add_done_callback(lambda _: closed.set())

    def discard(self) -> None:
        """Close the sub-channels, from whatever thread and whether or not the loop still runs."""
        self._resources.close()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
