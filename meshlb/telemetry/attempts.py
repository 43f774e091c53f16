"""One attempt as a span and a histogram record: what an adapter holds while the attempt is under way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.propagators.textmap import Setter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from meshlb.model import OK, Outcome
from meshlb.telemetry import names

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from meshlb.cluster import Cluster
    from meshlb.node import Lease
    from meshlb.telemetry.instruments import Duration
    from meshlb.telemetry.operations import Attributes, Operation

logger = logging.getLogger("meshlb.telemetry")

Put = Callable[[str, str], object]


class _CallSetter(Setter[Put]):
    """Lets a plain function be what a propagator writes to."""

    def set(self, carrier: Put, key: str, value: str) -> None:
        carrier(key, value)


_SETTER: Final = _CallSetter()


class AttemptTrace:
    """One attempt: its span if a tracer listens, its histogram record if a meter does.

    Whatever a provider, sampler, exporter or propagator raises ends here, in the log. ``parent`` is the context that
    the call was made in: a retry made on another thread hands it on, and so becomes a sibling of the first attempt.
    """

    __slots__ = ("_cluster", "_context", "_duration", "_finished", "_lease", "_operation", "_span", "parent")

    def __init__(
        self, cluster: Cluster, lease: Lease, operation: Operation | None, parent: Context, duration: Duration | None
    ) -> None:
        self._cluster = cluster
        self._lease = lease
        self._operation = operation
        self._duration = duration
        self._span: Span | None = None
        self._context = parent
        self._finished = operation is None
        self.parent = parent

    def start_span(self, tracer: Tracer, attributes: Attributes, resend: int) -> None:
        """Start the span, as a child of ``parent``. Only what a sampler may look at is given at once; an attempt that
        is not recorded does not pay for the rest."""
        operation = self._operation
        if operation is None:
            return
        try:
            span = tracer.start_span(operation.span_name, self.parent, SpanKind.CLIENT, attributes)
            self._context = set_span_in_context(span, self.parent)
            self._span = span
            if span.is_recording():
                endpoint = self._lease.endpoint
                span.set_attributes(
                    {
                        names.NETWORK_PEER_ADDRESS: endpoint.host,
                        names.NETWORK_PEER_PORT: endpoint.port,
                        names.ATTEMPT: resend + 1,
                        **operation.resent(resend),
                    }
                )
        except Exception:
            logger.exception("%s: a span could not be started", self._cluster.service)

    def inject(self, setter: Put) -> None:
        """Hand the trace context of this attempt to ``setter(key, value)``: its own span's, or else the caller's.

        What it is put into must be a copy, or the next attempt would find the headers of this one.
        """
        try:
            propagate.inject(setter, self._context, _SETTER)
        except Exception:
            logger.exception("%s: the trace context could not be injected", self._cluster.service)

    def active(self) -> AbstractContextManager[object]:
        """Make the span current, and have other instrumentations (contrib's for httpx and grpc patch what lies
        beneath us) stay silent: they would make a second span of this attempt. Without a span nothing happens."""
        return nullcontext() if self._span is None else self._activate()

    @contextmanager
    def _activate(self) -> Iterator[None]:
        token = otel_context.attach(otel_context.set_value(names.SUPPRESS_INSTRUMENTATION, True, self._context))
        try:
            yield
        finally:
            otel_context.detach(token)

    def finish(
        self,
        status: str | None = None,
        outcome: Outcome = OK,
        latency: float | None = None,
        *,
        protocol_version: str | None = None,
    ) -> None:
        """End the span and record the duration. Later calls do nothing.

        ``status``: the protocol's own ("503", "UNAVAILABLE"), None if there was no answer. ``latency``: seconds to
        the start of the response, as in ``lease.latency``; None (no answer) records the seconds since the attempt
        began. ``protocol_version``: "1.1" or "2", if known.
        """
        if self._finished or self._operation is None:
            return
        self._finished = True
        if latency is None:
            latency = max(0.0, self._cluster.clock() - self._lease.started)
        try:
            error = self._operation.error(status, outcome)
            if self._duration is not None:
                # Before the span ends and with its context: that is how the SDK finds the exemplar's trace.
                self._duration.record(latency, self._operation.duration(status, error), self._context)
        except Exception:
            logger.exception("%s: a duration could not be recorded", self._cluster.service)
        if self._span is not None:
            try:
                self._end_span(self._span, status, outcome, latency, protocol_version)
            except Exception:
                logger.exception("%s: a span could not be ended", self._cluster.service)

    def _end_span(
        self, span: Span, status: str | None, outcome: Outcome, latency: float, protocol_version: str | None
    ) -> None:
        if span.is_recording() and self._operation is not None:
            error = self._operation.error(status, outcome)
            attributes = self._operation.end(status, error)
            attributes[names.OUTCOME] = outcome.kind.value
            attributes[names.LATENCY] = latency
            if protocol_version is not None:
                attributes[names.NETWORK_PROTOCOL_VERSION] = protocol_version
            span.set_attributes(attributes)
            if error is not None:
                # With a status code the convention wants no description: it would repeat the code.
                span.set_status(Status(StatusCode.ERROR, outcome.reason or None if status is None else None))
        span.end()
