"""A fixed list of instances: for tests, for a first try, and for services that no registry knows."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from meshlb import control
from meshlb.discovery.base import ServiceQuery, Sink
from meshlb.errors import ConfigError, DiscoveryError
from meshlb.model import Endpoint
from meshlb.names import normalise


class StaticDiscovery:
    """Instances given in code or in a file.

    ``services`` maps a service name (case does not matter, as in DNS) to its instances: ``Endpoint`` objects or
    ``"host:port"`` strings, in any mix. ``update`` changes a service at run time. Several meshes may share one.

    Raises ConfigError, naming the service, for an address that cannot be read.
    """

    def __init__(self, services: Mapping[str, Iterable[str | Endpoint]]) -> None:
        if not isinstance(services, Mapping):
            raise ConfigError(
                f"StaticDiscovery.services: {services!r} is not a mapping of service name to a list of addresses"
            )
        self._services: dict[str, tuple[Endpoint, ...]] = {}
        for name, addresses in services.items():
            plain = normalise(name)
            if plain in self._services:
                raise ConfigError(f"StaticDiscovery: service {name!r} is given twice (case does not matter)")
            self._services[plain] = _parse(name, addresses)
        self._after_fork()
        control.on_fork(self)

    def _after_fork(self) -> None:
        # Held while a sink is told: two threads must not tell it in the wrong order.
        self._lock = threading.RLock()
        self._watches: list[tuple[ServiceQuery, Sink]] = []

    def update(self, service: str, addresses: Iterable[str | Endpoint]) -> None:
        """Replace the instances of a service; calls that start after this returns see them.

        Safe from any thread. Raises ConfigError as the constructor does, and then changes nothing.
        """
        name, endpoints = normalise(service), _parse(service, addresses)
        with self._lock:
            self._services = {**self._services, name: endpoints}
            for query, sink in tuple(self._watches):
                if query.service.lower() == name:
                    self._report(query, sink)

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        """Report the instances, and again after each ``update``.

        Returns only for a query with a filter, which a list has no language for.
        """
        import asyncio

        if query.filter is not None:
            sink.failed(DiscoveryError(f"StaticDiscovery has no filter language; take out the filter {query.filter!r}"))
            return
        watch = (query, sink)
        with self._lock:
            self._watches.append(watch)
            self._report(query, sink)
        try:
            await asyncio.get_running_loop().create_future()  # until cancelled
        finally:
            with self._lock:
                if watch in self._watches:  # not if a fork has come between
                    self._watches.remove(watch)

    async def aclose(self) -> None:
        """Nothing to release: each watch forgets its own listener when it ends."""

    def knows(self, service: str) -> bool:
        """Whether the list has a service of this name, in whatever case."""
        return service.lower() in self._services

    def after_fork_in_child(self) -> None:
        """The parent's watches do not run here; the child's meshes start their own."""
        self._after_fork()

    def __repr__(self) -> str:
        return f"StaticDiscovery({', '.join(sorted(self._services)) or 'no services'})"

    def _report(self, query: ServiceQuery, sink: Sink) -> None:
        known = self._services.get(query.service.lower())
        selected = _select(known or (), query)
        sink.update(selected)
        if known is None:
            names = ", ".join(sorted(self._services)) or "none"
            sink.failed(DiscoveryError(f"StaticDiscovery has no such service; it has: {names}"))
        elif known and not selected:
            wanted = " and ".join(f"{name} {value!r}" for name, value in _wanted(query))
            sink.failed(DiscoveryError(f"none of its {len(known)} instances has {wanted}"))


def _wanted(query: ServiceQuery) -> list[tuple[str, str]]:
    return [(name, value) for name, value in (("tag", query.tag), ("datacenter", query.datacenter)) if value]


def _select(endpoints: Sequence[Endpoint], query: ServiceQuery) -> tuple[Endpoint, ...]:
    return tuple(
        endpoint
        for endpoint in endpoints
        # Names from a host have lost their case; Consul does not mind it either.
        if (query.tag is None or query.tag.lower() in (tag.lower() for tag in endpoint.tags))
        and (query.datacenter is None or query.datacenter.lower() == endpoint.datacenter.lower())
    )


def _parse(service: str, addresses: Iterable[str | Endpoint]) -> tuple[Endpoint, ...]:
    if isinstance(addresses, str | bytes | Endpoint) or not isinstance(addresses, Iterable):
        raise ConfigError(f"StaticDiscovery: service {service!r} needs a list of addresses, not {addresses!r}")
    try:
        found = [entry if isinstance(entry, Endpoint) else Endpoint.parse(entry) for entry in addresses]
    except ConfigError as error:
        raise ConfigError(f"StaticDiscovery: service {service!r}: {error}") from None
    return tuple({endpoint.identity: endpoint for endpoint in found}.values())
