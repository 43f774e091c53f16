"""A mesh's telemetry: who listens, and the traces of attempts for those who do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol

from meshlb.telemetry import names
from meshlb.telemetry.operations import HttpOperation, RpcOperation
from meshlb.telemetry.urls import redact
from meshlb.telemetry.version import library_version

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider

    from meshlb.cluster import Cluster
    from meshlb.node import Lease
    from meshlb.telemetry.attempts import AttemptTrace
    from meshlb.telemetry.instruments import Instruments

logger = logging.getLogger("meshlb.telemetry")

_LOOK_INTERVAL: Final = 0.1
"""Seconds between two looks for a global provider, while there is none. A look costs 2 us, so this is nothing; a
program that sets its providers after its first calls misses a tenth of a second of them."""

_MOST_OPERATIONS: Final = 10_000
"""Operations whose attributes are kept. A program has a few hundred; the limit is for one that makes up methods."""


class ClusterOwner(Protocol):
    """The mesh."""

    @property
    def clusters(self) -> tuple[Cluster, ...]: ...


class Telemetry:
    """Spans and metrics of one mesh, through the OpenTelemetry API alone.

    ``tracer_provider``, ``meter_provider``: None means the global ones, also those that are set later.
    ``endpoint_metrics``: whether each endpoint has series of its own (else only services have).

    **Without an SDK** an attempt costs a comparison and a look at the context variable. Asking the API for the
    global providers at each attempt would cost more than a pick (0.8 us for each of two: it reads the environment),
    and a no-op span costs 0.4 us plus its attributes. So they are asked for at most every tenth of a second, by the
    time that the lease has noted anyway, until they are there. What they hand out is judged by where its class comes
    from: the API package holds nothing but proxies and no-ops, so whatever does something comes from elsewhere. That
    is also right for ``OTEL_SDK_DISABLED`` and needs no private name.

    A context that the program has put there without any SDK (a proxy that passes on ``traceparent``) is passed on.

    Nothing that a provider raises gets through to a call.
    """

    def __init__(
        self,
        mesh: ClusterOwner,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
        *,
        endpoint_metrics: bool = True,
    ) -> None:
        self.endpoint_metrics = endpoint_metrics
        self._mesh: ClusterOwner | None = mesh
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider
        self._instruments: Instruments | None = None
        self._tracer: Tracer | None = None
        self._records = False
        self._listens = False
        self._look_at = -inf
        self.quiet_until = -inf
        """Until when, by the clusters' clock, nobody listens. Then only a context of the program's own, if ``current``
        has one, is to be passed on."""
        self.current: Callable[[], Context]  # from the first look on, which precedes their first use
        self._trace: type[AttemptTrace]
        self._http: dict[tuple[Cluster, str, str, int | None], HttpOperation] = {}
        self._rpc: dict[tuple[Cluster, str], RpcOperation] = {}

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """The services to report; none after ``close``."""
        mesh = self._mesh
        return () if mesh is None else mesh.clusters

    def cluster_added(self, cluster: Cluster) -> None:
        """Register the instruments. The API is imported here, before any attempt whose latency that would spoil."""
        if self._mesh is None:
            return
        if self._instruments is None:
            try:
                from meshlb.telemetry.instruments import instruments_of

                instruments = instruments_of(self._meter_provider)
                instruments.add(self)
                self._instruments = instruments
            except Exception:
                logger.exception("%s: there will be no metrics: the meter provider failed", cluster.service)
        self._look(cluster.clock())

    def close(self) -> None:
        """Report no metrics any more. Attempts under way may still be finished."""
        if self._instruments is not None:
            self._instruments.remove(self)
        self._mesh = None

    # -- attempts ----------------------------------------------------------------------------------------------

    def http_attempt(
        self,
        cluster: Cluster,
        lease: Lease,
        *,
        method: str,
        url: str | Callable[[], str],
        scheme: str = "http",
        port: int | None = None,
        resend: int = 0,
        parent: Context | None = None,
    ) -> AttemptTrace | None:
        """The trace of an HTTP attempt that has just begun; None if there is nothing to tell anybody.

        ``url``: the logical URL, or what makes it if it is wanted. ``port``: the one it names, None for its scheme's
        default. ``resend``: 0 for a first attempt. ``parent``: the context of the call where it is not the current
        one, as ``AttemptTrace.parent`` of the first attempt has it.
        """
        if lease.started < self.quiet_until and parent is None and not self.current():
            return None
        if lease.started >= self._look_at:
            self._look(lease.started)
        if parent is None:
            parent = self.current()
        if not self._listens or names.SUPPRESS_INSTRUMENTATION in parent:
            return self._trace(cluster, lease, None, parent, None) if parent else None
        try:
            key = (cluster, method, scheme, port)
            operation = self._http.get(key)
            if operation is None:
                if len(self._http) >= _MOST_OPERATIONS:
                    self._http.clear()
                operation = self._http[key] = HttpOperation(cluster.query, method, scheme, port)
            duration = self._instruments.http_duration if self._records and self._instruments is not None else None
            trace = self._trace(cluster, lease, operation, parent, duration)
            if self._tracer is not None:
                full = redact(url if isinstance(url, str) else url())
                trace.start_span(self._tracer, {**operation.span_attributes, names.URL_FULL: full}, resend)
        except Exception:
            logger.exception("%s: an attempt could not be traced", cluster.service)
            return None
        return trace

    def rpc_attempt(
        self, cluster: Cluster, lease: Lease, *, method: str, resend: int = 0, parent: Context | None = None
    ) -> AttemptTrace | None:
        """The trace of a gRPC attempt that has just begun; None if there is nothing to tell anybody.

        ``method``: "/package.Service/Method". The rest as in ``http_attempt``.
        """
        if lease.started < self.quiet_until and parent is None and not self.current():
            return None
        if lease.started >= self._look_at:
            self._look(lease.started)
        if parent is None:
            parent = self.current()
        if not self._listens or names.SUPPRESS_INSTRUMENTATION in parent:
            return self._trace(cluster, lease, None, parent, None) if parent else None
        try:
            key = (cluster, method)
            operation = self._rpc.get(key)
            if operation is None:
                if len(self._rpc) >= _MOST_OPERATIONS:
                    self._rpc.clear()
                operation = self._rpc[key] = RpcOperation(cluster.query, method)
            duration = self._instruments.rpc_duration if self._records and self._instruments is not None else None
            trace = self._trace(cluster, lease, operation, parent, duration)
            if self._tracer is not None:
                trace.start_span(self._tracer, operation.span_attributes, resend)
        except Exception:
            logger.exception("%s: an attempt could not be traced", cluster.service)
            return None
        return trace

    # -- who listens -------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Find out who listens, and when to look again."""
        from opentelemetry import context

        from meshlb.telemetry.attempts import AttemptTrace

        self.current = _reader_of(context)
        self._trace = AttemptTrace
        self._look_at = inf
        for find in self._find_tracer, self._find_meter:
            try:
                if find():
                    self._look_at = now + _LOOK_INTERVAL
            except Exception:  # if the other one is found, this is the only time that it is said
                logger.exception("a tracer or meter provider failed: its spans or metrics will be missing")
        self._listens = self._tracer is not None or self._records
        self.quiet_until = -inf if self._listens else self._look_at

    def _find_tracer(self) -> bool:
        """Get a tracer that does something. True if there is none, but may be later."""
        from opentelemetry import trace

        if self._tracer is not None:
            return False
        provider = trace.get_tracer_provider() if self._tracer_provider is None else self._tracer_provider
        if _is_of_the_api(provider):
            return self._tracer_provider is None
        tracer = provider.get_tracer(names.SCOPE, library_version(), names.SCHEMA_URL)
        if not _is_of_the_api(tracer):  # as a disabled SDK's is
            self._tracer = tracer
        return False

    def _find_meter(self) -> bool:
        """Find out whether histograms go anywhere. True if they do not, but may later."""
        from opentelemetry import metrics

        if self._records or self._instruments is None:
            return False
        provider = metrics.get_meter_provider() if self._meter_provider is None else self._meter_provider
        if _is_of_the_api(provider):
            return self._meter_provider is None
        self._records = not _is_of_the_api(provider.get_meter(names.SCOPE, library_version(), names.SCHEMA_URL))
        return False


def _reader_of(context: Any) -> Callable[[], Context]:
    """``context.get_current``, or what lies two Python calls below it: the reading of a context variable, which is all
    that is left of telemetry on the path of a call while nobody listens."""
    variable = getattr(getattr(context, "_RUNTIME_CONTEXT", None), "_current_context", None)
    reader: Callable[[], Context] = variable.get if isinstance(variable, ContextVar) else context.get_current
    return reader


def _is_of_the_api(thing: object) -> bool:
    """Whether an object is one of the API package's own proxies and no-ops."""
    return type(thing).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))
