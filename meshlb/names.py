"""How services are named: Consul DNS names, and hosts that are none."""

from __future__ import annotations

from typing import NamedTuple

from meshlb.errors import ConfigError


class ServiceName(NamedTuple):
    """A service, or the part of it that carries a tag or is in a datacenter."""

    service: str
    tag: str | None = None
    datacenter: str | None = None


def normalise(name: object) -> str:
    """A service or host name as it is compared: lower case, without the root's dot.

    Raises ConfigError for what cannot be one.
    """
    if not isinstance(name, str):
        raise ConfigError(f"service {name!r} is not a service name (a string)")
    plain = name.lower().rstrip(".")
    if not plain or not plain.isprintable() or any(character in " /?#@" for character in plain):
        raise ConfigError(f"service {name!r} is not a service name")
    return plain


def parse_consul_name(name: str, domain: str) -> ServiceName | None:
    """Read a lower-case Consul DNS name; None if ``name`` is not under ``domain``.

    ``[tag.]<service>.service[.<datacenter>[.dc]].<domain>``, or RFC 2782's ``_<service>._<tag>[.service][...]``, where
    the tag ``_tcp`` means none.

    Raises ConfigError for a name under the domain that is not a service's (``web.node.consul``).
    """
    if not name.endswith(f".{domain}"):
        return None
    labels = name.removesuffix(f".{domain}").split(".")
    srv = len(labels) > 1 and labels[0].startswith("_") and labels[1].startswith("_")
    if srv and "service" not in labels[2:3]:
        labels.insert(2, "service")
    datacenter = None
    if len(labels) > 3 and labels[-1] == "dc" and labels[-3] == "service":
        datacenter = labels[-2]
        del labels[-2:]
    elif len(labels) > 2 and labels[-1] != "service" and labels[-2] == "service":
        datacenter = labels.pop()
    if len(labels) < 2 or labels[-1] != "service" or not all(labels):
        raise ConfigError(f"host {name!r} is not a service in Consul's form '[tag.]name.service[.datacenter].{domain}'")
    if srv:
        service, tag = labels[0][1:], labels[1][1:]
        return ServiceName(service, None if tag == "tcp" else tag, datacenter)
    return ServiceName(labels[-2], ".".join(labels[:-2]) or None, datacenter)


def is_ip(host: str) -> bool:
    """Whether a host is a literal IP address, with or without brackets and zone."""
    import ipaddress  # not at the top: `import meshlb` must stay cheap

    try:
        ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True
