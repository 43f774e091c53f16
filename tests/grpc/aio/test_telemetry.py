"""An attempt is a span: with its endpoint, its status, under the caller's span; its context travels with it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import meshlb.grpc.aio
from meshlb import Mesh, Retry, ServiceConfig
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.discovery import StaticDiscovery
from tests.grpc.aio.servers import Request
from tests.grpc.aio.test_contract import outcome, texts
from tests.support.wait import eventually_async


class Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def mesh(self, addresses: list[str], **config: Any) -> Mesh:
        return Mesh(
            StaticDiscovery({"echo": addresses}),
            defaults=ServiceConfig(policy="round_robin", **config),
            tracer_provider=self.provider,
            meter_provider=self.meters,
        )

    def spans(self) -> list[Any]:
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time)


@pytest.fixture
def traced() -> Any:
    traced = Traced()
    yield traced
    traced.provider.shutdown()
    traced.meters.shutdown()


async def test_attempts_are_siblings_under_the_callers_span(serve: Any, traced: Traced) -> None:
    bad, good = await serve(2)
    bad.code = grpc.StatusCode.UNAVAILABLE
    kinds = Retry(idempotent_methods=("*",))
    async with (
        traced.mesh([bad.address, good.address], retry=kinds, breaker=None) as mesh,
        meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as channel,
    ):
        stub = EchoStub(channel)
        tracer = traced.provider.get_tracer("test")
        for run in (
            lambda: stub.Say(Request()),
            lambda: first_of(stub.Watch(Request())),
            lambda: stub.Collect(texts("a")),
            lambda: first_of(stub.Chat(texts("a"))),
        ):
            traced.exporter.clear()
            with tracer.start_as_current_span("mine") as mine:
                replies = [await run(), await run()]
            await eventually_async(lambda: len(traced.exporter.get_finished_spans()) >= 4)
            attempts = [span for span in traced.spans() if span.name != "mine"]
            assert {span.parent.span_id for span in attempts} == {mine.get_span_context().span_id}
            ports = [span.attributes["network.peer.port"] for span in attempts]
            assert set(ports) == {bad.port, good.port}
            failed = [span for span in attempts if not span.status.is_ok]
            assert {span.attributes["network.peer.port"] for span in failed} == {bad.port}
            # Each reply names the attempt that brought it.
            succeeded = {format(span.context.span_id, "016x") for span in attempts if span.status.is_ok}
            assert {reply.metadata["traceparent"].split("-")[2] for reply in replies} == succeeded


async def first_of(call: Any) -> Any:
    async for reply in call:
        first = reply
    return first


async def test_every_span_ends(serve: Any, traced: Traced) -> None:
    (server,) = await serve()
    async with (
        traced.mesh([server.address]) as mesh,
        meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as channel,
    ):
        await channel.cluster.wait_ready_async(5)
        stub = EchoStub(channel)
        call = stub.Say(Request(text="hang"))
        call.cancel()
        await outcome(call)
        await outcome(stub.Say(Request(fail_code=5)))
        await outcome(stub.Say(Request(text="hang"), timeout=0.05))
        dropped = stub.Watch(Request(count=9, interval_seconds=9))
        await dropped.read()
        del dropped
        chat = stub.Chat()
        await chat.write(Request())
        await chat.read()
        await channel.close()
        await eventually_async(
            lambda: len(traced.spans()) == 5, message=lambda: str([s.to_json() for s in traced.spans()])
        )
    codes = [span.attributes["rpc.response.status_code"] for span in traced.spans()]
    assert codes == ["CANCELLED", "NOT_FOUND", "DEADLINE_EXCEEDED", "CANCELLED", "CANCELLED"]


async def test_without_listeners_nothing_is_added(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    reply = await EchoStub(await channel_to([server])).Say(Request())
    assert set(reply.metadata) == {"user-agent"}
    await asyncio.sleep(0)
