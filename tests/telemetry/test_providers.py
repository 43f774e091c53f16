"""Who listens, found out at run time. The global providers can be set once a process, so these tests use their own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider, TracerProvider

from meshlb.testing import LocalMesh
from tests.telemetry.rig import Rig

SET_UP = """
import sys, time
import opentelemetry.trace as trace, opentelemetry.metrics as metrics, opentelemetry.context as context
from meshlb import Mesh
from meshlb.discovery import StaticDiscovery

mesh = Mesh(StaticDiscovery({"orders": ["127.0.0.1:8001"]}))
cluster = mesh.cluster("orders")
cluster.wait_ready(5)

def attempt():
    lease = cluster.start()
    made = mesh.telemetry.http_attempt(cluster, lease, method="GET", url="http://orders/", scheme="http")
    headers = {}
    if made is not None:
        made.inject(headers.__setitem__)
        with made.active():
            pass
        made.finish("200", latency=0.1)
    lease.close()
    return made, headers

def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""


def run(program: str, **environment: str) -> None:
    whole = textwrap.dedent(SET_UP) + textwrap.dedent(program) + "\nmesh.close()\n"
    subprocess.run([sys.executable, "-W", "error", "-c", whole], check=True, env={**os.environ, **environment})


def test_without_an_sdk_there_is_nothing_to_do():
    run("""
        assert attempt() == (None, {})
        assert mesh.telemetry.rpc_attempt(cluster, cluster.start(), method="/a/b") is None
        assert "opentelemetry.sdk" not in sys.modules
    """)


def test_without_an_sdk_the_callers_context_is_passed_on():
    run("""
        from opentelemetry import propagate
        given = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
        token = context.attach(propagate.extract(given))
        assert attempt()[1] == given
        context.detach(token)
        assert attempt() == (None, {})
    """)


def test_providers_that_are_set_after_the_first_calls_are_found():
    run("""
        assert attempt()[0] is None
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        def points(name):
            data = reader.get_metrics_data()
            return [p for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics
                    if m.name == name for p in m.data.data_points]

        spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(spans))
        trace.set_tracer_provider(tracers)
        eventually(lambda: attempt()[0] is not None)
        assert [span.name for span in spans.get_finished_spans()] == ["GET"]

        metrics.set_meter_provider(MeterProvider([reader]))
        assert points("meshlb.endpoint.calls")[0].value >= 2
        eventually(lambda: attempt() and points("http.client.request.duration"))

        second = Mesh(StaticDiscovery({"orders": ["127.0.0.1:8001"]}))
        second.cluster("orders").wait_ready(5)
        assert len(points("meshlb.endpoint.calls")) == 1
        second.close()
    """)


def test_a_disabled_sdk_is_as_good_as_none():
    run(
        """
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.metrics import MeterProvider
        trace.set_tracer_provider(TracerProvider())
        metrics.set_meter_provider(MeterProvider())
        another = Mesh(StaticDiscovery({"orders": ["127.0.0.1:8001"]}))
        cluster = another.cluster("orders")
        cluster.wait_ready(5)
        mesh.close()
        mesh = another
        assert attempt() == (None, {})
        """,
        OTEL_SDK_DISABLED="true",
    )


def test_no_op_providers_are_as_good_as_none():
    with Rig(tracer_provider=NoOpTracerProvider(), meter_provider=NoOpMeterProvider()) as rig:
        lease = rig.cluster.start()
        assert rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/a/b") is None
        lease.close()


class BrokenTracerProvider(TracerProvider):
    def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no tracer")


class BrokenMeterProvider(MeterProvider):
    def get_meter(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no meter")


def test_what_providers_raise_stays_in_the_log_and_the_other_one_works(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR, "meshlb.telemetry"), Rig(tracer_provider=BrokenTracerProvider()) as rig:
        for _ in range(3):
            lease = rig.cluster.start()
            attempt = rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/a/b")
            attempt.finish("OK")
            lease.close()
            rig.clock.advance(1.0)
        (point,) = rig.points("rpc.client.call.duration")
        assert point.count == 3
    assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.ERROR, "meshlb.telemetry"), Rig(meter_provider=BrokenMeterProvider()) as rig:
        lease = rig.cluster.start()
        rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/a/b").finish("OK")
        lease.close()
        assert rig.span.name == "a/b"
    assert len(caplog.records) == 1


def test_a_tracer_that_raises_costs_no_call(caplog: pytest.LogCaptureFixture):
    class BrokenTracer:
        def start_span(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no span")

    class Provider(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            return BrokenTracer()

    with LocalMesh({"orders": ["127.0.0.1:1"]}, tracer_provider=Provider()) as mesh:
        cluster = mesh.cluster("orders")
        lease = cluster.start()
        attempt = mesh.telemetry.http_attempt(cluster, lease, method="GET", url="http://orders/", scheme="http")
        attempt.inject(lambda key, value: None)
        with attempt.active():
            pass
        attempt.finish("200")
        lease.close()
    assert "a span could not be started" in caplog.text
