"""Which service a name means, and how that service is configured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshlb.config import ServiceConfig
from meshlb.discovery.base import ServiceQuery
from meshlb.errors import ConfigError
from meshlb.names import ServiceName, is_ip, normalise, parse_consul_name

if TYPE_CHECKING:
    from meshlb.discovery.base import Discovery


class Directory:
    """A mesh's services by name. Immutable.

    ``defaults``: the configuration of every service that ``services`` does not name. ``domain``: the DNS domain under
    which a host name like ``orders.service.consul`` means a service. Raises ConfigError naming the argument of Mesh.
    """

    __slots__ = ("_discovery", "_services", "defaults", "domain")

    def __init__(self, discovery: Discovery, defaults: object, services: object, domain: object) -> None:
        self._discovery = discovery
        self.defaults = ServiceConfig() if defaults is None else _require_config("defaults", defaults)
        if not isinstance(domain, str) or not domain.strip(". "):
            raise ConfigError(f"Mesh.consul_domain: {domain!r} is not a domain name")
        self.domain = domain.strip(". ").lower()
        self._services = self._read({} if services is None else services)

    def query(
        self, name: str, tag: str | None = None, datacenter: str | None = None, filter: str | None = None
    ) -> ServiceQuery:
        """What to ask the registry for a name in it, or a Consul DNS name. Raises ConfigError for what is neither."""
        meant = self._meant_by(normalise(name))
        tag, datacenter = tag or meant.tag, datacenter or meant.datacenter
        return ServiceQuery(
            meant.service, tag, datacenter, filter or self._config(meant.service, tag, datacenter).filter
        )

    def config_of(self, query: ServiceQuery) -> ServiceConfig:
        """The settings of a service: those of its tag and datacenter if it has any, its own, or the defaults."""
        return self._config(query.service, query.tag, query.datacenter)

    def is_service(self, host: str) -> bool:
        """Whether a lower-case host, without the root's dot, is a service, or a name that only a service has."""
        if not host:
            return False
        if ServiceName(host) in self._services or self._discovery.knows(host):
            return True
        if host == "localhost" or is_ip(host):
            return False
        return "." not in host or host.endswith(f".{self.domain}")

    def _config(self, service: str, tag: str | None, datacenter: str | None) -> ServiceConfig:
        for name in (
            ServiceName(service, tag, datacenter),
            ServiceName(service, tag),
            ServiceName(service, None, datacenter),
            ServiceName(service),
        ):
            if (config := self._services.get(name)) is not None:
                return config
        return self.defaults

    def _meant_by(self, name: str) -> ServiceName:
        if not self._discovery.knows(name) and (meant := parse_consul_name(name, self.domain)) is not None:
            return meant
        return ServiceName(name)

    def _read(self, services: object) -> dict[ServiceName, ServiceConfig]:
        if not isinstance(services, Mapping):
            raise ConfigError(f"Mesh.services: {services!r} is not a mapping of service name to ServiceConfig")
        read: dict[ServiceName, ServiceConfig] = {}
        for name, config in services.items():
            meant = self._meant_by(normalise(name))
            if meant in read:
                raise ConfigError(f"Mesh.services[{name!r}]: this service is configured twice (case does not matter)")
            read[meant] = _require_config(f"services[{name!r}]", config)
        return read


def _require_config(name: str, config: object) -> ServiceConfig:
    if not isinstance(config, ServiceConfig):
        raise ConfigError(f"Mesh.{name}: {config!r} is not a ServiceConfig")
    return config
