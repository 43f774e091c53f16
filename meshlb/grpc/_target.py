"""Which targets are a service of the mesh, and which are gRPC's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from meshlb.default import default_mesh
from meshlb.errors import ConfigError
from meshlb.sources import Source

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.mesh import Mesh

_GRPC_SCHEMES: Final = frozenset(
    {"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds", "google-c2p", "passthrough"}
)
"""The resolvers that gRPC has."""

_CONSUL: Final = ("dc", "filter", "policy", "tag")
_AGENT: Final = ("consistency", "namespace", "partition", "scheme", "tagged_address")
"""How a Consul that the target names is asked; for the mesh's own, that is ConsulDiscovery's business. No token:
targets are logged."""
_STATIC: Final = ("policy",)

_FORM: Final = (
    "'consul:///service?dc=...&tag=...', 'consul://agent:8500/service', 'static:///host:port,host:port', "
    "the bare name of a service, or a target of gRPC's own"
)


def parse(target: str, mesh: Mesh | None = None) -> Cluster | None:
    """The service that a target names, or None if the target is for gRPC itself.

    * ``consul:///orders``: a service in the mesh's discovery. Query parameters: ``dc``, ``tag`` and ``filter``
      (Consul's meaning), and ``policy``, the name of a policy other than the configured one.
    * ``consul://agent:8500/orders``: the same, asked of another Consul. Besides, ``consistency``, ``namespace``,
      ``partition``, ``scheme`` (http or https) and ``tagged_address``, as ``ConsulDiscovery`` has them; what else it
      takes (the token, TLS) comes from the CONSUL_* environment variables.
    * ``static:///a:1,b:2``, or ``static://orders/a:1,b:2`` for a list that has a service's configuration; ``policy``.
    * a bare name that the mesh takes for a service (``Mesh.find``).

    ``host:port``, IP addresses and gRPC's schemes (``dns:``, ``ipv4:``, ``unix:``...) are for gRPC. ``mesh``: None
    means the process's default one, which is only made if the target is a service.

    Raises ConfigError for a target that is neither, MeshClosed if the mesh is closed.
    """
    if isinstance(target, bytes):
        target = target.decode("utf-8", "replace")  # gRPC takes both
    if not isinstance(target, str) or not target.strip():
        raise ConfigError(f"target {target!r}: expected {_FORM}")
    scheme, separator, rest = target.partition(":")
    if not separator:
        # "/" or "." only: a path or a dotted name, which the mesh knows best.
        return None if "/" in target else (mesh or default_mesh()).find(target)
    match scheme.lower():
        case _ if rest.isdigit():
            return None  # host:port; "consul" and "static" are host names, too
        case "consul":
            return _consul(target, _split(target), mesh)
        case "static":
            return _static(target, _split(target), mesh)
        case other if rest.startswith("//") and other not in _GRPC_SCHEMES:
            raise ConfigError(f"target {target!r}: unknown scheme {scheme!r}; expected {_FORM}")
    return None


def _split(target: str) -> SplitResult:
    try:
        parts = urlsplit(target)
    except ValueError as error:
        raise ConfigError(f"target {target!r}: {error}; expected {_FORM}") from None
    if parts.fragment:
        raise ConfigError(f"target {target!r}: a '#' cannot be part of it; expected {_FORM}")
    return parts


def _consul(target: str, parts: SplitResult, mesh: Mesh | None) -> Cluster:
    service = unquote(parts.path.strip("/"))
    if not service or "/" in service:
        raise ConfigError(f"target {target!r} does not name a service; expected {_FORM}")
    known = (*_CONSUL, *_AGENT) if parts.netloc else _CONSUL
    parameters = _parameters(target, parts.query, known)
    mesh = mesh or default_mesh()
    source = _agent(target, parts.netloc, parameters, mesh) if parts.netloc else None
    return _cluster(target, mesh, service, parameters, source)


def _agent(target: str, address: str, parameters: dict[str, str], mesh: Mesh) -> Source | None:
    """The Consul that the target names; None if that is the one that the mesh asks anyway."""
    from meshlb.discovery.consul import ConsulDiscovery  # not before a target needs it

    given = {name: parameters[name] for name in _AGENT if name in parameters}
    try:
        discovery = ConsulDiscovery(unquote(address), **given)  # type: ignore[arg-type]  # these are all texts
    except ConfigError as error:
        raise ConfigError(f"target {target!r}: {error}") from None
    if isinstance(mesh.discovery, ConsulDiscovery) and mesh.discovery.settings == discovery.settings:
        return None
    settings = discovery.settings
    details = [f"{name}={given[name]}" for name in _AGENT if name in given and name != "scheme"]
    return Source("?".join(filter(None, (str(settings.address), "&".join(details)))), discovery)


def _static(target: str, parts: SplitResult, mesh: Mesh | None) -> Cluster:
    from meshlb.discovery.static import StaticDiscovery

    listed = unquote(parts.path.strip("/"))
    if not listed:
        raise ConfigError(f"target {target!r} has no addresses; expected {_FORM}")
    parameters = _parameters(target, parts.query, _STATIC)
    service = unquote(parts.netloc) or listed
    try:
        discovery = StaticDiscovery({service: listed.split(",")})
    except ConfigError as error:
        raise ConfigError(f"target {target!r}: {error}") from None
    return _cluster(target, mesh or default_mesh(), service, parameters, Source(f"static:{listed}", discovery))


def _cluster(target: str, mesh: Mesh, service: str, parameters: dict[str, str], source: Source | None) -> Cluster:
    try:
        return mesh.cluster(
            service,
            tag=parameters.get("tag"),
            datacenter=parameters.get("dc"),
            filter=parameters.get("filter"),
            policy=parameters.get("policy"),
            source=source,
        )
    except ConfigError as error:
        raise ConfigError(f"target {target!r}: {error}") from None


def _parameters(target: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"target {target!r}: {error}") from None
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            if name in _AGENT:
                raise ConfigError(
                    f"target {target!r}: {name!r} is a setting of the mesh's own discovery "
                    f"(ConsulDiscovery({name}=...)), or of a Consul that the target names (consul://agent:8500/...)"
                )
            raise ConfigError(f"target {target!r}: unknown parameter {name!r}; known: {', '.join(known)}")
        if name in parameters or not value:
            raise ConfigError(f"target {target!r}: parameter {name!r} needs exactly one value")
        parameters[name] = value
    return parameters
