"""httpx through the mesh: ``httpx.Client(transport=MeshTransport(mesh))``.

The host of a URL is the service: ``client.get("http://orders/v1/orders/42")``; ``orders.service.consul`` and
``v2.orders.service.dc2.consul`` work as in Consul DNS. Its port is ignored, since each instance has its own. ``https``
speaks TLS to the instances and verifies the name of the service. ``Host``, cookies, redirects, ``response.request``
and ``response.url`` keep the service's name. A host that is no service (an IP address, ``localhost``, a dotted name
outside of the Consul domain) is called directly; several transports can be combined with ``mounts=``.

A request may say more about itself: ``extensions={"meshlb": {"idempotent": True, "key": "user-42", "timeout": 2.0,
"retry": False}}`` (``key`` is what a hash policy hashes, ``timeout`` is for the whole call, in seconds). What became
of it is in ``response.extensions["meshlb"]``: ``{"endpoint": "10.0.0.1:8080", "attempts": 1}``.

What the caller sees of a failure is httpx's own exception or response. What meshlb itself raises, because there is
nobody to call, belongs to both families: ``NoEndpoints`` is a ``meshlb.NoEndpoints`` and an ``httpx.ConnectError``.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import httpx

from meshlb import errors
from meshlb._http.async_transport import AsyncTransport
from meshlb._http.binding import Binding
from meshlb._http.errors import RequestErrorMixin
from meshlb._http.pools import TransportSettings
from meshlb._http.sync_transport import SyncTransport

if TYPE_CHECKING:
    from meshlb.mesh import Mesh
    from meshlb.model import Endpoint

__all__ = [
    "AsyncMeshTransport",
    "CircuitOpen",
    "ConfigError",
    "DeadlineExceeded",
    "DiscoveryError",
    "DiscoveryTimeout",
    "LimitExceeded",
    "MeshClosed",
    "MeshTransport",
    "NoEndpoints",
    "SessionLost",
    "Throttled",
]

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


class ConfigError(RequestErrorMixin, errors.ConfigError, httpx.LocalProtocolError):
    """The request names something that cannot be a service, or has wrong ``extensions["meshlb"]``."""


class MeshClosed(RequestErrorMixin, errors.MeshClosed, httpx.ConnectError):
    """The mesh has been closed."""


class DiscoveryError(RequestErrorMixin, errors.DiscoveryError, httpx.ConnectError):
    """The registry failed, and there is no last known good answer to go on with."""


class DiscoveryTimeout(RequestErrorMixin, errors.DiscoveryTimeout, httpx.ConnectTimeout):
    """The registry did not give its first answer in time."""


class NoEndpoints(RequestErrorMixin, errors.NoEndpoints, httpx.ConnectError):
    """The registry knows no instance that the call could go to."""


class CircuitOpen(NoEndpoints, errors.CircuitOpen):
    """There are instances, but every one of them is out of rotation."""


class SessionLost(NoEndpoints, errors.SessionLost):
    """The instance that the request's session is bound to is gone, and ``when_gone="fail"`` forbids another one."""


class Throttled(RequestErrorMixin, errors.Throttled, httpx.PoolTimeout):
    """Refused here, without an attempt: the service turns most calls away (``ServiceConfig.throttling``).

    A PoolTimeout, since that is the package's error for a limit of this process.
    """


class LimitExceeded(RequestErrorMixin, errors.LimitExceeded, httpx.PoolTimeout):
    """Refused here, without an attempt: as much is under way as ``ServiceConfig.limits`` allow."""


class DeadlineExceeded(RequestErrorMixin, errors.DeadlineExceeded, httpx.TimeoutException):
    """The time for the whole call was up before an attempt could be made, or before the response was complete."""


_BINDING: Final = Binding(
    httpx,
    {
        errors.ConfigError: ConfigError,
        errors.MeshClosed: MeshClosed,
        errors.DiscoveryError: DiscoveryError,
        errors.DiscoveryTimeout: DiscoveryTimeout,
        errors.NoEndpoints: NoEndpoints,
        errors.CircuitOpen: CircuitOpen,
        errors.SessionLost: SessionLost,
        errors.Throttled: Throttled,
        errors.LimitExceeded: LimitExceeded,
        errors.DeadlineExceeded: DeadlineExceeded,
    },
)

DEFAULT_LIMITS: Final = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=5.0)
"""httpx's own, there for all hosts together, here for each endpoint: nobody waits who did not wait before."""


class MeshTransport(SyncTransport, httpx.BaseTransport):
    """A transport for ``httpx.Client`` that calls services through a mesh. Safe from any thread.

    * ``mesh``: None means the process's default mesh, made at the first request.
    * ``transport_factory(endpoint)``: makes the inner transport for one endpoint, a new one at each call: it is closed
      when the endpoint is gone or idle. It is called again for another scheme of the same endpoint. None: an
      ``httpx.HTTPTransport`` without retries of its own, made with the options below; all share one SSLContext.
      An inner transport reports a failure of the endpoint by raising ``httpx.TransportError`` or OSError.
    * ``verify``, ``cert``, ``trust_env``, ``http1``, ``http2``, ``local_address``, ``socket_options``: as in
      ``httpx.HTTPTransport``; for endpoints and for hosts that are no service.
    * ``limits``: of the connections to each endpoint.

    Timeouts are the client's. Besides, ``ServiceConfig.connect_timeout`` bounds the connect phase, and
    ``ServiceConfig.timeout`` the whole call until the body has been read. ``Retry.per_try_timeout`` bounds each phase
    of an attempt until its response starts (blocking sockets know no timeout for a whole attempt).

    Closing it closes its connections, never the mesh. Raises ConfigError naming the argument.
    """

    _binding = _BINDING

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        transport_factory: Callable[[Endpoint], httpx.BaseTransport] | None = None,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits = DEFAULT_LIMITS,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> None:
        settings = TransportSettings(
            httpx.HTTPTransport,
            factory=transport_factory,
            create_ssl_context=httpx.create_ssl_context,
            verify=verify,
            cert=cert,
            trust_env=trust_env,
            http1=http1,
            http2=http2,
            limits=limits,
            local_address=local_address,
            socket_options=None if socket_options is None else list(socket_options),
        )
        super().__init__(mesh, settings)


class AsyncMeshTransport(AsyncTransport, httpx.AsyncBaseTransport):
    """A transport for ``httpx.AsyncClient`` that calls services through a mesh, on asyncio and trio.

    One transport may serve several event loops at once, one after the other or in several threads: each has inner
    transports of its own, which are closed when the loop ends (by ``asyncio.run``, by trio, or by whatever else calls
    ``loop.shutdown_asyncgens``). ``transport_factory(endpoint)`` is called for each of them, and returns an
    ``httpx.AsyncBaseTransport``. ``Retry.per_try_timeout`` bounds an attempt as a whole until its response starts.
    For everything else see ``MeshTransport``.
    """

    _binding = _BINDING

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        transport_factory: Callable[[Endpoint], httpx.AsyncBaseTransport] | None = None,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits = DEFAULT_LIMITS,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> None:
        settings = TransportSettings(
            httpx.AsyncHTTPTransport,
            factory=transport_factory,
            create_ssl_context=httpx.create_ssl_context,
            verify=verify,
            cert=cert,
            trust_env=trust_env,
            http1=http1,
            http2=http2,
            limits=limits,
            local_address=local_address,
            socket_options=None if socket_options is None else list(socket_options),
        )
        super().__init__(mesh, settings)
