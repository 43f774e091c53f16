"""The mesh: it owns the share in the control loop, discovery, and one Cluster a service."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from meshlb import control
from meshlb.cluster import Cluster
from meshlb.config import ServiceConfig
from meshlb.discovery import ConsulDiscovery, Discovery, ServiceQuery
from meshlb.errors import ConfigError, MeshClosed
from meshlb.names import parse_consul_name
from meshlb.telemetry import Telemetry
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

_RESTART_PAUSE: Final = 1.0
"""Seconds before a watch that ended with an error is started again. A watch handles its registry's errors itself, so
this is for bugs in a Discovery: often enough to heal, seldom enough not to spin."""


class Mesh:
    """Service discovery, balancing and resilience for the calls of one process.

    ``discovery``: where instances come from; None means Consul, configured by the CONSUL_* environment variables.
    ``defaults`` is the configuration of every service that ``services`` does not name. ``tracer_provider`` and
    ``meter_provider``: None means OpenTelemetry's global ones. ``consul_domain``: the DNS domain under which a host
    name like ``orders.service.consul`` means a service. ``clock`` (seconds, monotonic) and ``random`` are for tests
    and simulations.

    Safe from any thread, from several event loops at once, and across fork. Use it as a context manager, sync or
    async, or call ``close``. Nothing is started and nobody is contacted before the first use of a service.

    Raises ConfigError naming the argument.
    """

    def __init__(
        self,
        discovery: Discovery | None = None,
        *,
        defaults: ServiceConfig | None = None,
        services: Mapping[str, ServiceConfig] | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        consul_domain: str = "consul",
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self.discovery: Discovery = ConsulDiscovery() if discovery is None else _require_discovery(discovery)
        self.defaults = _require_config("defaults", ServiceConfig() if defaults is None else defaults)
        self._services = {
            name.lower(): _require_config(f"services[{name!r}]", config) for name, config in (services or {}).items()
        }
        if not consul_domain.strip("."):
            raise ConfigError(f"Mesh.consul_domain: {consul_domain!r} is not a domain name")
        self.consul_domain = consul_domain.strip(".").lower()
        self.clock = clock
        self._random = Random() if random is None else random
        self._own_random = random is None
        self._lock = threading.RLock()
        self._clusters: dict[ServiceQuery, Cluster] = {}
        self._tasks: dict[ServiceQuery, control.ControlTask] = {}
        self._loop: control.ControlLoop | None = None
        self._closed = False
        self.telemetry = Telemetry(self, tracer_provider, meter_provider)
        control.on_fork(self)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Mesh:
        """A mesh with the settings of a TOML file; keyword arguments of ``Mesh`` win over it.

        Raises ConfigError naming the file and the key, and OSError if the file cannot be read.
        """
        from meshlb.config_file import read_settings

        return cls(**{**read_settings(path), **overrides})

    # -- services ----------------------------------------------------------------------------------------------

    def cluster(
        self, service: str, *, tag: str | None = None, datacenter: str | None = None, filter: str | None = None
    ) -> Cluster:
        """The instances of a service; made, and its watch started, at the first call.

        ``service`` is a name in the registry, or a Consul DNS name (``v2.orders.service.dc2.consul``).

        Raises ConfigError for a name that cannot be one, MeshClosed after close.
        """
        query = self._query(service, tag, datacenter, filter)
        cluster = self._clusters.get(query)
        return cluster if cluster is not None else self._make_cluster(query)

    def find(self, host: str) -> Cluster | None:
        """The service that a URL's host means, or None for a host that is no service.

        A host is a service if discovery or ``services`` names it, if it has no dot, or if it is a Consul DNS name
        under ``consul_domain``. IP addresses, ``localhost`` and other dotted names are not.
        """
        name = host.lower().rstrip(".")
        if name in self._services or self.discovery.knows(name):
            return self.cluster(name)
        if not name or name == "localhost" or _is_ip(name):
            return None
        if "." not in name or name.endswith(f".{self.consul_domain}"):
            return self.cluster(name)
        return None

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """The services in use."""
        return tuple(self._clusters.values())

    def config_of(self, service: str) -> ServiceConfig:
        """The configuration that the calls to ``service`` use."""
        return self._services.get(service.lower(), self.defaults)

    def snapshot(self) -> list[dict[str, Any]]:
        """``Cluster.snapshot`` of every service in use."""
        return [cluster.snapshot() for cluster in self.clusters]

    def _query(self, service: str, tag: str | None, datacenter: str | None, filter: str | None) -> ServiceQuery:
        if not isinstance(service, str) or not service.strip() or any(c.isspace() or c in "/?#@" for c in service):
            raise ConfigError(f"service {service!r} is not a service name")
        name = service.lower().rstrip(".")
        if name not in self._services and not self.discovery.knows(name):
            named = parse_consul_name(name, self.consul_domain)
            if named is not None:
                name, tag, datacenter = named.service, tag or named.tag, datacenter or named.datacenter
        return ServiceQuery(name, tag, datacenter, filter or self.config_of(name).filter)

    def _make_cluster(self, query: ServiceQuery) -> Cluster:
        with self._lock:
            cluster = self._clusters.get(query)
            if cluster is not None:
                return cluster
            if self._closed:
                raise MeshClosed(f"service '{query}': the mesh is closed; make a new Mesh")
            cluster = Cluster(
                query,
                self.config_of(query.service),
                clock=self.clock,
                random=self._random,
                background=self,
                on_resume=self._resume,
            )
            self._start_watch(cluster)
            self._clusters = {**self._clusters, query: cluster}
            self.telemetry.cluster_added(cluster)
            return cluster

    # -- the control loop --------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Call on the control loop as soon as possible; False if this mesh has none (any more)."""
        loop = self._loop
        return loop is not None and loop.call_soon(callback, *args)

    def call_later(self, delay: float, callback: Callable[[], object]) -> control.Timer | None:
        """Call on the control loop after ``delay`` seconds; the timer, or None without a control loop."""
        loop = self._loop
        return None if loop is None else loop.call_later(delay, callback)

    def _start_watch(self, cluster: Cluster) -> None:
        if self._loop is None:
            self._loop = control.acquire()
        self._tasks[cluster.query] = self._loop.run(lambda: self._watch(cluster), f"meshlb-watch-{cluster.query}")

    async def _watch(self, cluster: Cluster) -> None:
        import asyncio

        while True:
            try:
                await self.discovery.watch(cluster.query, cluster)
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:
                control.logger.exception("%s: the watch failed and is started again", cluster.query)
                cluster.failed(error)
                await asyncio.sleep(_RESTART_PAUSE)

    def _resume(self) -> None:
        """Start the watches again, in the child of a fork, at the first use of a service there."""
        with self._lock:
            if self._closed:
                return
            for query, cluster in self._clusters.items():
                if query not in self._tasks:
                    self._start_watch(cluster)

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._loop = None
        self._tasks = {}
        if self._own_random:
            self._random.seed()  # or every child would make the parent's choices
        for cluster in self._clusters.values():
            cluster.after_fork_in_child()

    # -- the end -----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Stop watching, close the connections to endpoints, and end the control loop if nobody else uses it.

        Takes at most about a second. Calls that are waiting or come later get MeshClosed. Idempotent.
        """
        finished = self._begin_close()
        if finished is not None:
            loop, done = finished
            if not loop.is_current_thread():
                done.wait(control.STOP_TIMEOUT)
            control.release(loop)

    async def aclose(self) -> None:
        """``close`` without blocking the running asyncio or trio loop."""
        finished = self._begin_close()
        if finished is not None:
            loop, done = finished
            await done.wait_async(control.STOP_TIMEOUT)
            control.release(loop)

    def _begin_close(self) -> tuple[control.ControlLoop, Signal] | None:
        with self._lock:
            if self._closed:
                return None
            self._closed = True
            clusters, tasks, loop = self.clusters, tuple(self._tasks.values()), self._loop
        self.telemetry.close()
        for cluster in clusters:
            cluster.close()
        if loop is None:
            return None
        for task in tasks:
            task.cancel()
        closing = loop.run(self._close_discovery(tasks), "meshlb-close")
        return loop, closing.done

    def _close_discovery(self, tasks: tuple[control.ControlTask, ...]) -> Callable[[], Any]:
        async def close() -> None:
            for task in tasks:
                await task.done.wait_async(control.STOP_TIMEOUT)
            await self.discovery.aclose()

        return close

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Mesh:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._clusters)} services"
        return f"<Mesh {self.discovery!r} {state}>"


def _require_config(name: str, config: object) -> ServiceConfig:
    if not isinstance(config, ServiceConfig):
        raise ConfigError(f"Mesh.{name}: {config!r} is not a ServiceConfig")
    return config


def _require_discovery(discovery: object) -> Discovery:
    missing = [name for name in ("watch", "aclose", "knows") if not callable(getattr(discovery, name, None))]
    if missing:
        raise ConfigError(f"Mesh.discovery: {discovery!r} is not a Discovery (no {', '.join(missing)}())")
    return discovery  # type: ignore[return-value]  # checked structurally above


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True
