"""The async driver: moves the bytes of an exchange on asyncio and trio, on several loops at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import anyio

from meshlb import control
from meshlb._http.exchange import Exchange
from meshlb._http.hedged_async import HedgedRequest
from meshlb._http.hedged_exchange import HedgedExchange
from meshlb._http.loops import Loop, LoopCloser, LoopEntry, Loops, is_closed, loop_finder
from meshlb._http.pools import Inner, Pools, TransportSettings
from meshlb._http.sync_transport import require_mesh
from meshlb.errors import MeshError
from meshlb.model import CANCELLED

if TYPE_CHECKING:
    from meshlb._http.binding import Binding
    from meshlb.mesh import Mesh
    from meshlb.node import Lease

_GRACE: Final = 0.02
"""Seconds by which an attempt's limit exceeds its phases' timeouts. They know whether anything was sent, so they get
to speak first."""

_inherited: list[LoopEntry] = []
"""The parent's, in a forked child. Kept: collecting them would try to run something on the parent's loops."""


class AsyncTransport:
    """To be combined with a package's AsyncBaseTransport, by a class that names its ``_binding``."""

    _binding: ClassVar[Binding]

    def __init__(self, mesh: Mesh | None, settings: TransportSettings) -> None:
        self._closed = False
        self._mesh = require_mesh(mesh)
        self._settings = settings
        self._loops = Loops()
        self._running_loop = loop_finder()
        control.on_fork(self)

    async def handle_async_request(self, request: Any) -> Any:
        """Send the request to an instance of the service that its URL's host names, and to others if that is needed
        and safe; or straight to the host, if that is no service."""
        if self._closed:
            raise RuntimeError("Cannot send a request, as the transport has been closed.")
        loop = self._running_loop()
        entry = self._loops.get(loop)
        pools = (await self._open(loop) if entry is None else entry).pools
        binding = self._binding
        route = pools.route(request)
        if route is None:
            return await pools.outside(request.url.scheme).handle_async_request(request)
        try:
            exchange = route.exchange_class(binding, route, request, binding.async_body)
            lease = route.cluster.try_start(exchange.context)
            if lease is None:
                lease = await route.cluster.start_async(exchange.context, timeout=exchange.timeout)
        except MeshError as error:
            raise binding.family.convert(error, request) from None
        if isinstance(exchange, HedgedExchange) and (hedged := exchange.hedged(lease)) is not None:
            return await HedgedRequest(exchange, hedged, self._send).send(lease, binding.async_stream)
        while True:
            inner = exchange.prepare(lease)
            try:
                trace = exchange.trace
                if trace is None and exchange.limit is None:
                    response = await inner.transport.handle_async_request(exchange.attempt)
                elif trace is None:
                    response = await self._send(exchange, inner)
                else:
                    with trace.active():
                        response = await self._send(exchange, inner)
            except BaseException as error:
                further = await _further_lease(exchange, exchange.failed(error))
                if further is None:
                    raise
                lease = further
                continue
            accepted = exchange.accept(response, binding.async_stream)
            if accepted is not None:
                return accepted
            # The response is kept until there is another endpoint to ask: if there is none, it is the answer.
            try:
                further = await _further_lease(exchange, exchange.pause)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await response.aclose()
                raise
            if further is None:
                return exchange.accept(response, binding.async_stream, judged=True)
            lease = further
            try:
                await response.aclose()
            except BaseException:
                lease.close(CANCELLED)
                raise

    async def _send(self, exchange: Exchange, inner: Inner) -> Any:
        limit = exchange.limit
        if limit is None:
            return await inner.transport.handle_async_request(exchange.attempt)
        with anyio.move_on_after(limit + _GRACE):
            return await inner.transport.handle_async_request(exchange.attempt)
        raise self._binding.read_timeout(f"no response from {inner.address} within {limit:g} s")

    async def _open(self, loop: Loop) -> LoopEntry:
        for other, entry in tuple(self._loops.items()):
            if is_closed(other):  # and was not shut down, or its entry would be gone
                self._loops.pop(other, None)
                entry.pools.close()
        closer = LoopCloser(loop)
        pools = Pools(self._mesh, self._settings, self._binding, closer.discard)
        entry = self._loops[loop] = LoopEntry(loop, pools, closer, self._loops)
        await entry.open()
        return entry

    async def aclose(self) -> None:
        """Close the connections: those of the running loop before it returns, those of others on their own loops.
        The mesh stays open. Idempotent."""
        self._closed = True
        loop = self._running_loop()
        for other, entry in tuple(self._loops.items()):
            if other is not loop:
                entry.close_soon()
        own = self._loops.get(loop)
        if own is not None:
            await own.aclose()

    def after_fork_in_child(self) -> None:
        _inherited.extend(self._loops.values())
        self._loops = Loops()


async def _further_lease(exchange: Exchange, pause: float | None) -> Lease | None:
    if pause is None:
        return None
    if pause > 0:
        try:
            await anyio.sleep(pause)
        except BaseException:
            exchange.give_up()
            raise
    return exchange.again()
