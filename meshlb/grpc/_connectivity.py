"""The state of a mesh channel as one ``grpc.ChannelConnectivity``, for ``subscribe`` and ``channel_ready_future``.

READY means that one endpoint is really connected. While somebody is subscribed, one sub-channel is watched (a
subscription to a native channel is a thread that polls five times a second, so never more than one); when it fails,
another endpoint is connected and watched instead. Without subscribers nothing is watched.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.errors import MeshError

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.grpc._subchannel import SubChannel
    from meshlb.mesh import Mesh
    from meshlb.node import Node

logger = logging.getLogger("meshlb.grpc")

State = grpc.ChannelConnectivity
StateCallback = Callable[[grpc.ChannelConnectivity], None]

_ROUND: Final = 0.5
"""Seconds between two rounds through all endpoints while none can be connected."""


class _Watch:
    """A subscription to one sub-channel."""

    def __init__(self, node: Node, sub: SubChannel, report: Callable[[_Watch, Any], None], *, connect: bool) -> None:
        self.node = node
        self.sub = sub
        self._callback = functools.partial(report, self)
        sub.channel.subscribe(self._callback, try_to_connect=connect)

    def end(self) -> None:
        self.sub.channel.unsubscribe(self._callback)


class Connectivity:
    """The aggregate state. Changes are made on the control loop alone; subscribers hear of them on a thread of their
    own, as with gRPC. ``get`` makes or finds an endpoint's sub-channel."""

    get: Callable[[Node], SubChannel]

    def __init__(self, mesh: Mesh, cluster: Cluster) -> None:
        self._mesh = mesh
        self._cluster = cluster
        self._lock = threading.Lock()
        self._subscribers: list[tuple[StateCallback, list[Any]]] = []
        self._delivering = False
        self._state: Any = State.IDLE
        self._wanted = False
        self._watch: _Watch | None = None
        self._tried: set[Node] = set()
        self._waiting = False

    # -- from any thread ---------------------------------------------------------------------------------------

    def subscribe(self, callback: StateCallback, *, connect: bool) -> None:
        """Call back with the state, now and at every change."""
        with self._lock:
            self._subscribers.append((callback, [None]))
        self._deliver()
        change = self._want if connect else self._observe
        if not self._mesh.call_soon(change):
            try:  # the child of a fork: there is no control loop before the first use of a service
                self._cluster.wait_ready(0)
            except MeshError:
                pass
            self._mesh.call_soon(change)

    def unsubscribe(self, callback: StateCallback) -> None:
        """Call back no more; unknown callbacks are ignored."""
        with self._lock:
            for at, (known, _) in enumerate(self._subscribers):
                if known == callback:
                    del self._subscribers[at]
                    break
            last = not self._subscribers
        if last:
            self._mesh.call_soon(self._rest)

    def sub_channel_made(self, node: Node, sub: SubChannel) -> None:
        """A call has connected to an endpoint, which is news if somebody is subscribed."""
        if self._subscribers and self._watch is None:
            self._mesh.call_soon(self._follow, node, sub)

    def sub_channel_closed(self, sub: SubChannel) -> None:
        """A closed native channel does not tell its subscribers."""
        watch = self._watch
        if watch is not None and watch.sub is sub:
            self._mesh.call_soon(self._lost, watch)

    def close(self) -> None:
        """Forget the subscribers."""
        with self._lock:
            self._subscribers.clear()
        self._mesh.call_soon(self._rest)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._delivering = self._waiting = False
        self._watch = None
        self._state = State.IDLE

    # -- on the control loop -----------------------------------------------------------------------------------

    def _want(self) -> None:
        self._wanted = True
        self._connect()

    def _observe(self) -> None:
        """Nothing to do before a call connects: who only observes does not connect."""

    def _follow(self, node: Node, sub: SubChannel) -> None:
        if self._watch is None and self._subscribers and not sub.closed:
            self._watch = _Watch(node, sub, self._report, connect=False)

    def _connect(self) -> None:
        """Try to connect to an endpoint that has not been tried in this round."""
        if self._watch is not None or not self._wanted or not self._subscribers or self._cluster.closed:
            return
        nodes = self._cluster.view.nodes
        untried = [node for node in nodes if node not in self._tried]
        if not untried:
            # Before the registry's first answer there is still hope; after it, and after a round, there is none.
            unknown = not nodes and self._cluster.age is None
            self._change(State.CONNECTING if unknown else State.TRANSIENT_FAILURE)
            self._tried.clear()
            if not self._waiting:
                self._waiting = True
                self._mesh.call_later(_ROUND / 10 if unknown else _ROUND, self._next_round)
            return
        node = random.choice(untried)
        self._tried.add(node)
        try:
            sub = self.get(node)
        except RuntimeError:
            return  # the channel has been closed
        if self._watch is None:  # making it may have come back here by way of sub_channel_made
            self._change(State.CONNECTING)
            self._watch = _Watch(node, sub, self._report, connect=True)

    def _next_round(self) -> None:
        self._waiting = False
        self._connect()

    def _report(self, watch: _Watch, state: Any) -> None:
        """Called by gRPC, on a thread of its own."""
        self._mesh.call_soon(self._changed, watch, state)

    def _changed(self, watch: _Watch, state: Any) -> None:
        if watch is not self._watch:
            return
        if state is State.READY:
            self._wanted = False
            self._tried.clear()
            self._change(state)
        elif state is State.TRANSIENT_FAILURE:
            self._elsewhere()
        elif state is State.CONNECTING:
            self._change(state)
        elif state is State.IDLE and self._state is State.READY:
            self._change(state)  # the connection is gone
            self._elsewhere()

    def _elsewhere(self) -> None:
        self._end_watch()
        self._wanted = True
        self._connect()

    def _lost(self, watch: _Watch) -> None:
        if watch is self._watch:
            self._watch = None
            self._change(State.IDLE)
            self._want()

    def _rest(self) -> None:
        if not self._subscribers:
            self._end_watch()
            self._wanted = False
            self._tried.clear()
            self._state = State.IDLE

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()

    def _change(self, state: Any) -> None:
        self._state = state
        self._deliver()

    # -- delivery ----------------------------------------------------------------------------------------------

    def _due(self) -> list[StateCallback]:
        due = []
        for callback, told in self._subscribers:
            if told[0] is not self._state:
                told[0] = self._state
                due.append(callback)
        return due

    def _deliver(self) -> None:
        with self._lock:
            if self._delivering or all(told[0] is self._state for _, told in self._subscribers):
                return
            self._delivering = True
        threading.Thread(target=self._deliver_all, name="meshlb-grpc-connectivity", daemon=True).start()

    def _deliver_all(self) -> None:
        while True:
            with self._lock:
                due, state = self._due(), self._state
                if not due:
                    self._delivering = False
                    return
            for callback in due:
                try:
                    callback(state)
                except Exception:
                    logger.exception("%s: a connectivity callback failed", self._cluster.query)
