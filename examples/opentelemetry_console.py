"""OpenTelemetry: each attempt is a span that names the instance it went to; one histogram holds all durations.

The exporters print. In production they are `OTLPSpanExporter` and `OTLPMetricExporter`; nothing else changes.
"""

from __future__ import annotations

import json
import sys

import httpx
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from meshlb import Mesh
from meshlb.httpx import MeshTransport


def span_line(span: ReadableSpan) -> str:
    """A span in a line, instead of the SDK's page of JSON."""
    attributes = span.attributes or {}
    shown = {name: value for name, value in attributes.items() if not name.startswith("url.")}
    return f"span {span.name}: {json.dumps(shown)}\n"


def metric_lines(data: MetricsData) -> str:
    """A line for each metric, with how many series it has."""
    return "".join(
        f"metric {metric.name} ({metric.unit}): {len(metric.data.data_points)} series\n"
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )


def main() -> None:
    resource = Resource.create({"service.name": "checkout"})
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stdout, formatter=span_line)))
    trace.set_tracer_provider(tracers)
    reader = PeriodicExportingMetricReader(ConsoleMetricExporter(out=sys.stdout, formatter=metric_lines))
    meters = MeterProvider([reader], resource=resource)
    metrics.set_meter_provider(meters)

    with Mesh() as mesh, httpx.Client(transport=MeshTransport(mesh)) as client:
        with trace.get_tracer(__name__).start_as_current_span("checkout"):
            for number in range(3):
                client.get(f"http://orders/v1/orders/{number}").raise_for_status()
        meters.force_flush()  # while the mesh is open: its gauges are read when metrics are collected

    meters.shutdown()
    tracers.shutdown()


if __name__ == "__main__":
    main()
