"""Explicit probes over gRPC, for channels of both kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc

from meshlb.balancing.orca import report_among
from meshlb.grpc._subchannel import SubChannel, opener
from meshlb.resources import EndpointResources

if TYPE_CHECKING:
    from meshlb.balancing.probes import Probes
    from meshlb.cluster import Cluster
    from meshlb.node import Node
    from meshlb.probing import Answered

_ANSWERS: Final = frozenset({grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND})
"""What a server that is well may say to a probe. One that does not know the method may report all the same; one that
fails, or has too much to do, must not look idle."""


class RPCProber:
    """Calls ``Probes.method`` with an empty request, and reads the report among the trailers.

    ``sub_channel(node)`` gives an endpoint's native channel, of ``grpc`` (not ``grpc.aio``, whose channels belong to
    their event loop). A blocking channel lends those of its calls, so nothing further is connected.
    """

    def __init__(self, sub_channel: Callable[[Node], SubChannel]) -> None:
        self._sub_channel = sub_channel
        self.closed = False

    def probe(self, node: Node, probes: Probes, answered: Answered) -> None:
        """Prober."""
        method = self._sub_channel(node).channel.unary_unary(probes.method, None, None)
        call = method.future(b"", timeout=probes.timeout)
        call.add_done_callback(partial(_ended, answered))

    def close(self) -> None:
        """Make no more probes. The sub-channels are the channel's."""
        self.closed = True


class OwnChannelsProber(RPCProber):
    """Probes for a channel of ``grpc.aio``, over connections of their own with the same credentials and options."""

    def __init__(
        self,
        cluster: Cluster,
        credentials: grpc.ChannelCredentials | None,
        options: Any,
        compression: grpc.Compression | None,
    ) -> None:
        self._resources = EndpointResources(
            cluster,
            opener(cluster, credentials, options, compression, None),
            SubChannel.close,
            keep_after_fork=True,  # dropping an inherited native channel in the child of a fork may hang
        )
        super().__init__(self._resources.get)

    def close(self) -> None:
        """Make no more probes, and disconnect. Idempotent."""
        super().close()
        self._resources.close()


def _ended(answered: Answered, call: Any) -> None:
    answered(report_among(call.trailing_metadata()) if call.code() in _ANSWERS else None)
