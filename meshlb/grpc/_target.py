"""Which targets are a service of the mesh, and which are gRPC's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from meshlb.balancing import resolve_policy
from meshlb.default import default_mesh
from meshlb.errors import ConfigError

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.mesh import Mesh

SCHEME: Final = "consul"

_GRPC_SCHEMES: Final = frozenset(
    {"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds", "google-c2p", "passthrough"}
)
"""The resolvers that gRPC has."""

_PARAMETERS: Final = ("dc", "filter", "policy", "tag")

_FORM: Final = "'consul:///service?dc=...&tag=...', the bare name of a service, or a target of gRPC's own"


def parse(target: str, mesh: Mesh | None = None) -> Cluster | None:
    """The service that a target names, or None if the target is for gRPC itself.

    ``consul:///orders``, with the query parameters ``dc``, ``tag`` and ``filter`` (Consul's meaning), and ``policy``,
    which must agree with the service's configuration; or a bare name that the mesh takes for a service
    (``Mesh.find``). ``host:port``, IP addresses and gRPC's schemes (``dns:``, ``ipv4:``, ``unix:``...) are for gRPC.
    ``mesh``: None means the process's default one, which is only made if the target is a service.

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
    if scheme.lower() == SCHEME:
        return _service(target, mesh)
    if rest.startswith("//") and scheme.lower() not in _GRPC_SCHEMES:
        raise ConfigError(f"target {target!r}: unknown scheme {scheme!r}; expected {_FORM}")
    return None


def _service(target: str, mesh: Mesh | None) -> Cluster:
    parts = urlsplit(target)
    if parts.netloc:
        raise ConfigError(
            f"target {target!r}: the address of Consul ({parts.netloc!r}) belongs to the mesh: "
            f"Mesh(ConsulDiscovery('http://{parts.netloc}')); the target is then 'consul:///{parts.path.strip('/')}'"
        )
    service = unquote(parts.path.strip("/"))
    if not service or "/" in service or parts.fragment:
        raise ConfigError(f"target {target!r} does not name a service; expected {_FORM}")
    parameters = _parameters(target, parts.query)
    mesh = mesh or default_mesh()
    cluster = mesh.cluster(
        service, tag=parameters.get("tag"), datacenter=parameters.get("dc"), filter=parameters.get("filter")
    )
    policy = parameters.get("policy")
    if policy is not None and resolve_policy(policy) != cluster.policy and policy != cluster.policy.name:
        # All channels of the process share one set of endpoints with one policy a service.
        raise ConfigError(
            f"target {target!r}: policy: {cluster.service!r} is configured with {cluster.policy.name!r}; "
            f"set Mesh(services={{{cluster.service!r}: ServiceConfig(policy={policy!r})}})"
        )
    return cluster


def _parameters(target: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"target {target!r}: {error}") from None
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if name not in _PARAMETERS:
            raise ConfigError(f"target {target!r}: unknown parameter {name!r}; known: {', '.join(_PARAMETERS)}")
        if name in parameters or not value:
            raise ConfigError(f"target {target!r}: parameter {name!r} needs exactly one value")
        parameters[name] = value
    return parameters
