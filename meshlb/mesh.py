"""The mesh: it owns the share in the control loop, discovery, and one Cluster a service."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from meshlb import control
from meshlb._validate import text
from meshlb.cluster import Cluster
from meshlb.directory import Directory
from meshlb.discovery.base import Discovery, ServiceQuery
from meshlb.errors import ConfigError, MeshClosed
from meshlb.resilience import StallMonitor
from meshlb.sources import Source, Sources
from meshlb.telemetry import Telemetry
from meshlb.waiting import Signal

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from meshlb.config import ServiceConfig
    from meshlb.watch import ClusterSink, PeersSink

_LAST_BREATH: Final = 0.1
"""Seconds that a thread whose loop has ended is waited for. It has nothing left to do."""


class Mesh:
    """Service discovery, balancing and resilience for the calls of one process.

    ``discovery``: where instances come from; None means Consul, configured by the CONSUL_* environment variables.
    ``defaults`` is the configuration of every service that ``services`` does not name. ``tracer_provider`` and
    ``meter_provider``: None means OpenTelemetry's global ones. ``endpoint_metrics``: whether a meter gets series for
    each endpoint or only for each service (a matter of cardinality). ``consul_domain``: the DNS domain under which a
    host name like ``orders.service.consul`` means a service. ``clock`` (seconds, monotonic) and ``random`` are for
    tests and simulations.

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
        endpoint_metrics: bool = True,
        consul_domain: str = "consul",
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self.discovery: Discovery = _default_discovery() if discovery is None else _require_discovery(discovery)
        self._sources = Sources(self.discovery)
        from meshlb.whereabouts import Whereabouts  # with the options of places, which take milliseconds

        self._whereabouts = Whereabouts()
        self._directory = Directory(self.discovery, defaults, services, consul_domain)
        self.clock = clock
        self._random = Random() if random is None else random
        self._own_random = random is None
        self._clusters: dict[ServiceQuery, Cluster] = {}
        self._by_host: dict[str, Cluster] = {}
        self._closed = False
        self._stalls = StallMonitor(clock)
        self._start_afresh()
        self.telemetry = Telemetry(self, tracer_provider, meter_provider, endpoint_metrics=endpoint_metrics)
        control.on_fork(self)

    def _start_afresh(self) -> None:
        self._lock = threading.RLock()
        self._loop: control.ControlLoop | None = None
        self._tasks: dict[object, control.ControlTask] = {}
        # The program's own service as its registry shows it, for subsets that are reckoned from it.
        self._peers: dict[ServiceQuery, PeersSink] = {}
        self._finished = Signal()
        """Set when everything that ``close`` ends has ended."""
        self._finalizer: weakref.finalize[..., Mesh] | None = None

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Mesh:
        """A mesh with the settings of a TOML file; keyword arguments of ``Mesh`` win over it.

        Raises ConfigError naming the file and the key, and OSError if the file cannot be read.
        """
        from meshlb.config_file import read_settings

        return cls(**{**read_settings(path), **overrides})

    # -- services ----------------------------------------------------------------------------------------------

    def cluster(
        self,
        service: str,
        *,
        tag: str | None = None,
        datacenter: str | None = None,
        filter: str | None = None,
        policy: str | None = None,
        source: Source | None = None,
    ) -> Cluster:
        """The instances of a service; made, and its watch started, at the first call.

        ``service`` is a name in the registry, or a Consul DNS name (``v2.orders.service.dc2.consul``). ``policy``: the
        name of one other than the service's configured policy; ``source``: where to ask instead of the mesh's own
        discovery. With either, the state of the endpoints (load, latency, breakers) is not that of calls without it.

        Raises ConfigError for a name that cannot be one; after close MeshClosed, for a service that was in use at its
        first call.
        """
        query = self._directory.query(service, tag, datacenter, filter)
        if policy is not None and policy != self._config_of(query).policy.name:  # type: ignore[union-attr]  # resolved
            query = replace(query, policy=policy)
        if source is not None:
            self._sources.add(source)
            query = replace(query, source=source.name)
        cluster = self._clusters.get(query)
        return self._make_cluster(query) if cluster is None else cluster

    def find(self, host: str) -> Cluster | None:
        """The service that a URL's host means, or None for a host that is no service.

        A host is a service if discovery or ``services`` names it, if it has no dot, or if it is a Consul DNS name
        under ``consul_domain``. IP addresses, ``localhost`` and other dotted names are not. Raises as ``cluster``, also
        for a name under ``consul_domain`` that is no service's (``web.node.consul``).
        """
        cluster = self._by_host.get(host)
        if cluster is None:
            name = host.lower().rstrip(".")
            if not self._directory.is_service(name):
                return None
            cluster = self._by_host[host] = self.cluster(name)
        return cluster

    @property
    def defaults(self) -> ServiceConfig:
        """The configuration of the services that have none of their own."""
        return self._directory.defaults

    @property
    def consul_domain(self) -> str:
        """The DNS domain of Consul's names."""
        return self._directory.domain

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """The services in use."""
        return tuple(self._clusters.values())

    def config_of(self, service: str) -> ServiceConfig:
        """The configuration that the calls to ``service`` (a name in the registry, or a Consul DNS name) use."""
        return self._config_of(self._directory.query(service))

    def _config_of(self, query: ServiceQuery) -> ServiceConfig:
        return self._directory.config_of(query)

    def snapshot(self) -> list[dict[str, Any]]:
        """``Cluster.snapshot`` of every service in use."""
        return [cluster.snapshot() for cluster in self.clusters]

    def _make_cluster(self, query: ServiceQuery) -> Cluster:
        with self._lock:
            cluster = self._clusters.get(query)
            if cluster is not None:
                return cluster
            if self._closed:
                raise MeshClosed(f"service '{query}': the mesh is closed; make a new Mesh")
            for field in ("tag", "datacenter", "filter"):
                if getattr(query, field) is not None:
                    text(f"Mesh.cluster({field})", getattr(query, field))
            config = self._config_of(query)
            cluster = Cluster(
                query,
                config if query.policy is None else replace(config, policy=query.policy),
                clock=self.clock,
                random=self._random,
                background=self,
                on_resume=self._resume,
                stalls=self._stalls,
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
        from meshlb.datacenters import watching  # with asyncio, which `import meshlb` leaves out
        from meshlb.watch import ClusterSink, PeersSink

        if cluster.tiering is not None and cluster.tiering.needs_place:
            self._whereabouts.add(cluster, cluster.tiering.coordinates_interval)
        self._watch(cluster.query, ClusterSink(cluster), cluster.query, watching(cluster, self._whereabouts))
        self._follow_place()
        config = cluster.config
        for peers in {getattr(config.subset, "peers", None), getattr(config.zones, "peers", None)}:
            if peers is None:
                continue
            meant = self._directory.query(peers)
            query = ServiceQuery(meant.service, meant.tag, meant.datacenter)
            sink = self._peers.get(query)
            if sink is None:
                sink = self._peers[query] = PeersSink()
                self._watch(query, sink, sink)
            sink.add(cluster)
        check, loop = cluster.config.health_check, self._loop
        if check is not None and loop is not None:
            from meshlb.health.monitor import checking

            self._tasks[cluster.query, "health"] = loop.run(
                checking(check, cluster, self._random), f"meshlb-health-{cluster.query}"
            )

    def _follow_place(self) -> None:
        """Find out where this process is, once there is a cluster that goes by it."""
        loop, whereabouts, discovery = self._loop, self._whereabouts, self.discovery
        if loop is not None and whereabouts.wanted and whereabouts not in self._tasks:
            self._tasks[whereabouts] = loop.run(lambda: whereabouts.keep(discovery), "meshlb-place")

    def _watch(
        self,
        query: ServiceQuery,
        sink: ClusterSink | PeersSink,
        key: ServiceQuery | PeersSink,
        watch: Callable[..., Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        from meshlb.watch import keep_watching

        loop = self._loop
        if loop is None:
            loop = self._loop = control.acquire()
            # For a mesh that is dropped without close(). What it holds must not lead back to the mesh.
            self._finalizer = weakref.finalize(
                self, control.shut_down, loop, self._tasks.values(), self._sources.aclose, self._finished.set
            )
            self._finalizer.atexit = False  # the control loop's own hook ends everything then
            if self.clock is time.monotonic:  # the beat is the control loop's; by another clock it would mean nothing
                self._stalls.start(loop)
        discovery, asked = self._sources.of(query), query.asked
        watch = keep_watching if watch is None else watch
        self._tasks[key] = loop.run(lambda: watch(discovery, asked, sink), f"meshlb-watch-{query}")

    def _resume(self) -> None:
        """Start the watches again, in the child of a fork, at the first use of a service there."""
        with self._lock:
            closed = self._closed
            if not closed:
                for query, cluster in self._clusters.items():
                    if query not in self._tasks:
                        self._start_watch(cluster)
        if closed:  # the fork came in the middle of close()
            for cluster in self.clusters:
                cluster.close()

    def after_fork_in_child(self) -> None:
        """Forget the parent's control loop and locks; the first use in the child brings its own."""
        self._start_afresh()
        self._sources.after_fork_in_child()
        self._whereabouts.after_fork_in_child()
        self._stalls.after_fork_in_child()
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

        Takes a second at most; on the control loop's own thread it returns at once, and the rest follows. Calls that
        are waiting or come later get MeshClosed. Idempotent, and safe from several threads.
        """
        self._begin_close()
        loop = self._loop
        if loop is not None and not loop.is_current_thread():
            self._finished.wait(control.CLOSE_TIMEOUT)
            self._join(loop)

    async def aclose(self) -> None:
        """``close`` without blocking the running asyncio or trio loop."""
        self._begin_close()
        loop = self._loop
        if loop is not None and not loop.is_current_thread():
            await self._finished.wait_async(control.CLOSE_TIMEOUT)
            self._join(loop)

    def _join(self, loop: control.ControlLoop) -> None:
        if loop.ended.is_set():
            loop.join(_LAST_BREATH)

    def _begin_close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clusters, finalizer = self.clusters, self._finalizer
        self._stalls.stop()
        self.telemetry.close()
        for cluster in clusters:
            cluster.close()
        if finalizer is not None:
            finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._clusters)} services"
        return f"<Mesh {self.discovery!r} {state}>"


def _require_discovery(discovery: object) -> Discovery:
    missing = [name for name in ("watch", "aclose", "knows") if not callable(getattr(discovery, name, None))]
    if missing:
        raise ConfigError(f"Mesh.discovery: {discovery!r} is not a Discovery (no {', '.join(missing)}())")
    return discovery  # type: ignore[return-value]  # checked structurally above


def _default_discovery() -> Discovery:
    from meshlb.discovery.consul import ConsulDiscovery

    return ConsulDiscovery()
