"""Where instances come from: Consul, a static list, or anything that speaks the ``Discovery`` protocol."""

from __future__ import annotations

from meshlb.discovery.base import Discovery, ServiceQuery, Sink
from meshlb.discovery.consul import ConsulDiscovery
from meshlb.discovery.static import StaticDiscovery

__all__ = ["ConsulDiscovery", "Discovery", "ServiceQuery", "Sink", "StaticDiscovery"]
