"""The interceptors on real servers: all kinds of method, in all styles of handler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from meshlb.balancing.orca import TEXT_HEADER, parse_header
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


def test_calls_are_as_without_it_but_for_the_report(rig: Callable[..., Rig], style: str):
    with_it, without = rig(), rig(intercepted=False)
    for kind in KINDS:
        for end in ENDS:
            if end == "status" and style == "blocking":
                continue  # grpc.aio's context for blocking handlers has no abort_with_status
            bare, reported = without.call(kind, end.encode()), with_it.call(kind, end.encode())
            assert report_of(reported).named_metrics[IN_FLIGHT_METRIC] == 0, (kind, end)
            trailers = [entry for entry in reported.trailers if entry[0] != TEXT_HEADER]
            assert reported._replace(trailers=trailers) == bare, (kind, end)
            assert trailers, (kind, end)
    eventually(lambda: with_it.meter.in_flight == 0)


def test_latency_is_that_of_good_answers(rig: Callable[..., Rig]):
    server = rig()
    for kind in KINDS:
        assert LATENCY_METRIC not in report_of(server.call(kind, b"raise")).named_metrics or kind.endswith("stream")
    for kind in KINDS:
        server.call(kind, b"ok")
    assert 0 < report_of(server.call("unary_unary", b"ok")).named_metrics[LATENCY_METRIC] < 5


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
    calls = [start(server.channel, kind, b"wait") for kind in KINDS]
    eventually(lambda: server.gate.waiting == len(KINDS))
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


@pytest.mark.parametrize("style", ["sync", "coroutine"], indirect=False)
def test_calls_refused_for_their_number_end(style: str):
    with contextlib.ExitStack() as stack:
        server = Rig(stack, style, maximum_concurrent_rpcs=1)
        first = start(server.channel, "unary_unary", b"wait")
        eventually(lambda: server.gate.waiting == 1)
        for _ in range(3):
            assert server.call("unary_unary", b"ok").code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.meter.in_flight == 1
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
