from __future__ import annotations

import logging
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from meshlb.model import CANCELLED, OK, Outcome, OutcomeKind, Sent
from tests.telemetry.rig import Rig

FAILED = Outcome(OutcomeKind.FAILURE, Sent.ANSWERED, retryable=True, reason="503")
REFUSED = Outcome(OutcomeKind.FAILURE, Sent.NOT_SENT, retryable=True, reason="ConnectError")


def http(rig: Rig, status: str | None = "200", outcome: Outcome = OK, **given: Any) -> dict[str, str]:
    """Make one whole attempt; returns the headers that it carried."""
    lease = rig.cluster.start()
    asked = {"method": "GET", "url": "http://orders/v1/orders/42?q=1", "scheme": "http", **given}
    attempt = rig.mesh.telemetry.http_attempt(rig.cluster, lease, **asked)
    assert attempt is not None
    headers: dict[str, str] = {}
    attempt.inject(headers.__setitem__)
    rig.clock.advance(0.25)
    lease.close(outcome)
    attempt.finish(status, outcome, lease.latency)
    return headers


def rpc(rig: Rig, status: str | None = "OK", outcome: Outcome = OK, resend: int = 0) -> dict[str, str]:
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/shop.Orders/Get", resend=resend)
    assert attempt is not None
    metadata: dict[str, str] = {}
    attempt.inject(metadata.__setitem__)
    rig.clock.advance(0.25)
    lease.close(outcome)
    attempt.finish(status, outcome, lease.latency)
    return metadata


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_http_span(rig: Rig):
    http(rig)
    span = rig.span
    assert (span.name, span.kind, span.status.status_code) == ("GET", SpanKind.CLIENT, StatusCode.UNSET)
    found = attributes(span)
    assert (found.pop("network.peer.address"), found.pop("network.peer.port")) in {
        ("10.0.0.1", 8001),
        ("10.0.0.2", 8002),
    }
    assert found == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "server.address": "orders",
        "server.port": 80,
        "url.scheme": "http",
        "url.full": "http://orders/v1/orders/42?q=1",
        "meshlb.service": "orders",
        "meshlb.attempt": 1,
        "meshlb.outcome": "ok",
        "meshlb.latency": 0.25,
    }
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "meshlb"
    assert span.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.44.0"


def test_rpc_span(rig: Rig):
    rpc(rig)
    span = rig.span
    assert (span.name, span.kind, span.status.status_code) == ("shop.Orders/Get", SpanKind.CLIENT, StatusCode.UNSET)
    found = attributes(span)
    assert found.pop("network.peer.address").startswith("10.0.0.")
    assert found.pop("network.peer.port") in {8001, 8002}
    assert found == {
        "rpc.system.name": "grpc",
        "rpc.method": "shop.Orders/Get",
        "rpc.response.status_code": "OK",
        "server.address": "orders",
        "meshlb.service": "orders",
        "meshlb.attempt": 1,
        "meshlb.outcome": "ok",
        "meshlb.latency": 0.25,
    }


def test_the_peer_is_the_endpoint_of_the_lease(rig: Rig):
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.http_attempt(rig.cluster, lease, method="GET", url="http://orders/", scheme="http")
    attempt.finish("200")
    lease.close()
    found = attributes(rig.span)
    assert (found["network.peer.address"], found["network.peer.port"]) == (lease.endpoint.host, lease.endpoint.port)


@pytest.mark.parametrize(
    ("status", "outcome", "error", "described"),
    [
        ("200", OK, None, None),
        ("399", OK, None, None),
        ("404", OK, "404", None),
        ("503", FAILED, "503", None),
        (None, REFUSED, "ConnectError", "ConnectError"),
        (None, Outcome(OutcomeKind.FAILURE), "_OTHER", None),
        (None, Outcome(OutcomeKind.IGNORED, reason="PoolTimeout"), "PoolTimeout", "PoolTimeout"),
        (None, CANCELLED, None, None),
    ],
)
def test_http_errors(rig: Rig, status: str | None, outcome: Outcome, error: str | None, described: str | None):
    http(rig, status, outcome)
    span = rig.span
    assert attributes(span).get("error.type") == error
    assert span.status.status_code is (StatusCode.UNSET if error is None else StatusCode.ERROR)
    assert span.status.description == described
    (point,) = rig.points("http.client.request.duration")
    assert point.attributes.get("error.type") == error
    assert point.attributes.get("http.response.status_code") == (None if status is None else int(status))


@pytest.mark.parametrize(
    ("status", "outcome", "error"),
    [
        ("UNAVAILABLE", Outcome(OutcomeKind.FAILURE, reason="UNAVAILABLE"), "UNAVAILABLE"),
        ("INVALID_ARGUMENT", Outcome(OutcomeKind.IGNORED, reason="INVALID_ARGUMENT"), "INVALID_ARGUMENT"),
        ("CANCELLED", Outcome(OutcomeKind.FAILURE, reason="CANCELLED"), "CANCELLED"),  # the server's doing
        ("CANCELLED", CANCELLED, None),
        (None, CANCELLED, None),
    ],
)
def test_rpc_errors(rig: Rig, status: str | None, outcome: Outcome, error: str | None):
    rpc(rig, status, outcome)
    assert attributes(rig.span).get("error.type") == error
    assert rig.span.status.status_code is (StatusCode.UNSET if error is None else StatusCode.ERROR)
    (point,) = rig.points("rpc.client.call.duration")
    assert point.attributes.get("error.type") == error


def test_an_unknown_method_makes_no_new_names(rig: Rig):
    http(rig, method="FROBNICATE")
    assert rig.span.name == "HTTP"
    found = attributes(rig.span)
    assert (found["http.request.method"], found["http.request.method_original"]) == ("_OTHER", "FROBNICATE")
    (point,) = rig.points("http.client.request.duration")
    assert point.attributes["http.request.method"] == "_OTHER"
    assert "http.request.method_original" not in point.attributes


@pytest.mark.parametrize(
    ("given", "port"), [({"scheme": "https"}, 443), ({"port": 8080}, 8080), ({"scheme": "gopher"}, None)]
)
def test_the_server_port_is_that_of_the_logical_url(rig: Rig, given: dict[str, Any], port: int | None):
    http(rig, **given)
    assert attributes(rig.span).get("server.port") == port
    (point,) = rig.points("http.client.request.duration")
    assert point.attributes.get("server.port") == port


def test_the_url_is_made_only_for_a_tracer():
    with Rig(tracer_provider=trace.NoOpTracerProvider()) as rig:
        http(rig, url=lambda: pytest.fail("nobody wants the URL"))
    with Rig() as rig:
        http(rig, url=lambda: "http://user:secret@orders/")
        assert attributes(rig.span)["url.full"] == "http://REDACTED:REDACTED@orders/"


def test_the_protocol_version_if_known(rig: Rig):
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.http_attempt(rig.cluster, lease, method="GET", url="http://orders/", scheme="http")
    attempt.finish("200", OK, 0.1, protocol_version="2")
    lease.close()
    assert attributes(rig.span)["network.protocol.version"] == "2"


def test_attempts_are_siblings_under_the_callers_span_and_each_carries_its_own_context(rig: Rig):
    tracer = rig.tracers.get_tracer("program")
    with tracer.start_as_current_span("call") as call:
        first = http(rig, "503", FAILED)
        second = http(rig, resend=1)
    attempts = [span for span in rig.spans.get_finished_spans() if span.name == "GET"]
    assert [span.parent.span_id if span.parent else None for span in attempts] == [call.get_span_context().span_id] * 2
    for span, headers in zip(attempts, (first, second), strict=True):
        version, trace_id, span_id, flags = headers["traceparent"].split("-")
        assert (version, trace_id, span_id) == ("00", f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")
        assert int(flags, 16) & trace.TraceFlags.SAMPLED
    assert first["traceparent"] != second["traceparent"]
    assert [attributes(span).get("http.request.resend_count") for span in attempts] == [None, 1]
    assert [attributes(span)["meshlb.attempt"] for span in attempts] == [1, 2]


def test_a_retry_elsewhere_is_given_the_parent_of_the_first_attempt(rig: Rig):
    telemetry, lease = rig.mesh.telemetry, rig.cluster.start()
    with rig.tracers.get_tracer("program").start_as_current_span("call") as call:
        first = telemetry.rpc_attempt(rig.cluster, lease, method="/shop.Orders/Get")
    first.finish("UNAVAILABLE", FAILED)
    second = telemetry.rpc_attempt(rig.cluster, lease, method="/shop.Orders/Get", resend=1, parent=first.parent)
    second.finish("OK")
    lease.close()
    attempts = [span for span in rig.spans.get_finished_spans() if span.name == "shop.Orders/Get"]
    assert [span.parent.span_id for span in attempts] == [call.get_span_context().span_id] * 2


def test_baggage_travels(rig: Rig):
    token = context.attach(baggage.set_baggage("user", "42"))
    try:
        headers = http(rig)
    finally:
        context.detach(token)
    assert headers["baggage"] == "user=42"


def test_an_unsampled_attempt_is_not_exported_but_its_context_travels():
    with Rig(ParentBased(ALWAYS_OFF)) as rig:
        headers = http(rig)
        assert not int(headers["traceparent"].rpartition("-")[2], 16) & trace.TraceFlags.SAMPLED
        assert rig.spans.get_finished_spans() == ()
        (point,) = rig.points("http.client.request.duration")
        assert point.count == 1


def test_the_duration_is_the_latency_that_balances(rig: Rig):
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.http_attempt(rig.cluster, lease, method="GET", url="http://orders/", scheme="http")
    rig.clock.advance(0.5)
    lease.answered()
    rig.clock.advance(60.0)  # the body
    lease.close()
    attempt.finish("200", OK, lease.latency)
    (point,) = rig.points("http.client.request.duration")
    assert point.sum == lease.latency == 0.5
    assert lease.node.latency.value == 0.5
    assert attributes(rig.span)["meshlb.latency"] == 0.5
    assert point.explicit_bounds[:3] == (0.005, 0.01, 0.025)
    assert point.explicit_bounds[-1] == 10.0
    assert point.attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "server.address": "orders",
        "server.port": 80,
        "url.scheme": "http",
    }


def test_an_attempt_without_an_answer_records_the_time_it_took(rig: Rig):
    http(rig, None, REFUSED)
    (point,) = rig.points("http.client.request.duration")
    assert (point.sum, point.count) == (0.25, 1)


def test_one_record_an_attempt_with_the_trace_as_exemplar(rig: Rig):
    rpc(rig, "UNAVAILABLE", FAILED)
    rpc(rig, resend=1)
    rpc(rig)
    counts = {point.attributes["rpc.response.status_code"]: point for point in rig.points("rpc.client.call.duration")}
    assert {status: point.count for status, point in counts.items()} == {"UNAVAILABLE": 1, "OK": 2}
    traces = {span.context.trace_id for span in rig.spans.get_finished_spans()}
    assert {exemplar.trace_id for point in counts.values() for exemplar in point.exemplars} <= traces
    assert counts["UNAVAILABLE"].exemplars


def test_finish_counts_once(rig: Rig):
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/a/b")
    attempt.finish("OK")
    attempt.finish("INTERNAL", FAILED)
    lease.close()
    assert attributes(rig.span)["rpc.response.status_code"] == "OK"
    (point,) = rig.points("rpc.client.call.duration")
    assert point.count == 1


def test_active_makes_the_span_current_and_silences_other_instrumentations(rig: Rig):
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.http_attempt(rig.cluster, lease, method="GET", url="http://orders/", scheme="http")
    with attempt.active():
        inside = trace.get_current_span().get_span_context()
        assert context.get_value("suppress_instrumentation") is True
    assert not trace.get_current_span().get_span_context().is_valid
    assert context.get_value("suppress_instrumentation") is None
    attempt.finish("200")
    lease.close()
    assert rig.span.context == inside


def test_a_caller_that_suppresses_gets_no_span_but_its_context_travels(rig: Rig):
    with rig.tracers.get_tracer("program").start_as_current_span("call") as call:
        token = context.attach(context.set_value("suppress_instrumentation", True))
        try:
            headers = http(rig)
        finally:
            context.detach(token)
    assert [span.name for span in rig.spans.get_finished_spans()] == ["call"]
    assert f"{call.get_span_context().span_id:016x}" in headers["traceparent"]


class Raising(SpanProcessor):
    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        if span.name == "shop.Orders/Get":
            raise RuntimeError("on_start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end")


def test_what_a_span_processor_raises_stays_in_the_log(rig: Rig, caplog: pytest.LogCaptureFixture):
    rig.tracers.add_span_processor(Raising())
    with caplog.at_level(logging.ERROR, "meshlb.telemetry"):
        assert "traceparent" in http(rig)
        rpc(rig)
    assert [record.exc_info[1].args[0] for record in caplog.records if record.exc_info] == ["on_end", "on_start"]
    assert len(rig.points("rpc.client.call.duration")) == 1


def test_what_an_adapter_or_propagator_raises_stays_in_the_log(rig: Rig, caplog: pytest.LogCaptureFixture):
    lease = rig.cluster.start()
    attempt = rig.mesh.telemetry.rpc_attempt(rig.cluster, lease, method="/a/b")

    def broken(key: str, value: str) -> None:
        raise RuntimeError(key)

    attempt.inject(broken)
    attempt.finish("OK")
    lease.close()
    assert "could not be injected" in caplog.text
