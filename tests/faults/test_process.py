"""Faults of this process and of what surrounds it.

The numbers in the names are those of the list of faults in docs/faults.md.
"""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
import weakref
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from meshlb import Endpoint, Mesh
from meshlb.discovery import StaticDiscovery
from tests.faults.fleet import config, endpoints, fleet, start
from tests.support.wait import eventually


@pytest.mark.parametrize("jump", [3600.0, -3600.0], ids=["forward", "back"])
def test_51_the_wall_clock_jumps(jump: float, monkeypatch: pytest.MonkeyPatch):
    """Everything is measured by the monotonic clock; the wall clock is for people and for cookies. Over HTTP alone:
    grpcio computes the deadlines of its calls by the wall clock."""
    with start("http", 3) as backends, fleet("http", backends) as running:
        dead = backends[0]
        dead.kill()
        assert running.run_until(lambda: running.is_out(dead), "noticed").errors == []
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        assert running.run(60).errors == []
        assert {running.state(backend) for backend in backends[1:]} == {"ready"}
        dead.restart()
        assert running.run_until(lambda: running.state(dead) == "ready", "back by itself").errors == []


class Stuck(SpanExporter):
    """An exporter whose collector does not answer."""

    def __init__(self) -> None:
        self.asked, self.over = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.over.wait(60)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.over.set()


def test_58_a_collector_that_hangs_holds_up_no_call():
    import httpx

    from meshlb.httpx import MeshTransport

    exporter = Stuck()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1, max_queue_size=8,
                                                   max_export_batch_size=8))  # fmt: skip
    try:
        with (
            start("http", 2) as backends,
            Mesh(StaticDiscovery({"shop": endpoints(backends)}), defaults=config(), tracer_provider=provider) as mesh,
            httpx.Client(transport=MeshTransport(mesh), timeout=30) as client,
        ):
            client.get("http://shop/")
            eventually(exporter.asked.is_set, 30)
            assert {client.get("http://shop/").status_code for _ in range(50)} == {200}
    finally:
        exporter.over.set()
        provider.shutdown()


def test_60_a_large_set_that_changes_all_the_time_leaves_nothing_behind():
    """A tenth of two thousand endpoints is replaced with each update."""
    with Mesh(StaticDiscovery({"shop": ["127.0.0.1:1"]}), defaults=config()) as mesh:
        cluster = mesh.cluster("shop")
        cluster.wait_ready(30)
        present = [Endpoint(f"10.0.{number >> 8}.{number & 255}", 80) for number in range(2000)]
        following = len(present)

        def replace_a_tenth() -> None:
            nonlocal present, following
            came = [
                Endpoint(f"10.{1 + (n >> 16)}.{n >> 8 & 255}.{n & 255}", 80) for n in range(following, following + 200)
            ]
            following += 200
            present = present[200:] + came
            cluster.update(present)
            for _ in range(5):
                cluster.start().close()

        for _ in range(12):  # everybody has been replaced once: caches are as large as they get
            replace_a_tenth()
        former = [weakref.ref(node) for node in cluster.nodes]
        tracemalloc.start()
        try:
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(24):
                replace_a_tenth()
            assert len(cluster.nodes) == 2000

            def grown() -> int:
                gc.collect()
                return tracemalloc.get_traced_memory()[0] - before

            def forgotten() -> bool:
                return all(reference() is None for reference in former)

            eventually(lambda: forgotten() or grown() < 0, 30, 0.2, lambda: "former endpoints are kept")
            # What is traced are the 2,000 that are there now; those of before were made untraced.
            assert grown() < 2000 * 8_000
        finally:
            tracemalloc.stop()
