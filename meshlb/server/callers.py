"""Whose request it is: the address that a connection comes from, or that a trusted proxy has noted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from meshlb._validate import integer
from meshlb.balancing.ip_hash import network_of
from meshlb.errors import ConfigError

DEFAULT_HEADER: Final = "x-forwarded-for"


class CallerFinder:
    """Finds the original caller of a request.

    ``trusted_proxies``: how many proxies of one's own stand in front, each of which appends to ``header`` the address
    that it was called from. That many entries from the right is the caller; whatever stands further left, the caller
    may have made up (Envoy's ``xff_num_trusted_hops``). 0: the header is not looked at, and the caller is whoever
    connects. So it is when the header has fewer entries, since then the request came by another way, and when the
    entry is no address.

    Raises ConfigError naming the setting.
    """

    __slots__ = ("header", "trusted_proxies")

    def __init__(self, trusted_proxies: int = 0, header: str = DEFAULT_HEADER) -> None:
        integer("trusted_proxies", trusted_proxies, least=0, most=100)
        if not isinstance(header, str) or not header.strip():
            raise ConfigError(f"forwarded_header: {header!r} is not a name")
        self.trusted_proxies = trusted_proxies
        self.header = header.strip().lower()

    def find(self, peer: str | None, values: Iterable[str]) -> str | None:
        """The caller's address. ``peer``: where the connection comes from; ``values``: of the header, in order."""
        if not self.trusted_proxies:
            return peer
        entries = [entry for entry in ",".join(values).split(",") if entry.strip()]
        if len(entries) < self.trusted_proxies:
            return peer
        address = _without_port(entries[-self.trusted_proxies].strip().strip('"'))
        return peer if network_of(address) is None else address


def address_of_peer(peer: str) -> str | None:
    """The IP address in what gRPC calls a peer (``ipv4:192.0.2.1:5000``, ``ipv6:%5B2001:db8::1%5D:5000``); None for
    another kind of address (``unix:``)."""
    kind, _, rest = peer.partition(":")
    return _without_port(unquote(rest)) if kind in ("ipv4", "ipv6") else None


def _without_port(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address
