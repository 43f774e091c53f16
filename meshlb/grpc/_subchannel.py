"""One endpoint's native channel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from meshlb.grpc._options import Options, subchannel_options, subchannel_target

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.node import Node


class SubChannel:
    """The connection to one endpoint, and what its last failure to connect leaves to remember."""

    __slots__ = ("__weakref__", "channel", "closed", "on_close", "unreachable")

    def __init__(self, channel: grpc.Channel, on_close: Callable[[SubChannel], object] | None = None) -> None:
        self.channel = channel
        self.closed = False
        """Or about to be, if no call is found to use it."""
        self.on_close = on_close
        self.unreachable = False
        """An attempt to connect has failed, so gRPC may be waiting for its back-off to end."""

    def withhold(self, withheld: bool) -> None:
        """Keep calls from it that have not begun, while it is looked whether it can be closed."""
        self.closed = withheld

    def close(self) -> None:
        """Cancel its calls and disconnect. gRPC has no grace here: the owner waits until it is idle."""
        self.closed = True
        self.channel.close()
        if self.on_close is not None:
            self.on_close(self)


def opener(
    cluster: Cluster,
    credentials: grpc.ChannelCredentials | None,
    options: Any,
    compression: grpc.Compression | None,
    on_close: Callable[[SubChannel], object] | None,
) -> Callable[[Node], SubChannel]:
    """A function that makes the sub-channel of an endpoint. It holds on to no channel of ours.

    Raises ConfigError for wrong options, and whatever ``grpc.secure_channel`` raises for wrong credentials.
    """
    settled: Options = subchannel_options(options, cluster.config, cluster.service)

    # An instrumentation replaces grpc.insecure_channel by a wrapper whose channels return bare generators for streams
    # and make a span for every attempt, as meshlb itself does. The wrapper says what it wraps.
    if credentials is None:
        make_insecure = inspect.unwrap(grpc.insecure_channel)

        def make(node: Node) -> SubChannel:
            channel = make_insecure(subchannel_target(node.endpoint), settled, compression)
            return SubChannel(channel, on_close)

        return make

    make_secure = inspect.unwrap(grpc.secure_channel)
    own = credentials
    _require_real(own)

    def make_with_credentials(node: Node) -> SubChannel:
        return SubChannel(make_secure(subchannel_target(node.endpoint), own, settled, compression), on_close)

    return make_with_credentials


def _require_real(credentials: Any) -> None:
    """Fail where ``grpc.secure_channel`` would, and with its error, instead of at the first call."""
    inspect.unwrap(grpc.secure_channel)("ipv4:127.0.0.1:1", credentials).close()
