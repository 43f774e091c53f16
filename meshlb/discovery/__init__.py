"""Where instances come from: Consul, a static list, or anything that speaks the ``Discovery`` protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshlb.discovery.base import Discovery, ServiceQuery, Sink

if TYPE_CHECKING:
    from meshlb.discovery.consul import ConsulDiscovery
    from meshlb.discovery.static import StaticDiscovery

__all__ = ["ConsulDiscovery", "Discovery", "ServiceQuery", "Sink", "StaticDiscovery"]


def __getattr__(name: str) -> Any:
    # A program uses one of them; the other's import would be for nothing.
    if name == "ConsulDiscovery":
        from meshlb.discovery.consul import ConsulDiscovery

        return ConsulDiscovery
    if name == "StaticDiscovery":
        from meshlb.discovery.static import StaticDiscovery

        return StaticDiscovery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
