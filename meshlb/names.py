"""Consul DNS names: ``[tag.]<service>.service[.<datacenter>[.dc]].<domain>``."""

from __future__ import annotations

from typing import NamedTuple

from meshlb.errors import ConfigError


class ConsulName(NamedTuple):
    """What a Consul DNS name says."""

    service: str
    tag: str | None
    datacenter: str | None


def parse_consul_name(name: str, domain: str) -> ConsulName | None:
    """Read a lower-case Consul DNS name; None if ``name`` is not under ``domain``.

    Raises ConfigError for a name under the domain that is not a service's (``web.node.consul``).
    """
    if not name.endswith(f".{domain}"):
        return None
    labels = name.removesuffix(f".{domain}").split(".")
    datacenter = None
    if len(labels) > 3 and labels[-1] == "dc" and labels[-3] == "service":
        datacenter = labels[-2]
        del labels[-2:]
    elif len(labels) > 2 and labels[-1] != "service" and labels[-2] == "service":
        datacenter = labels.pop()
    if len(labels) < 2 or labels[-1] != "service" or not all(labels):
        raise ConfigError(
            f"host {name!r} is not a service in Consul's form '[tag.]name.service[.datacenter].{domain}'"
        )
    return ConsulName(labels[-2], ".".join(labels[:-2]) or None, datacenter)
