"""Programs that switch OpenTelemetry's own instrumentations on, each in a process of its own: they patch globals."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

from tests.support.processes import REPO

_PRELUDE = """
import asyncio, json, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("program")

import meshlb
from meshlb import Mesh, Retry, ServiceConfig
from meshlb.discovery import ConsulDiscovery, StaticDiscovery

def report(**more):
    provider.force_flush()
    spans = [
        {
            "scope": span.instrumentation_scope.name,
            "name": span.name,
            "kind": span.kind.name,
            "id": f"{span.context.span_id:016x}",
            "parent": f"{span.parent.span_id:016x}" if span.parent else None,
            "url": span.attributes.get("url.full") or span.attributes.get("http.url"),
            "status": span.status.status_code.name,
        }
        for span in exporter.get_finished_spans()
    ]
    print(json.dumps({"spans": spans, **more}))
"""

CONTRIB = "opentelemetry.instrumentation."


class Report:
    """The spans of a program, and what else it reported."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.spans: list[dict[str, Any]] = said.pop("spans")
        self.more = said

    def of(self, scope: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["scope"].startswith(scope)]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return self.of("meshlb")

    @property
    def contrib(self) -> list[dict[str, Any]]:
        return self.of(CONTRIB)

    def assert_each_call_of_contribs_has_its_attempts(self) -> None:
        """Each attempt is the child of one of contrib's spans, and each of those has one."""
        calls = {span["id"] for span in self.contrib}
        assert calls
        assert {span["parent"] for span in self.attempts} == calls
        assert {span["kind"] for span in self.spans if span["scope"] != "program"} == {"CLIENT"}


def run(program: str, *arguments: str) -> Report:
    source = _PRELUDE + textwrap.dedent(program)
    ran = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=100, cwd=REPO
    )
    # gRPC's core tells of a server that ends while a connection is still open; that is how these programs end.
    said = [line for line in ran.stderr.splitlines() if ".cc:" not in line]
    assert (ran.returncode, said) == (0, []), ran.stdout + ran.stderr
    return Report(json.loads(ran.stdout))
