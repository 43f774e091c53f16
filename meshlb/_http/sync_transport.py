"""The sync driver: moves the bytes of an exchange with blocking calls."""

from __future__ import annotations

import atexit
import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Final

from meshlb._http.exchange import Exchange
from meshlb._http.hedged_exchange import HedgedExchange
from meshlb._http.hedged_sync import HedgedRequest
from meshlb._http.pools import Pools, TransportSettings
from meshlb.errors import ConfigError, MeshError
from meshlb.mesh import Mesh
from meshlb.model import CANCELLED

if TYPE_CHECKING:
    from meshlb._http.binding import Binding
    from meshlb.node import Lease


class SyncTransport:
    """To be combined with a package's BaseTransport, by a class that names its ``_binding``."""

    _binding: ClassVar[Binding]
    _pools: Pools | None = None

    def __init__(self, mesh: Mesh | None, settings: TransportSettings) -> None:
        self._closed = False
        self._pools = Pools(require_mesh(mesh), settings, self._binding, _close_inner)
        _living.add(self)

    def handle_request(self, request: Any) -> Any:
        """Send the request to an instance of the service that its URL's host names, and to others if that is needed
        and safe; or straight to the host, if that is no service."""
        pools = self._pools
        if self._closed or pools is None:
            raise RuntimeError("Cannot send a request, as the transport has been closed.")
        binding = self._binding
        route = pools.route(request)
        if route is None:
            return pools.outside(request.url.scheme).handle_request(request)
        try:
            exchange = route.exchange_class(binding, route, request, binding.sync_body)
            lease = route.cluster.try_start(exchange.context)
            if lease is None:
                lease = route.cluster.start(exchange.context, timeout=exchange.timeout)
        except MeshError as error:
            raise binding.family.convert(error, request) from None
        if isinstance(exchange, HedgedExchange) and (hedged := exchange.hedged(lease)) is not None:
            return HedgedRequest(exchange, hedged).send(lease, binding.sync_stream)
        while True:
            inner = exchange.prepare(lease)
            try:
                trace = exchange.trace
                if trace is None:
                    response = inner.transport.handle_request(exchange.attempt)
                else:
                    with trace.active():
                        response = inner.transport.handle_request(exchange.attempt)
            except BaseException as error:
                further = _further_lease(exchange, exchange.failed(error))
                if further is None:
                    raise
                lease = further
                continue
            accepted = exchange.accept(response, binding.sync_stream)
            if accepted is not None:
                return accepted
            # The response is kept until there is another endpoint to ask: if there is none, it is the answer.
            try:
                further = _further_lease(exchange, exchange.pause)
            except BaseException:
                response.close()
                raise
            if further is None:
                return exchange.accept(response, binding.sync_stream, judged=True)
            lease = further
            try:
                response.close()
            except BaseException:
                lease.close(CANCELLED)
                raise

    def close(self) -> None:
        """Close the connections. The mesh stays open. Idempotent."""
        self._closed = True
        if self._pools is not None:
            self._pools.close()

    def __del__(self) -> None:
        # Dropped without close. The collector may run within any lock, so closing is left to the control loop.
        if self._pools is not None and not self._closed:
            self._pools.close_soon()


_living: Final[weakref.WeakSet[SyncTransport]] = weakref.WeakSet()


@atexit.register
def _close_idle() -> None:
    """At the end of the program, for clients that nobody closed: a socket that is open would warn. A daemon thread may
    still be in the middle of a request, and keeps its connection."""
    for transport in tuple(_living):
        if transport._pools is not None:
            transport._pools.close_idle()


def _further_lease(exchange: Exchange, pause: float | None) -> Lease | None:
    if pause is None:
        return None
    if pause > 0:
        try:
            time.sleep(pause)
        except BaseException:
            exchange.give_up()
            raise
    return exchange.again()


def _close_inner(transport: Any) -> None:
    transport.close()


def require_mesh(mesh: object) -> Mesh | None:
    """Raises ConfigError if it is neither a Mesh nor None."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh: {mesh!r} is not a Mesh (or None, for the default mesh)")
    return mesh
