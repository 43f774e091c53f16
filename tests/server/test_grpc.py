"""The interceptors on real servers: all kinds of method, in all styles of handler."""

from __future__ import annotations

import contextlib
import functools
import socket
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from meshlb.balancing.orca import TEXT_HEADER, parse_binary, parse_header
from meshlb.balancing.prequal import IN_FLIGHT_METRIC, LATENCY_METRIC
from meshlb.server import LoadMeter
from meshlb.server.grpc import AioLoadReportInterceptor, LoadReportInterceptor
from meshlb.testing import FakeClock
from tests.server.rpc_service import KINDS, OWN_REPORT, STYLES, Answer, Gate, call, finish, serving, start
from tests.support.wait import eventually


class Rig:
    """A server in one style, its meter, and a bare channel to it."""

    def __init__(self, stack: contextlib.ExitStack, style: str, *, intercepted: bool = True, **options: Any) -> None:
        self.gate = Gate()
        server_options = {name: options.pop(name) for name in ("threads", "maximum_concurrent_rpcs") if name in options}
        interceptor: Any = LoadReportInterceptor if style == "sync" else AioLoadReportInterceptor
        interceptors = []
        if intercepted:
            interceptors = [interceptor(**options)]
            self.meter: LoadMeter = interceptors[0].meter
        self.address = stack.enter_context(serving(style, self.gate, *interceptors, **server_options))
        self.channel = stack.enter_context(grpc.insecure_channel(self.address))
        self.call: Callable[..., Answer] = functools.partial(call, self.channel)


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def rig(style: str) -> Iterator[Callable[..., Rig]]:
    with contextlib.ExitStack() as stack:
        yield functools.partial(Rig, stack, style)


def report_of(answer: Answer) -> Any:
    values = [value for name, value in answer.trailers if name == TEXT_HEADER]
    assert len(values) == 1, answer
    report = parse_header(values[0])
    assert report is not None
    return report


ENDS = ("ok", "abort", "status", "raise", "code")


def ends_of(style: str, kind: str) -> list[str]:
    """How a handler can end: grpc.aio's context for blocking handlers has no abort_with_status, and if they abort in
    the midst of a stream, the bare server, too, sometimes never ends the call."""
    if style == "blocking":
        return ["ok", "raise", "code"] if kind.endswith("stream") else ["ok", "abort", "raise", "code"]
    return list(ENDS)


def test_calls_are_as_without_it_but_for_the_report(rig: Callable[..., Rig], style: str):
    with_it, without = rig(), rig(intercepted=False)
    for kind in KINDS:
        for end in ends_of(style, kind):
            bare, reported = without.call(kind, end.encode()), with_it.call(kind, end.encode())
            assert report_of(reported).named_metrics[IN_FLIGHT_METRIC] == 0, (kind, end)
            trailers = [entry for entry in reported.trailers if entry[0] != TEXT_HEADER]
            assert reported._replace(trailers=trailers) == bare, (kind, end)
            assert trailers, (kind, end)
    eventually(lambda: with_it.meter.in_flight == 0)


def test_latency_is_that_of_good_answers(rig: Callable[..., Rig]):
    server = rig()
    for kind in ("unary_unary", "stream_unary"):
        assert LATENCY_METRIC not in report_of(server.call(kind, b"raise")).named_metrics
    for kind in KINDS:
        assert 0 < report_of(server.call(kind, b"ok")).named_metrics[LATENCY_METRIC] < 5


def test_a_stream_that_fails_has_had_its_latency(rig: Callable[..., Rig]):
    server = rig()
    assert server.call("unary_stream", b"raise").responses == [b"first"]
    assert server.meter.report().named_metrics[LATENCY_METRIC] > 0


@pytest.mark.parametrize("style", ["sync", "coroutine"])
def test_the_trailers_on_the_wire_are_those_of_the_published_message(style: str):
    """gRPC's core shows the binary trailer to no application, so this client speaks HTTP/2 itself."""
    with contextlib.ExitStack() as stack:
        server = Rig(stack, style)
        trailers = trailers_on_the_wire(server.address, "/test.Service/unary_unary", b"ok")
    value = trailers["endpoint-load-metrics-bin"]
    report = parse_binary(b64decode(value + "=" * (-len(value) % 4)))
    text = parse_header(trailers["endpoint-load-metrics"])
    assert text is not None
    assert report is not None
    assert report.named_metrics == pytest.approx(text.named_metrics, rel=1e-5)
    assert report.named_metrics[IN_FLIGHT_METRIC] == 0
    assert trailers["x-own"] == "1"


def trailers_on_the_wire(address: str, path: str, message: bytes) -> dict[str, str]:
    host, port = address.split(":")
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    headers = {":method": "POST", ":scheme": "http", ":authority": address, ":path": path}
    headers.update({"te": "trailers", "content-type": "application/grpc"})
    connection.send_headers(1, headers.items())
    connection.send_data(1, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        while True:
            wire.sendall(connection.data_to_send())
            data = wire.recv(65536)
            assert data
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.TrailersReceived):
                    return dict(event.headers)


def test_a_report_of_the_handlers_own_stays(rig: Callable[..., Rig]):
    server = rig()
    for kind in KINDS:
        answer = server.call(kind, b"own")
        assert [entry for entry in answer.trailers if entry[0] == TEXT_HEADER] == [OWN_REPORT]


def test_an_unknown_method_is_as_before(rig: Callable[..., Rig]):
    server = rig()
    with pytest.raises(grpc.RpcError) as caught:
        server.channel.unary_unary("/test.Service/None")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    eventually(lambda: server.meter.in_flight == 0)


def test_rates_and_faults(rig: Callable[..., Rig]):
    clock = FakeClock()
    server = rig(meter=LoadMeter(clock=clock, cpu_time=lambda: 0.0))
    for end in ("ok", "ok", "abort", "code", "raise"):
        server.call("unary_unary", end.encode())
    eventually(lambda: server.meter.in_flight == 0)
    clock.advance(5)
    report = report_of(server.call("unary_unary", b"ok"))
    assert report.rps_fractional == pytest.approx(1)
    assert report.eps == pytest.approx(0.2)  # FAILED_PRECONDITION and NOT_FOUND are the client's


def test_others_in_flight_are_counted(rig: Callable[..., Rig]):
    server = rig()
    calls = {kind: start(server.channel, kind, b"wait") for kind in KINDS}
    eventually(lambda: server.gate.waiting == len(KINDS))
    assert report_of(server.call("unary_unary", b"ok")).named_metrics[IN_FLIGHT_METRIC] == len(KINDS)
    server.gate.open()
    for kind, waiting in calls.items():
        assert finish(waiting, kind).code is grpc.StatusCode.OK
    eventually(lambda: server.meter.in_flight == 0)


def test_cancelled_calls_end_and_count_in_no_rate(rig: Callable[..., Rig], style: str):
    clock = FakeClock()
    server = rig(meter=LoadMeter(clock=clock, cpu_time=lambda: 0.0))
    # Blocking handlers of streams are left out: grpc.aio does not get its threads back from them.
    kinds = KINDS if style != "blocking" else ("unary_unary",)
    calls = [start(server.channel, kind, b"wait") for kind in kinds]
    eventually(lambda: server.gate.waiting == len(kinds))
    for waiting in calls:
        waiting.cancel()
    if style in ("sync", "blocking"):
        server.gate.open()  # a thread cannot be cancelled
    eventually(lambda: server.meter.in_flight == 0)
    clock.advance(1)
    if style in ("coroutine", "writer"):
        assert server.meter.report().rps_fractional == 0


def test_calls_that_wait_for_a_thread_are_in_flight_and_end_if_given_up():
    with contextlib.ExitStack() as stack:
        server = Rig(stack, "sync", threads=1)
        first = start(server.channel, "unary_unary", b"wait")
        eventually(lambda: server.gate.waiting == 1)
        queued = [start(server.channel, kind, b"ok") for kind in KINDS]
        eventually(lambda: server.meter.in_flight == 1 + len(KINDS))
        for waiting in queued:
            waiting.cancel()
        server.gate.open()
        assert first.result(10) == b"done"
        eventually(lambda: server.meter.in_flight == 0)


@pytest.mark.parametrize("style", ["sync", "coroutine"])
def test_calls_refused_for_their_number_end(style: str):
    with contextlib.ExitStack() as stack:
        server = Rig(stack, style, maximum_concurrent_rpcs=1)
        first = start(server.channel, "unary_unary", b"wait")
        eventually(lambda: server.gate.waiting == 1)
        for _ in range(3):
            assert server.call("unary_unary", b"ok").code is grpc.StatusCode.RESOURCE_EXHAUSTED
        eventually(lambda: server.meter.in_flight == 1)
        server.gate.open()
        assert first.result(10) == b"done"
        eventually(lambda: server.meter.in_flight == 0)


def test_the_caller_is_the_peer(rig: Callable[..., Rig]):
    server = rig()
    for kind in KINDS:
        assert server.call(kind, b"caller", (("x-forwarded-for", "203.0.113.7"),)).responses[-1] == b"127.0.0.1"


def test_the_caller_is_whom_a_trusted_proxy_names(rig: Callable[..., Rig]):
    server = rig(trusted_proxies=1)
    for kind in KINDS:
        metadata = (("x-forwarded-for", "1.1.1.1, 203.0.113.7"),)
        assert server.call(kind, b"caller", metadata).responses[-1] == b"203.0.113.7"
        assert server.call(kind, b"caller").responses[-1] == b"127.0.0.1"


def test_calls_side_by_side_have_their_own_callers(rig: Callable[..., Rig]):
    server = rig(trusted_proxies=1)

    def caller(number: int) -> bool:
        address = f"203.0.113.{number}"
        answer = server.call(KINDS[number % 4], b"caller", (("x-forwarded-for", address),))
        return answer.responses[-1] == address.encode()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(caller, range(100)))
