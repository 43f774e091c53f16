"""The sync driver: moves the bytes of an exchange with blocking calls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from meshlb._http.exchange import Exchange, begin
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

    def handle_request(self, request: Any) -> Any:
        """Send the request to an instance of the service that its URL's host names, and to others if that is needed
        and safe; or straight to the host, if that is no service."""
        pools = self._pools
        if self._closed or pools is None:
            raise RuntimeError("Cannot send a request, as the transport has been closed.")
        binding = self._binding
        exchange = begin(binding, pools, request, binding.sync_body)
        if exchange is None:
            return pools.outside(request.url.scheme).handle_request(request)
        lease = exchange.cluster.try_start(exchange.context)
        if lease is None:
            try:
                lease = exchange.cluster.start(exchange.context, timeout=exchange.timeout)
            except MeshError as error:
                raise exchange.unavailable(error) from None
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
            pause = exchange.answered(response)
            if pause is None:
                return exchange.accept(response, binding.sync_stream)
            # The response is kept until there is another endpoint to ask: if there is none, it is the answer.
            try:
                further = _further_lease(exchange, pause)
            except BaseException:
                response.close()
                raise
            if further is None:
                return exchange.accept(response, binding.sync_stream)
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


def _further_lease(exchange: Exchange, pause: float | None) -> Lease | None:
    if pause is None:
        return None
    if pause > 0:
        time.sleep(pause)
    return exchange.again()


def _close_inner(transport: Any) -> None:
    transport.close()


def require_mesh(mesh: object) -> Mesh | None:
    """Raises ConfigError if it is neither a Mesh nor None."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh: {mesh!r} is not a Mesh (or None, for the default mesh)")
    return mesh
