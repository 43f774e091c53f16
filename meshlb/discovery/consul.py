"""Instances from Consul, by blocking queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshlb.discovery.base import ServiceQuery, Sink
from meshlb.discovery.consul_settings import (
    DEFAULT_EMPTY_GRACE,
    DEFAULT_MIN_REFRESH_INTERVAL,
    DEFAULT_WAIT,
    ConsulSettings,
    resolve_settings,
)
from meshlb.discovery.consul_tls import Path

if TYPE_CHECKING:
    import asyncio

    from meshlb.discovery.consul_client import AsyncConsul
    from meshlb.discovery.consul_connection import ConsulConnection
    from meshlb.place import Place


class ConsulDiscovery:
    """Watches services in Consul, by way of the agent on this host or any other address of its HTTP API.

    Whatever is not given is taken from Consul's own environment variables, then from defaults:

    ``address`` (CONSUL_HTTP_ADDR): ``"http://127.0.0.1:8500"``, ``"127.0.0.1:8500"``, ``"https://host:8501"`` or
    ``"unix:///path/to/socket"``; ``scheme`` (CONSUL_HTTP_SSL) for an address without one. ``token``
    (CONSUL_HTTP_TOKEN) or ``token_file`` (CONSUL_HTTP_TOKEN_FILE; read before each query, so that a token can be
    rotated). ``auth`` (CONSUL_HTTP_AUTH): user name and password for a proxy before Consul.

    TLS: ``verify`` (CONSUL_HTTP_SSL_VERIFY), ``ca_file`` (CONSUL_CACERT), ``ca_path`` (CONSUL_CAPATH), ``cert``: a
    path or a pair (certificate, key) (CONSUL_CLIENT_CERT, CONSUL_CLIENT_KEY), ``tls_server_name``
    (CONSUL_TLS_SERVER_NAME).

    What is asked: ``datacenter``, ``namespace`` (CONSUL_NAMESPACE) and ``partition`` (CONSUL_PARTITION) other than
    the agent's own; ``tag``: one or several that instances must carry; ``filter``: an expression of Consul's filter
    language; ``tagged_address``: the address to call instances under ("wan", "lan_ipv6", ...), where they have it.

    How it is asked: ``consistency``: "default", "stale" (any server may answer, even without a leader) or
    "consistent"; ``cached``: from the agent's cache. ``wait``: seconds that a query may hang. ``headers``: added to
    every request.

    How it is judged: ``min_refresh_interval``: seconds between refreshes of a service that changes without end;
    ``empty_grace``: seconds for which an empty list is not believed after one that was not empty;
    ``last_known_good``: path of a file that keeps what was last known, for a start while Consul is down.

    Reads no service and opens no connection before the first watch. Raises ConfigError, naming the argument or the
    variable, for what is wrong.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        datacenter: str | None = None,
        token: str | None = None,
        token_file: Path | None = None,
        scheme: str | None = None,
        auth: tuple[str, str] | None = None,
        verify: bool | None = None,
        ca_file: Path | None = None,
        ca_path: Path | None = None,
        cert: Path | Sequence[Path] | None = None,
        tls_server_name: str | None = None,
        namespace: str | None = None,
        partition: str | None = None,
        headers: Mapping[str, str] | None = None,
        consistency: str = "default",
        cached: bool = False,
        tag: str | Iterable[str] | None = None,
        filter: str | None = None,
        tagged_address: str | None = None,
        wait: float = DEFAULT_WAIT,
        min_refresh_interval: float = DEFAULT_MIN_REFRESH_INTERVAL,
        empty_grace: float = DEFAULT_EMPTY_GRACE,
        last_known_good: Path | None = None,
    ) -> None:
        self._settings = resolve_settings(
            address,
            datacenter=datacenter,
            token=token,
            token_file=token_file,
            scheme=scheme,
            auth=auth,
            verify=verify,
            ca_file=ca_file,
            ca_path=ca_path,
            cert=cert,
            tls_server_name=tls_server_name,
            namespace=namespace,
            partition=partition,
            headers=headers,
            consistency=consistency,
            cached=cached,
            tag=tag,
            filter=filter,
            tagged_address=tagged_address,
            wait=wait,
            min_refresh_interval=min_refresh_interval,
            empty_grace=empty_grace,
            last_known_good=last_known_good,
        )
        self._held: dict[asyncio.AbstractEventLoop, ConsulConnection] = {}

    @property
    def settings(self) -> ConsulSettings:
        """What arguments, environment and defaults came to."""
        return self._settings

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        """Report the instances of a service until cancelled. Equal discoveries on one loop share the query."""
        connection = self._connection()
        connection.hold()  # of its own: another mesh with this very discovery may close before this one
        try:
            await connection.watch(query, sink)
        finally:
            await connection.release()

    async def place(self, *, coordinates: bool = False) -> Place:
        """Where the agent says that it is, and with ``coordinates`` how far all nodes are. Raises DiscoveryError."""
        from meshlb.discovery.consul_coordinates import ask_place

        return await ask_place(self._connection().client, self._settings, coordinates=coordinates)

    async def client(self) -> AsyncConsul:
        """py-consul's client with awaitable calls, for the rest of Consul's API. Good until ``aclose``."""
        return self._connection().client

    async def aclose(self) -> None:
        """Release what belongs to the running loop. A later watch, here or on another loop, starts afresh."""
        import asyncio

        held = self._held.pop(asyncio.get_running_loop(), None)
        if held is not None:
            await held.release()

    def knows(self, service: str) -> bool:
        """Never: Consul's services are not configured here, but asked for."""
        return False

    def describe(self, query: ServiceQuery) -> dict[str, Any]:
        """How the watch of a query is doing, as plain data; empty without one. Safe from any thread.

        ``address``; ``index``, the last of Consul; ``age`` in seconds of the last good answer; ``status`` of the last
        one; ``error`` and the count of ``failures`` since; ``from_file``: whether the instances are only remembered;
        ``empty_held_for``: seconds until a held-back empty answer is believed; ``malformed``: skipped entries; and
        what Consul itself says in headers: ``last_contact`` (ms), ``known_leader``, ``cache``, ``cache_age`` (s),
        ``backend``.
        """
        for connection in reversed(list(self._held.values())):
            described = connection.describe(query)
            if described:
                return described
        return {}

    def _connection(self) -> ConsulConnection:
        import asyncio  # not at the top: `import meshlb` must stay cheap

        loop = asyncio.get_running_loop()
        connection = self._held.get(loop)
        if connection is None:
            from meshlb.discovery.consul_connection import open_connection

            connection = self._held[loop] = open_connection(self._settings)
        return connection

    def __repr__(self) -> str:
        return f"ConsulDiscovery({str(self._settings.address)!r})"
