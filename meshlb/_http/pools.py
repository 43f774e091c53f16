"""The inner transports: one for each endpoint and scheme, and one for hosts that are no service.

One pool for all endpoints would be simpler, but httpcore's pool walks all its connections at every request: with 300
of them that is 33 ms a request, against 0.2 ms with a pool an endpoint.
"""

from __future__ import annotations

import functools
import ssl
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from meshlb import control
from meshlb._http.exchange import Exchange
from meshlb._http.hedged_exchange import HedgedExchange
from meshlb.default import default_mesh
from meshlb.errors import ConfigError, MeshError
from meshlb.resources import EndpointResources

if TYPE_CHECKING:
    from meshlb._http.binding import Binding
    from meshlb._http.probing import HTTPProber
    from meshlb.cluster import Cluster
    from meshlb.mesh import Mesh
    from meshlb.model import Endpoint
    from meshlb.node import Node

_SECURE: Final = frozenset({"https", "wss"})


class TransportSettings:
    """How inner transports are made. The SSLContext is built once and shared: building one takes 25 ms."""

    def __init__(
        self,
        transport_class: type[Any],
        *,
        factory: Callable[[Endpoint], Any] | None,
        create_ssl_context: Callable[..., ssl.SSLContext],
        verify: ssl.SSLContext | str | bool,
        cert: Any,
        trust_env: bool,
        **options: Any,
    ) -> None:
        if factory is not None and not callable(factory):
            raise ConfigError(f"transport_factory: {factory!r} is not a function of an Endpoint (or None)")
        self._transport_class = transport_class
        self._factory = factory
        self._create = functools.partial(create_ssl_context, verify=verify, cert=cert, trust_env=trust_env)
        self._options = options
        self._lock = threading.Lock()
        self._plain: ssl.SSLContext | None = None
        self._secure: ssl.SSLContext | None = None
        if verify is not True or cert is not None:
            self._secure = self._create()  # now, so that a wrong path fails where it was given

    def make(self, scheme: str, endpoint: Endpoint | None = None) -> Any:
        """A transport for ``scheme``; ``endpoint`` None: for hosts that are no service."""
        if self._factory is not None and endpoint is not None:
            return self._factory(endpoint)
        return self._transport_class(verify=self._context(scheme), trust_env=False, **self._options)

    def make_for_probes(self, module: Any, scheme: str) -> Any:
        """An async transport for probes: the same TLS settings and protocols, few connections."""
        from meshlb._http.probing import KEEPALIVE, MOST_CONNECTIONS

        limits = module.Limits(
            max_connections=MOST_CONNECTIONS, max_keepalive_connections=MOST_CONNECTIONS, keepalive_expiry=KEEPALIVE
        )
        options = {**self._options, "limits": limits}
        return module.AsyncHTTPTransport(verify=self._context(scheme), trust_env=False, **options)

    @property
    def own_transports(self) -> bool:
        """Whether the program makes the transports to endpoints itself."""
        return self._factory is not None

    def _context(self, scheme: str) -> ssl.SSLContext:
        with self._lock:
            if scheme in _SECURE:
                if self._secure is None:
                    self._secure = self._create()
                return self._secure
            if self._plain is None:
                # A transport wants one even if it never speaks TLS. This one trusts nobody, and costs next to nothing.
                self._plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            return self._plain

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()


class Inner:
    """One endpoint's transport. ``base``: the endpoint's URL; ``address``: its host and port."""

    __slots__ = ("address", "base", "transport")

    def __init__(self, transport: Any, base: Any, address: str) -> None:
        self.transport = transport
        self.base = base
        self.address = address


class Route:
    """Where the requests for one scheme and host go, and what the service's configuration means for each of them.

    ``server_name``: what TLS asks for and verifies. ``amends``: whether requests are told more than to whom they go.
    ``judges``: whether ``Retry.retry_on`` is to be asked about each answer; ``looks_closer``: whether anybody wants
    more of an answer than a status that says that all is well. ``idle_limit``: seconds that a response may be silent
    once it has begun; None: as the client's own timeouts say.
    """

    __slots__ = ("amends", "buffer_body", "call_soon", "cluster", "connect_timeout", "exchange_class", "idle_limit",
                 "judges", "looks_closer", "per_try_timeout", "prober", "resources", "scheme", "server_name",
                 "telemetry", "timeout")  # fmt: skip

    def __init__(
        self,
        mesh: Mesh,
        cluster: Cluster,
        scheme: str,
        server_name: str | None,
        resources: EndpointResources[Inner],
    ) -> None:
        self.cluster = cluster
        config = cluster.config
        retry = config.retry
        self.timeout = config.timeout
        self.connect_timeout = config.connect_timeout
        self.idle_limit = config.stream_idle_timeout
        self.per_try_timeout = None if retry is None else retry.per_try_timeout
        self.buffer_body = 0 if retry is None else retry.buffer_body
        self.judges = retry is not None and retry.retry_on is not None
        self.looks_closer = self.judges or cluster.wants_reports
        self.amends = server_name is not None or cluster.cookies is not None or cluster.wants_reports
        self.exchange_class = Exchange if retry is None or retry.hedge is None else HedgedExchange
        self.scheme = scheme
        self.server_name = server_name
        self.resources = resources
        self.telemetry = mesh.telemetry
        self.call_soon = mesh.call_soon
        self.prober: HTTPProber | None = None

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self.resources.close()
        if self.prober is not None:
            self.prober.close()


class Pools:
    """The inner transports of one outer transport; of an async one, in one event loop. Safe from any thread.

    ``close_inner(transport)`` ends one, on whatever thread; it must not block.
    """

    def __init__(
        self,
        mesh: Mesh | None,
        settings: TransportSettings,
        binding: Binding,
        close_inner: Callable[[Any], object],
    ) -> None:
        self._mesh = mesh
        self._settings = settings
        self._binding = binding
        self._close_inner = close_inner
        self._locate = binding.locate
        self._routes: dict[tuple[str, str], Route] = {}
        self._outside: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        control.on_fork(self)

    def route(self, request: Any) -> Route | None:
        """Where requests for this one's scheme and host go; None if the host is no service.

        Raises the package's MeshClosed, and its ConfigError for a host that looks like a service's but cannot be one.
        """
        where = self._locate(request.url)
        route = self._routes.get(where)
        if route is None or not route.cluster.view.nodes:  # a closed one has none
            try:
                return self._find(where, request.url.host)
            except MeshError as error:
                raise self._binding.family.convert(error, request) from None
        return route

    def outside(self, scheme: str) -> Any:
        """The transport for hosts that are no service."""
        secure = scheme in _SECURE
        transport = self._outside.get(secure)
        if transport is None:
            with self._lock:
                self._require_open()
                transport = self._outside.get(secure)
                if transport is None:
                    transport = self._outside[secure] = self._settings.make(scheme)
        return transport

    def close(self) -> None:
        """Close all of them. Idempotent."""
        with self._lock:
            self._closed = True
            routes, self._routes = tuple(self._routes.values()), {}
            outside, self._outside = tuple(self._outside.values()), {}
        for route in routes:
            route.close()
        for transport in outside:
            self._close_inner(transport)

    def close_idle(self) -> None:
        """Close the connections to endpoints that no request uses now."""
        for route in tuple(self._routes.values()):
            route.resources.close_idle()

    def close_soon(self) -> None:
        """Have the control loop close them. Takes no lock, so that it may be called from ``__del__``."""
        for route in tuple(self._routes.values()):
            if route.call_soon(self.close):
                return

    def _find(self, where: tuple[str, str], host: str) -> Route | None:
        scheme, raw_host = where
        mesh = default_mesh() if self._mesh is None else self._mesh
        cluster = mesh.find(host)
        if cluster is None:
            return None
        with self._lock:
            self._require_open()
            route = self._routes.get(where)
            if route is None or route.cluster is not cluster:
                stale = route
                server_name = raw_host.rstrip(".") if scheme in _SECURE else None
                resources = EndpointResources(
                    cluster,
                    lambda node: self._make_inner(scheme, node),
                    lambda inner: self._close_inner(inner.transport),
                )
                route = Route(mesh, cluster, scheme, server_name, resources)
                if cluster.probing is not None and not self._settings.own_transports:
                    route.prober = self._make_prober(route, raw_host)
                    cluster.probing.add(route.prober)
                self._routes[where] = route
                if stale is not None:  # of a default mesh that has been closed
                    stale.close()
            return route

    def _make_prober(self, route: Route, host: str) -> HTTPProber:
        from meshlb._http.probing import HTTPProber

        binding, settings, scheme = self._binding, self._settings, route.scheme
        # It must not hold this object, which ends with the transport that its user drops.
        return HTTPProber(
            binding.request_class,
            functools.partial(settings.make_for_probes, binding.module, scheme),
            scheme,
            host,
            route.server_name,
        )

    def _make_inner(self, scheme: str, node: Node) -> Inner:
        endpoint = node.endpoint
        base = self._binding.module.URL(f"{scheme}://{endpoint.address}")
        return Inner(self._settings.make(scheme, endpoint), base, endpoint.address)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("Cannot send a request, as the transport has been closed.")

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._settings.after_fork_in_child()
        inherited, self._outside = self._outside, {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # unclosed on purpose: the sockets are the parent's too
            inherited.clear()
