"""opentelemetry-instrumentation-httpx, for httpx and httpx2, beside our own spans."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.backends import Backend, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.registered import registered
from tests.telemetry.contrib import Report, run

PROGRAM = """
import importlib
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor, HTTPXClientInstrumentor

name, switched, *addresses = sys.argv[1:]
httpx, transports = importlib.import_module(name), importlib.import_module(f"meshlb.{name}")
instrumentor = {"httpx": HTTPXClientInstrumentor, "httpx2": HTTPX2ClientInstrumentor}[name]()
if "everywhere" in switched:
    instrumentor.instrument()

config = ServiceConfig(policy="round_robin", breaker=None, retry=Retry(budget=None), connect_timeout=20)
ours = trace.NoOpTracerProvider() if "ours off" in switched else None
mesh = Mesh(StaticDiscovery({"orders": addresses}), defaults=config, tracer_provider=ours)
seen = []

def note(response):
    assert response.status_code == 200
    assert "traceparent" not in httpx.Request("GET", "http://x").headers
    seen.append(response.json()["headers"]["traceparent"].split("-")[2])

def sync():
    with httpx.Client(transport=transports.MeshTransport(mesh), timeout=30) as client:
        if "client" in switched:
            instrumentor.instrument_client(client)
        for number in range(3):
            note(client.get(f"http://orders/{number}"))
        if "client" not in switched:
            assert client.get(f"http://{addresses[0]}/sync").status_code

async def concurrent():
    async with mesh, httpx.AsyncClient(transport=transports.AsyncMeshTransport(mesh), timeout=30) as client:
        if "client" in switched:
            instrumentor.instrument_client(client)
        for number in range(3):
            note(await client.get(f"http://orders/{number}"))
        if "client" not in switched:
            assert (await client.get(f"http://{addresses[0]}/async")).status_code

with tracer.start_as_current_span("program"):
    sync()
    asyncio.run(concurrent())
report(seen=seen)
"""


@pytest.fixture(scope="module")
def backends() -> Iterator[list[Backend]]:
    with http_backends(2) as backends:
        backends[0].behave(status=503)
        yield backends


modules = pytest.mark.parametrize("module", ["httpx", "httpx2"])


def spans_of(module: str, switched: str, backends: list[Backend]) -> Report:
    report = run(PROGRAM, module, switched, *(backend.address for backend in backends))
    # The trace that a server is sent is that of the very attempt.
    served = [span["id"] for span in report.attempts if span["status"] != "ERROR"]
    assert report.more["seen"] == served
    assert len(served) == 6
    assert len(report.attempts) > 6  # some were retried
    assert {span["url"].rpartition("/")[0] for span in report.attempts} == {"http://orders"}
    return report


@modules
def test_instrumented_everywhere_it_makes_no_second_span_of_an_attempt(module: str, backends: list[Backend]) -> None:
    report = spans_of(module, "everywhere", backends)
    [program] = report.of("program")
    assert {span["parent"] for span in report.attempts} == {program["id"]}
    # Its spans are of the requests that were not for a service.
    assert [span["url"].rpartition("/")[2] for span in report.contrib] == ["sync", "async"]


@modules
@pytest.mark.parametrize("switched", ["client", "client and everywhere"])
def test_an_instrumented_clients_span_is_the_call(module: str, switched: str, backends: list[Backend]) -> None:
    report = spans_of(module, switched, backends)
    [program] = report.of("program")
    assert len(report.contrib) == 6
    assert {span["parent"] for span in report.contrib} == {program["id"]}
    assert {span["url"].rpartition("/")[0] for span in report.contrib} == {"http://orders"}
    report.assert_each_call_of_contribs_has_its_attempts()


def test_ours_switched_off_its_spans_are_the_attempts(backends: list[Backend]) -> None:
    report = run(PROGRAM, "httpx", "everywhere, ours off", *(backend.address for backend in backends))
    assert report.attempts == []
    [program] = report.of("program")
    assert {span["parent"] for span in report.contrib} == {program["id"]}
    to_instances = [span for span in report.contrib if "sync" not in span["url"]]
    assert [span["id"] for span in to_instances if span["status"] != "ERROR"] == report.more["seen"]


def test_the_watch_of_consul_is_not_traced(consul_agent: ConsulAgent, service_name: str) -> None:
    with http_backends(1) as backends, registered(consul_agent, service_name, backends):
        report = run(
            """
            from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
            HTTPXClientInstrumentor().instrument()
            import httpx
            from meshlb.httpx import MeshTransport
            with Mesh(ConsulDiscovery(sys.argv[1])) as mesh, httpx.Client(transport=MeshTransport(mesh)) as client:
                assert client.get(f"http://{sys.argv[2]}/", timeout=30).status_code == 200
            report()
            """,
            consul_agent.address,
            service_name,
        )
    assert {span["scope"] for span in report.spans} == {"meshlb"}
