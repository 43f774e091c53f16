"""A mesh whose clock a test moves, and the in-memory ends of a real OpenTelemetry SDK."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler

from meshlb import Cluster, Endpoint, Mesh, ServiceConfig
from meshlb.testing import FakeClock, LocalMesh

ENDPOINTS = (Endpoint("10.0.0.1", 8001, zone="a"), Endpoint("10.0.0.2", 8002, weight=3))


class Rig:
    def __init__(self, sampler: Sampler = ALWAYS_ON, **settings: Any) -> None:
        self.spans = InMemorySpanExporter()
        self.tracers = TracerProvider(sampler=sampler)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.clock = FakeClock(100.0)
        self.mesh = self.make_mesh(**settings)
        self.cluster: Cluster = self.mesh.cluster("orders")

    def make_mesh(self, **settings: Any) -> Mesh:
        """Another mesh of the same program."""
        given = {
            "tracer_provider": self.tracers,
            "meter_provider": self.meters,
            "clock": self.clock,
            "defaults": ServiceConfig(policy="round_robin"),
            **settings,
        }
        return LocalMesh({"orders": ENDPOINTS}, **given)

    @property
    def span(self) -> ReadableSpan:
        """The only span there is."""
        (span,) = self.spans.get_finished_spans()
        return span

    def points(self, name: str) -> list[Any]:
        """The data points of one instrument, collected now."""
        data = self.reader.get_metrics_data()
        if data is None:
            return []
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def values(self, name: str, *keys: str) -> dict[Any, float]:
        """The values of one instrument by the named attributes."""
        return {
            tuple(point.attributes[key] for key in keys) if len(keys) > 1 else point.attributes[keys[0]]: point.value
            for point in self.points(name)
        }

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.mesh.close()
        self.tracers.shutdown()
        self.meters.shutdown()
