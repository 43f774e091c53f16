"""The state of a mesh channel: that of its sub-channels, taken together as gRPC's round_robin does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from meshlb.model import CallContext

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.grpc.aio._loops import LoopChannels

_State = grpc.ChannelConnectivity


def state_of(cluster: Cluster, here: LoopChannels, *, connect: bool) -> grpc.ChannelConnectivity:
    """READY if one endpoint is connected, else CONNECTING if one is being connected, TRANSIENT_FAILURE if none that
    was tried can be, IDLE if none was tried.

    ``connect``: with no connection made or in the making, start one to an endpoint that was not tried yet. The state is
    that of before, as gRPC's: who waits for it to change will see the new one.
    """
    subchannels = tuple(here.subchannels)
    states = {subchannel.state() for subchannel in subchannels}
    if (connect or here.wants_connection) and _State.READY not in states:
        # An endpoint without a lease: it may be swept when idle, and is connected again by its first call.
        tried = {subchannel.node for subchannel in subchannels}
        states = {subchannel.state(connect=True) for subchannel in subchannels}
        if not states & {_State.READY, _State.CONNECTING, _State.IDLE}:
            node = cluster.view.picker.pick(CallContext(excluded=tried))
            if node is not None and node not in tried:
                here.get(node).state(connect=True)
        here.wants_connection = not here.subchannels
    for state in (_State.READY, _State.CONNECTING):
        if state in states:
            return state
    if states == {_State.TRANSIENT_FAILURE}:
        return _State.TRANSIENT_FAILURE
    if not states and cluster.age is not None and not cluster.view.nodes:
        return _State.TRANSIENT_FAILURE  # the registry knows nobody
    return _State.IDLE
