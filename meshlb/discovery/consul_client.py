"""py-consul over httpx: every call of the Consul API awaitable, with a time-out, and cancelled at once.

py-consul is abstract over its HTTP client. Its own asyncio client warns when it is made and times blocking queries
out; its synchronous one cannot be interrupted. Imported only when Consul is first asked.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

import consul.base
import httpx
from opentelemetry import context as otel_context

from meshlb.discovery.consul_errors import unreachable
from meshlb.discovery.consul_rules import CONNECT_TIMEOUT, READ_MARGIN
from meshlb.discovery.consul_settings import ConsulSettings
from meshlb.discovery.consul_tls import make_context

T = TypeVar("T")
Params = list[tuple[str, Any]]


class AsyncConsul(consul.base.Consul):  # type: ignore[misc]  # py-consul ships no types
    """``consul.Consul`` whose calls return coroutines. Belongs to the event loop it is first used on.

    A call raises py-consul's exceptions for what Consul answers, and DiscoveryError when there is no answer.
    """

    def __init__(self, settings: ConsulSettings) -> None:
        self._settings = settings
        address = settings.address
        # Every argument that py-consul would otherwise take from the environment is given, so that ours count.
        super().__init__(
            host=address.host,
            port=address.port,
            scheme=address.scheme,
            verify=settings.tls is None or settings.tls.verify,
            consistency=settings.consistency,
            dc=settings.datacenter,
        )
        self.token = None  # it would be CONSUL_HTTP_TOKEN whatever was given; AsyncHTTPClient sends the right one

    def http_connect(
        self, host: str, port: int, scheme: str, verify: bool | str = True, cert: Any = None
    ) -> AsyncHTTPClient:
        return AsyncHTTPClient(self._settings)

    async def aclose(self) -> None:
        await self.http.close()


class AsyncHTTPClient(consul.base.HTTPClient):  # type: ignore[misc]  # py-consul ships no types
    """py-consul's idea of an HTTP client, on an ``httpx.AsyncClient``."""

    def __init__(self, settings: ConsulSettings) -> None:
        address = settings.address
        super().__init__(address.host, address.port, address.scheme)
        self.base_uri = address.base_url
        self._settings = settings
        headers = dict(settings.headers)
        if settings.namespace:
            headers["X-Consul-Namespace"] = settings.namespace
        if settings.partition:
            headers["X-Consul-Partition"] = settings.partition
        if address.local:
            # Between processes of one host, compressing costs more than the bytes it saves.
            headers.setdefault("Accept-Encoding", "identity")
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                verify=make_context(settings.tls) if settings.tls else False,
                uds=address.socket,
                trust_env=False,
                # Every watch holds a connection: a limit would make watches wait for each other.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            ),
            auth=settings.auth,
            headers=headers,
            trust_env=False,  # an agent is never behind the environment's proxy, and .netrc is not its business
        )
        server_name = settings.tls.server_name if settings.tls else None
        self._extensions = {"sni_hostname": server_name} if server_name else {}

    async def get(
        self,
        callback: Callable[[Any], T],
        path: str,
        params: Params | None = None,
        headers: dict[str, str] | None = None,
        raw: bool = False,
        *,
        read_timeout: float = READ_MARGIN,
        quoted: bool = False,
    ) -> T:
        """``read_timeout``: seconds to wait for the answer. ``quoted``: ``path`` is percent-encoded already."""
        return await self._request(
            "GET", callback, path, params, headers, raw=raw, read_timeout=read_timeout, quoted=quoted
        )

    async def put(
        self,
        callback: Callable[[Any], T],
        path: str,
        params: Params | None = None,
        data: str | bytes = "",
        headers: dict[str, str] | None = None,
    ) -> T:
        return await self._request("PUT", callback, path, params, headers, data)

    async def post(
        self,
        callback: Callable[[Any], T],
        path: str,
        params: Params | None = None,
        data: str | bytes = "",
        headers: dict[str, str] | None = None,
    ) -> T:
        return await self._request("POST", callback, path, params, headers, data)

    async def delete(
        self,
        callback: Callable[[Any], T],
        path: str,
        params: Params | None = None,
        data: str | bytes = "",
        headers: dict[str, str] | None = None,
    ) -> T:
        return await self._request("DELETE", callback, path, params, headers, data)

    async def close(self) -> None:
        await self._client.aclose()

    async def _request(
        self,
        method: str,
        callback: Callable[[Any], T],
        path: str,
        params: Params | None,
        headers: dict[str, str] | None,
        data: str | bytes = b"",
        *,
        raw: bool = False,
        read_timeout: float = READ_MARGIN,
        quoted: bool = False,
    ) -> T:
        url = f"{self.base_uri}{path}" if quoted else self.uri(path)
        if params:
            url = f"{url}?{urllib.parse.urlencode(params)}"
        sent = dict(headers or {})
        token = self._settings.current_token()
        if token is not None:
            sent.setdefault("X-Consul-Token", token)  # py-consul forgets it in some calls
        # The agreed sign of OpenTelemetry's instrumentations: this is the library's own traffic, not the program's.
        suppressed = otel_context.attach(otel_context.set_value("suppress_instrumentation", True))
        try:
            # httpx's time-outs are between two bytes; the outer one bounds an answer that only drips.
            async with asyncio.timeout(CONNECT_TIMEOUT + read_timeout + READ_MARGIN):
                response = await self._client.request(
                    method,
                    url,
                    content=data or None,
                    headers=sent,
                    timeout=httpx.Timeout(CONNECT_TIMEOUT, read=read_timeout),
                    extensions=self._extensions,
                )
        except (httpx.HTTPError, TimeoutError, OSError) as error:
            raise unreachable(self._settings.address, error) from error
        finally:
            otel_context.detach(suppressed)
        body = response.content if raw else response.content.decode("utf-8", "replace")
        return callback(consul.base.Response(response.status_code, response.headers, body))
