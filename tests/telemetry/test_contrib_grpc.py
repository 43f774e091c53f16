"""opentelemetry-instrumentation-grpc, sync and aio, beside our own spans."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.telemetry.contrib import run

SERVER = """
import concurrent.futures
import grpc
from meshlb._proto.echo_pb2 import EchoReply, EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoServicer, EchoStub, add_EchoServicer_to_server
from opentelemetry.instrumentation.grpc import (
    GrpcAioInstrumentorClient, GrpcInstrumentorClient, aio_client_interceptors, client_interceptor, grpcext,
)

seen = []

class Echo(EchoServicer):
    def note(self, context):
        traces = [value for key, value in context.invocation_metadata() if key == "traceparent"]
        assert len(traces) == 1, traces
        seen.append(traces[0].split("-")[2])
        if len(seen) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
    def Say(self, request, context):
        self.note(context)
        return EchoReply(text=request.text)
    def Watch(self, request, context):
        self.note(context)
        yield EchoReply(text="1")
        yield EchoReply(text="2")
    def Collect(self, requests, context):
        list(requests)
        self.note(context)
        return EchoReply(text="all")
    def Chat(self, requests, context):
        self.note(context)
        for request in requests:
            yield EchoReply(text=request.text)

server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
add_EchoServicer_to_server(Echo(), server)
address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
server.start()
config = ServiceConfig(
    connect_timeout=20, breaker=None, retry=Retry(budget=None, idempotent_methods=("/meshlb.demo.v1.Echo/*",))
)
mesh = Mesh(StaticDiscovery({"echo": [address]}), defaults=config)
request = EchoRequest(text="x")
"""

SYNC = (
    SERVER
    + """
from meshlb.grpc import MeshInterceptor, insecure_channel

switched = sys.argv[1]
if "everywhere" in switched:
    GrpcInstrumentorClient().instrument()
target = address if "outside" in switched else "consul:///echo"
if "interceptor" in switched:
    channel = grpc.intercept_channel(grpc.insecure_channel(address), MeshInterceptor(mesh, "echo"))
else:
    channel = insecure_channel(target, mesh=mesh)
if "asked for" in switched:
    channel = grpcext.intercept_channel(channel, client_interceptor())
stub = EchoStub(channel)
with tracer.start_as_current_span("program"):
    if "outside" in switched:
        seen.append("nobody")  # there are no retries
    assert stub.Say(request, timeout=30).text == "x"
    assert stub.Say.with_call(request, timeout=30)[0].text == "x"
    assert stub.Say.future(request, timeout=30).result(30).text == "x"
    assert [reply.text for reply in stub.Watch(request, timeout=30)] == ["1", "2"]
    assert stub.Collect(iter([request]), timeout=30).text == "all"
    assert [reply.text for reply in stub.Chat(iter([request]), timeout=30)] == ["x"]
channel.close()
mesh.close()
server.stop(0).wait(10)
report(seen=seen)
"""
)

AIO = (
    SERVER
    + """
import meshlb.grpc.aio

class Own(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation, details, request):
        return await continuation(details, request)

switched = sys.argv[1]
if "everywhere" in switched:
    GrpcAioInstrumentorClient().instrument()

async def main():
    target = address if "outside" in switched else "consul:///echo"
    given = {}
    if "asked for" in switched:
        given["interceptors"] = aio_client_interceptors()
    if "own" in switched:
        given["interceptors"] = [Own()]
    if "attempts" in switched:
        given["attempt_interceptors"] = aio_client_interceptors()
    if "outside" in switched:
        seen.append("nobody")  # there are no retries
    if "interceptor" in switched:
        interceptors = meshlb.grpc.aio.AioMeshInterceptor.all(mesh, "echo")
        channel = grpc.aio.insecure_channel(address, interceptors=interceptors)
    else:
        channel = meshlb.grpc.aio.insecure_channel(target, mesh=mesh, **given)
    async with channel:
        stub = EchoStub(channel)
        assert (await stub.Say(request, timeout=30)).text == "x"
        assert [reply.text async for reply in stub.Watch(request, timeout=30)] == ["1", "2"]
        assert (await stub.Collect(iter([request]), timeout=30)).text == "all"
        assert [reply.text async for reply in stub.Chat(iter([request]), timeout=30)] == ["x"]

with tracer.start_as_current_span("program"):
    asyncio.run(main())
mesh.close()
server.stop(0).wait(10)
report(seen=seen)
"""
)

CALLS = {
    SYNC: Counter({"meshlb.demo.v1.Echo/Say": 3, "meshlb.demo.v1.Echo/Watch": 1, "meshlb.demo.v1.Echo/Collect": 1,
                   "meshlb.demo.v1.Echo/Chat": 1}),
    AIO: Counter({"meshlb.demo.v1.Echo/Say": 1, "meshlb.demo.v1.Echo/Watch": 1, "meshlb.demo.v1.Echo/Collect": 1,
                  "meshlb.demo.v1.Echo/Chat": 1}),
}  # fmt: skip
RETRIED = Counter({"meshlb.demo.v1.Echo/Say": 1})
"""The server turns the first call away."""

programs = pytest.mark.parametrize("program", [SYNC, AIO], ids=["sync", "aio"])


@pytest.mark.parametrize(
    ("program", "switched"),
    [(SYNC, "everywhere"), (AIO, "everywhere"), (AIO, "everywhere, own"), (AIO, "attempts")],
    ids=["sync", "aio", "aio with an interceptor", "aio with contrib's for each attempt"],
)
def test_it_makes_no_second_span_of_an_attempt(program: str, switched: str) -> None:
    report = run(program, switched)
    [outer] = report.of("program")
    assert report.contrib == []
    assert Counter(span["name"] for span in report.attempts) == CALLS[program] + RETRIED
    assert {span["parent"] for span in report.attempts} == {outer["id"]}
    assert sorted(report.more["seen"]) == sorted(span["id"] for span in report.attempts)


@programs
def test_asked_for_its_span_is_the_call(program: str) -> None:
    report = run(program, "asked for, everywhere")
    [outer] = report.of("program")
    assert Counter(span["name"].lstrip("/") for span in report.contrib) == CALLS[program]
    assert {span["parent"] for span in report.contrib} == {outer["id"]}
    assert Counter(span["name"] for span in report.attempts) == CALLS[program] + RETRIED
    report.assert_each_call_of_contribs_has_its_attempts()
    assert sorted(report.more["seen"]) == sorted(span["id"] for span in report.attempts)


def test_the_interceptor_in_front_of_an_instrumented_channel() -> None:
    """It answers itself, so that the instrumented channel is not asked."""
    report = run(SYNC, "everywhere, interceptor")
    assert report.contrib == []
    assert Counter(span["name"] for span in report.attempts) == CALLS[SYNC] + RETRIED


def test_aio_interceptors_in_a_channel_of_grpcs() -> None:
    """The channel is grpc's own, so contrib's interceptors are around ours."""
    report = run(AIO, "everywhere, interceptor")
    assert Counter(span["name"].lstrip("/") for span in report.contrib) == CALLS[AIO]
    report.assert_each_call_of_contribs_has_its_attempts()


@programs
def test_a_channel_to_somewhere_else_is_contribs(program: str) -> None:
    report = run(program, "everywhere, outside, own")
    assert report.attempts == []
    assert Counter(span["name"].lstrip("/") for span in report.contrib) == CALLS[program]
