"""The channel options of a sub-channel: what makes one pinned connection behave under a balancer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from meshlb.errors import ConfigError

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.model import Endpoint

Options = tuple[tuple[str, Any], ...]

_AUTHORITY: Final = "grpc.default_authority"
_TLS_NAME: Final = "grpc.ssl_target_name_override"

_FIXED: Final[Options] = (
    # Two meshes, or a sub-channel that was dropped and made again, must not share a connection and its back-off
    # behind our back: closing one has to close it, making one has to connect.
    ("grpc.use_local_subchannel_pool", 1),
    # With http_proxy set, gRPC sends even a connection to 127.0.0.1 through the proxy. An instance is reached directly.
    ("grpc.enable_http_proxy", 0),
    # A resolver's service config could bring a retryPolicy; retries are made here, and would multiply.
    ("grpc.service_config_disable_resolution", 1),
    # Not set: grpc.enable_retries. Its default (1) is what hides a server's GOAWAY (max_connection_age, drain); with 0
    # calls fail. Without a retryPolicy it makes no other retries.
    # Not set: keepalive. A server with default settings answers pings on a quiet connection with GOAWAY "Too many
    # pings"; who has configured both sides sets it in the channel's options.
)

_FIRST_BACKOFF_MS: Final = 100
"""A restarting instance is back within seconds, so the second attempt to connect comes soon. gRPC's own 1 s is for a
channel that has nobody else to turn to."""


def subchannel_options(
    user_options: Iterable[tuple[str, Any]] | None, config: ServiceConfig, authority: str
) -> Options:
    """The options of one sub-channel: the caller's own, and ours where he says nothing.

    ``authority``: the logical service. It becomes ``:authority``, and the name that a TLS certificate is verified
    for, instead of the instance's IP address.

    Raises ConfigError if the options are not pairs of a name and a value.
    """
    own = checked(user_options)
    named = {name for name, _ in own}
    connect_ms = max(1, round(config.connect_timeout * 1000))
    defaults = (
        *_FIXED,
        # gRPC gives an attempt to connect max(min_reconnect_backoff, current back-off); its default of 20 s lets a host
        # that swallows packets eat a call's whole deadline.
        ("grpc.min_reconnect_backoff_ms", connect_ms),
        ("grpc.initial_reconnect_backoff_ms", min(_FIRST_BACKOFF_MS, connect_ms)),
        # So the back-off may not outgrow connect_timeout either. It is the breaker that keeps calls from a dead
        # endpoint; one that comes back is connected again within this time, not within gRPC's 2 minutes.
        ("grpc.max_reconnect_backoff_ms", connect_ms),
        # A bare list of addresses ("static:///a:1,b:2") has no name: each instance is called by its own address then.
        # And with another TLS name gRPC itself calls an instance by that; it refuses a call by a name that differs.
        *(() if "," in authority or _TLS_NAME in named else ((_AUTHORITY, authority),)),
    )
    return (*(option for option in defaults if option[0] not in named), *own)


def subchannel_target(endpoint: Endpoint) -> str:
    """The gRPC target of one instance. An IP address goes past the resolvers."""
    if not endpoint.is_ip:
        return f"dns:///{endpoint.address}"
    return f"{'ipv6' if ':' in endpoint.host else 'ipv4'}:{endpoint.address}"


def checked(options: Iterable[tuple[str, Any]] | None) -> Options:
    """The caller's options as pairs. Raises ConfigError."""
    try:
        # gRPC takes names as bytes, too.
        pairs = tuple((name.decode() if isinstance(name, bytes) else name, value) for name, value in options or ())
    except (TypeError, ValueError):
        raise ConfigError(f"options: {options!r} is not a sequence of (name, value) pairs") from None
    for name, _ in pairs:
        if not isinstance(name, str):
            raise ConfigError(f"options: {name!r} is not the name of a channel option")
    return pairs
