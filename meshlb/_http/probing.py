"""Explicit probes over HTTP, on the control loop, whatever kind of client asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from meshlb import control
from meshlb.balancing.orca import FORMAT_HEADER, TEXT_HEADER, LoadReport, parse_header

if TYPE_CHECKING:
    from meshlb.balancing.probes import Probes
    from meshlb.node import Node
    from meshlb.probing import Answered

logger = logging.getLogger("meshlb.http")

MOST_CONNECTIONS: Final = 32
"""Of one service's probes. They are few and short, and a pool of httpcore's walks all that it has at each request."""

KEEPALIVE: Final = 5.0
"""Seconds, httpx's own default: mostly the next probe of an endpoint comes within it, and TLS need not be set up."""

_FOR_EVER: Final = 1e9
_TOO_MANY_REQUESTS: Final = 429


class HTTPProber:
    """Sends HEAD requests for ``Probes.path``, over connections of its own: those of a client belong to its threads or
    its event loop.

    ``make_transport()``: an async transport of the client's package with the client's TLS settings. ``headers`` and
    ``server_name`` are those of the service, as for its calls.
    """

    def __init__(
        self,
        request_class: type[Any],
        make_transport: Callable[[], Any],
        scheme: str,
        host: str,
        server_name: str | None,
    ) -> None:
        self._request_class = request_class
        self._make_transport = make_transport
        self._scheme = scheme
        self._headers = {"host": host, "user-agent": "meshlb-probe", FORMAT_HEADER: "TEXT"}
        self._server_name = server_name
        self._session: _Session | None = None
        self.closed = False
        control.on_fork(self)

    def probe(self, node: Node, probes: Probes, answered: Answered) -> None:
        """Prober."""
        session = self._session
        if session is None or session.loop is not asyncio.get_running_loop():  # of a mesh before this one
            session = self._session = _Session(self._make_transport())
        extensions: dict[str, Any] = {
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), probes.timeout),
        }
        if self._server_name is not None:
            extensions["sni_hostname"] = self._server_name
        request = self._request_class(
            "HEAD",
            f"{self._scheme}://{node.endpoint.address}{probes.path}",
            headers=self._headers,
            extensions=extensions,
        )
        session.send(request, probes.timeout, answered)

    def close(self) -> None:
        """Close the connections. Idempotent, safe from any thread, waits for nothing."""
        self.closed = True
        session, self._session = self._session, None
        if session is not None:
            session.close_soon()

    def after_fork_in_child(self) -> None:
        self._session = None  # all of it hangs on the parent's loop, which the child keeps and never runs


class _Session:
    """The transport and the probes under way, in one event loop."""

    def __init__(self, transport: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self._transport = transport
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper = self.loop.create_task(self._keep(), name="meshlb-probe-connections")

    def send(self, request: Any, timeout: float, answered: Answered) -> None:
        task = self.loop.create_task(self._ask(request, timeout, answered), name="meshlb-probe")
        self._tasks.add(task)  # or it might be collected before it has ended
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, request: Any, timeout: float, answered: Answered) -> None:
        report: LoadReport | None = None
        try:
            async with asyncio.timeout(timeout):
                response = await self._transport.handle_async_request(request)
                try:
                    async for _ in response.stream:  # nothing follows a HEAD, but the connection is free only then
                        pass
                finally:
                    await response.aclose()
            report = report_of_probe(response.status_code, response.headers)
        except Exception:
            logger.debug("a probe of %s failed", request.url, exc_info=True)
        finally:
            answered(report)

    async def _keep(self) -> None:
        """Close everything when the loop ends, or before. It waits for a timer: that the loop holds on to, also in the
        child of a fork, where this must never be finalised."""
        try:
            await asyncio.sleep(_FOR_EVER)
        finally:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            try:
                await self._transport.aclose()
            except Exception:
                logger.debug("closing a probe's connection failed", exc_info=True)

    def close_soon(self) -> None:
        """Safe from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and all this with it
            self.loop.call_soon_threadsafe(self._keeper.cancel)


def report_of_probe(status: int, headers: Any) -> LoadReport | None:
    """The report that a probe was answered with. A server that fails, or has too much to do, must not look idle; one
    that does not know the path may report all the same."""
    value = headers.get(TEXT_HEADER)
    if value is None or status >= 500 or status == _TOO_MANY_REQUESTS:
        return None
    return parse_header(value)
