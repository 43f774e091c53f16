"""A fixed list of instances: for tests, for a first try, and for services that no registry knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from meshlb.discovery.base import ServiceQuery, Sink
from meshlb.errors import ConfigError
from meshlb.model import Endpoint


class StaticDiscovery:
    """Instances given in code or in a file.

    ``services`` maps a service name (case does not matter, as in DNS) to its instances: ``Endpoint`` objects or
    ``"host:port"`` strings, in any mix. ``update`` changes a service at run time.

    Raises ConfigError, naming the service, for an address that cannot be read.
    """

    def __init__(self, services: Mapping[str, Iterable[str | Endpoint]]) -> None:
        if not isinstance(services, Mapping):
            raise ConfigError(
                f"StaticDiscovery.services: {services!r} is not a mapping of service name to a list of addresses"
            )
        self._services = {name.lower(): _parse(name, addresses) for name, addresses in services.items()}
        self._sinks: dict[str, list[tuple[ServiceQuery, Sink]]] = {}

    def update(self, service: str, addresses: Iterable[str | Endpoint]) -> None:
        """Replace the instances of a service; calls that start after this returns may already see them.

        Safe from any thread. Raises ConfigError as the constructor does, and then changes nothing.
        """
        self._services[service.lower()] = _parse(service, addresses)
        for query, sink in tuple(self._sinks.get(service.lower(), ())):
            sink.update(self._select(query))

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        """Report once; later reports come from ``update``."""
        self._sinks.setdefault(query.service.lower(), []).append((query, sink))
        sink.update(self._select(query))

    async def aclose(self) -> None:
        """Forget who was watching."""
        self._sinks.clear()

    def knows(self, service: str) -> bool:
        return service.lower() in self._services

    def __repr__(self) -> str:
        return f"StaticDiscovery({', '.join(sorted(self._services)) or 'no services'})"

    def _select(self, query: ServiceQuery) -> Sequence[Endpoint]:
        return tuple(
            endpoint
            for endpoint in self._services.get(query.service.lower(), ())
            if (query.tag is None or query.tag in endpoint.tags)
            and (query.datacenter is None or query.datacenter == endpoint.datacenter)
        )


def _parse(service: str, addresses: Iterable[str | Endpoint]) -> tuple[Endpoint, ...]:
    if isinstance(addresses, str | Endpoint):
        raise ConfigError(f"StaticDiscovery: service {service!r} needs a list of addresses, not {addresses!r} alone")
    try:
        found = [entry if isinstance(entry, Endpoint) else Endpoint.parse(entry) for entry in addresses]
    except ConfigError as error:
        raise ConfigError(f"StaticDiscovery: service {service!r}: {error}") from None
    return tuple({endpoint.identity: endpoint for endpoint in found}.values())
