"""What a channel holds and lets go: leases, sub-channels, tasks, loops."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlb.grpc.aio
from meshlb import ConfigError, MeshClosed, Retry
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc.aio._channel import MeshChannel
from tests.grpc.aio.conftest import in_flight
from tests.grpc.aio.servers import Request, Server, unused_address
from tests.grpc.aio.test_contract import outcome, texts
from tests.support.backends import grpc_backend, grpc_backends
from tests.support.wait import eventually, eventually_async

OK = grpc.StatusCode.OK


async def test_leases_are_closed_once_per_attempt(serve: Any, channel_to: Any) -> None:
    servers = await serve(3)
    channel = await channel_to(servers)
    stub = EchoStub(channel)
    for _ in range(5):
        await stub.Say(Request())
        await stub.Collect(texts("a"))
        async for _ in stub.Watch(Request(count=2)):
            pass
        async for _ in stub.Chat(texts("a", "b")):
            pass
        await outcome(stub.Put(Request(fail_code=3)))
        call = stub.Watch(Request(count=50, interval_seconds=0.01))
        await call.read()
        call.cancel()
    nodes = channel.cluster.nodes
    assert sum(node.in_flight for node in nodes) == 0
    assert sum(node.calls for node in nodes) == 30
    assert sum(node.successes for node in nodes) == 25
    assert sum(node.ignored for node in nodes) == 5
    assert sum(server.calls.total() for server in servers) == 30


async def test_latency_is_that_of_the_first_message(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    channel = await channel_to([server])
    (node,) = channel.cluster.nodes
    stub = EchoStub(channel)
    async for _ in stub.Watch(Request(count=4, interval_seconds=0.1)):
        pass
    assert node.latency.value < 0.25  # the stream took 0.3 s
    # Who reads late does not make the endpoint look slow.
    late = stub.Watch(Request(text="head", count=1))
    await late.initial_metadata()
    before = node.latency.value
    await asyncio.sleep(0.3)
    assert (await late.read()).text == "head"
    assert await late.read() is grpc.aio.EOF
    assert node.latency.value == before
    late = stub.Watch(Request(count=2))
    await asyncio.sleep(0.3)
    assert [reply.sequence async for reply in late] == [0, 1]
    assert node.latency.value == before


async def test_nobody_awaits_it(serve: Any, channel_to: Any) -> None:
    """A call starts when it is made, and goes on to another endpoint, though nobody holds it."""
    (server,) = await serve()
    channel = await channel_to([Refusing(), server], breaker=None)
    stub = EchoStub(channel)
    for _ in range(4):
        stub.Put(Request())
        stub.Collect(texts("a"))
    gc.collect()
    await eventually_async(lambda: server.calls == {"Put": 4, "Collect": 4})
    await eventually_async(lambda: in_flight(channel.mesh) == 0)


async def test_a_failure_that_nobody_awaits_is_silent(serve: Any, channel_to: Any, caplog: Any) -> None:
    channel = await channel_to([Refusing()])
    stub = EchoStub(channel)
    ended: list[Any] = []
    for call in (stub.Put(Request()), stub.Watch(Request()), stub.Collect(texts("a")), stub.Chat()):
        call.add_done_callback(ended.append)
    await eventually_async(lambda: len(ended) == 4)
    ended.clear()
    del call
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("kind", ["watch", "watch iterated", "chat", "unread"])
async def test_a_dropped_stream_is_cancelled(kind: str, serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    channel = await channel_to([server])
    stub = EchoStub(channel)
    if kind == "chat":
        call = stub.Chat()
        await call.write(Request())
        await call.read()
    else:
        call = stub.Watch(Request(count=1000, interval_seconds=1))
        if kind == "watch":
            await call.read()
        elif kind == "watch iterated":
            async for _ in call:
                break
        else:
            await eventually_async(lambda: server.calls["Watch"])
    assert in_flight(channel.mesh) == 1
    assert server.streams == 1
    ref = weakref.ref(call)
    del call
    await eventually_async(lambda: server.streams == 0)
    await eventually_async(lambda: in_flight(channel.mesh) == 0)
    assert ref() is None
    assert channel.cluster.nodes[0].ignored == 1
    assert not channel.here().active


async def test_close_leaves_nothing(serve: Any, make_mesh: Any) -> None:
    servers = await serve(3)
    mesh = make_mesh([server.address for server in servers])
    channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
    stub = EchoStub(channel)
    for _ in range(6):
        await stub.Say(Request())
    tasks = client_tasks()
    calls = [stub.Say(Request(text="hang")), stub.Watch(Request(text="hang")), stub.Collect(), stub.Chat()]
    here = channel.here()
    assert len(here.subchannels) == 3
    assert len(here.active) == 4
    natives = [subchannel.channel for subchannel in here.subchannels]
    await channel.close()
    assert not here.subchannels
    assert not here.active
    assert in_flight(mesh) == 0
    assert all(call.cancelled() for call in calls)
    assert {native.get_state() for native in natives} == {grpc.ChannelConnectivity.SHUTDOWN}
    assert not mesh.cluster("echo")._listeners
    await eventually_async(lambda: client_tasks() <= tasks, message=lambda: str(client_tasks() - tasks))


def client_tasks() -> set[Any]:
    return {task for task in asyncio.all_tasks() if "AioServer" not in repr(task)}


async def test_a_dropped_channel_closes_its_connections(serve: Any, make_mesh: Any) -> None:
    (server,) = await serve()
    mesh = make_mesh([server.address])
    channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
    await EchoStub(channel).Say(Request())
    here = channel.here()
    del channel
    gc.collect()
    await eventually_async(lambda: not here.subchannels)
    assert not mesh.cluster("echo")._listeners


async def test_an_endpoint_that_leaves(serve: Any, channel_to: Any) -> None:
    leaving, staying = await serve(2)
    channel = await channel_to([leaving, staying])
    stub = EchoStub(channel)
    for _ in range(4):
        await stub.Say(Request())
    watch = await stream_on(leaving, stub)
    endpoints = [node.endpoint for node in channel.cluster.nodes]
    channel.cluster.update([endpoint for endpoint in endpoints if endpoint.port != leaving.port])
    assert len(channel.here().subchannels) == 2
    assert {(await stub.Say(Request())).backend for _ in range(4)} == {staying.id}
    assert [reply.sequence async for reply in watch] == [1, 2]  # what was under way goes on
    await eventually_async(lambda: len(channel.here().subchannels) == 1)
    channel.cluster.update(endpoints)
    assert {(await stub.Say(Request())).backend for _ in range(4)} == {leaving.id, staying.id}


async def stream_on(server: Server, stub: EchoStub) -> Any:
    """A stream of three messages on that very server, the first one read."""
    while True:
        watch = stub.Watch(Request(count=3, interval_seconds=0.1))
        async for reply in watch:
            if reply.backend == server.id:
                return watch
            break
        watch.cancel()


@pytest.mark.parametrize("idempotent", [True, False])
async def test_an_endpoint_that_does_not_drain(idempotent: bool, serve: Any, channel_to: Any) -> None:
    """Its calls are cut when drain_timeout is over; that is no cancellation by the caller."""
    leaving, staying = await serve(2)
    retry = Retry(idempotent_methods=("*",) if idempotent else ())
    channel = await channel_to([leaving], drain_timeout=0.0, retry=retry)
    stub = EchoStub(channel)
    leaving.hang = True
    put, watch, begun = stub.Put(Request(text="a")), stub.Watch(Request(text="a")), stub.Chat()
    await eventually_async(lambda: leaving.calls["Put"] and leaving.calls["Watch"])
    leaving.hang = False
    await begun.write(Request(text="b"))
    await begun.read()
    results = [asyncio.ensure_future(outcome(work)) for work in (put, watch.read(), begun.read())]
    await asyncio.sleep(0)
    (old,) = channel.cluster.nodes
    new = type(old.endpoint)(staying.host, staying.port)
    channel.cluster.update([new])
    seen = await asyncio.gather(*results)
    cut = ("AioRpcError", grpc.StatusCode.UNAVAILABLE)
    assert seen[2][:2] == cut
    assert "closed under the call" in seen[2][2]
    if idempotent:
        assert seen[:2] == ["a", "a"]
        assert staying.calls == {"Put": 1, "Watch": 1}
    else:
        assert [result[:2] for result in seen[:2]] == [cut, cut]
    assert old.failures == 0


async def test_an_endpoint_that_leaves_before_it_is_connected(serve: Any, channel_to: Any) -> None:
    """grpc.aio never tells who writes to a call that is cancelled before it has a connection; we do."""
    (good,) = await serve()
    silent = Server("silent")
    with socket.create_server((silent.host, 0)) as listener:  # the kernel takes connections, nobody speaks
        silent.port = listener.getsockname()[1]
        channel = await channel_to(
            [silent], drain_timeout=0.0, connect_timeout=30.0, retry=Retry(idempotent_methods=("*",))
        )
        stub = EchoStub(channel)
        written, waited = stub.Chat(), stub.Chat()

        async def write() -> Any:
            await written.write(Request(text="w"))
            await written.done_writing()
            return await written.read()

        async def wait() -> Any:
            await waited.wait_for_connection()
            await waited.write(Request(text="c"))
            return await waited.read()

        collected, chatted = stub.Collect(texts("a", "b")), stub.Chat(texts("x"))
        results = [asyncio.ensure_future(work) for work in (outcome(collected), chatted.read(), write(), wait())]
        await eventually_async(lambda: in_flight(channel.mesh) == 4)
        (old,) = channel.cluster.nodes
        channel.cluster.update([type(old.endpoint)(good.host, good.port)])
        seen = await asyncio.wait_for(asyncio.gather(*results), 20)
        assert [getattr(reply, "text", reply) for reply in seen] == ["a b", "x", "w", "c"]
        waited.cancel()


async def test_a_connection_that_is_not_used_is_dropped(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    channel = await channel_to([server], idle_timeout=0.1)
    stub = EchoStub(channel)
    await stub.Say(Request())
    await eventually_async(lambda: not channel.here().subchannels)
    assert (await stub.Say(Request(text="a"))).text == "a"


async def test_a_sub_channel_closed_between_pick_and_call(serve: Any, channel_to: Any) -> None:
    """grpc refuses the call; nothing was sent, so it is made on a new connection."""
    servers = await serve(2)
    channel = await channel_to(servers)
    stub = EchoStub(channel)
    for _ in range(2):
        await stub.Say(Request())
    for subchannel in tuple(channel.here().subchannels):
        await subchannel.channel.close()
        here = channel.here()
        assert here._resources.get(subchannel.node) is subchannel
    assert [await outcome(stub.Put(Request(text="a"))) for _ in range(4)] == ["a"] * 4
    assert [node.failures for node in channel.cluster.nodes] == [0, 0]


async def test_a_sub_channel_closed_under_an_attempt_interceptor(serve: Any, channel_to: Any) -> None:
    class Pass(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return await continuation(client_call_details, request)

    servers = await serve(2)
    channel = await channel_to(servers, {"attempt_interceptors": [Pass()]})
    stub = EchoStub(channel)
    await stub.Say(Request())
    (subchannel,) = channel.here().subchannels
    await subchannel.channel.close()
    assert [await outcome(stub.Put(Request(text="a"))) for _ in range(4)] == ["a"] * 4


async def test_from_two_loops_in_two_threads(serve: Any, make_mesh: Any) -> None:
    with grpc_backends(2) as backends:
        mesh = make_mesh([backend.address for backend in backends])
        channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
        stub = EchoStub(channel)
        start = threading.Barrier(2)
        seen: list[set[str]] = []
        failed: list[BaseException] = []

        async def work() -> None:
            replies = set()
            for _ in range(10):
                batch = await asyncio.gather(*(stub.Say(Request()) for _ in range(10)))
                replies |= {reply.backend for reply in batch}
                async for reply in stub.Watch(Request(count=3)):
                    replies.add(reply.backend)
                replies.add((await stub.Collect(texts("a", "b"))).backend)
            seen.append(replies)

        def run() -> None:
            try:
                start.wait(10)
                asyncio.run(work())
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, 60)
        assert failed == []
        assert seen == [{backend.id for backend in backends}] * 2
        assert in_flight(mesh) == 0
        # The loops have ended, and what was held there with them.
        assert not channel._loops
        assert not mesh.cluster("echo")._listeners
        await stub.Say(Request())
        await channel.close()
        assert not mesh.cluster("echo")._listeners


async def test_close_reaches_other_loops(make_mesh: Any) -> None:
    with grpc_backend() as backend:
        mesh = make_mesh([backend.address])
        channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
        started = threading.Event()
        results: list[Any] = []

        async def work() -> None:
            call = EchoStub(channel).Say(Request(delay_seconds=60))
            asyncio.get_running_loop().call_soon(started.set)
            results.append(await outcome(call))

        thread = threading.Thread(target=lambda: asyncio.run(work()))
        thread.start()
        await asyncio.to_thread(started.wait, 10)
        await channel.close()
        await asyncio.to_thread(thread.join, 10)
        assert results == [("CancelledError", "")]


def test_a_loop_ends_with_calls_under_way(make_mesh: Any) -> None:
    with grpc_backend() as backend:
        mesh = make_mesh([backend.address])
        channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
        stub = EchoStub(channel)
        held: list[Any] = []

        async def leave() -> None:
            hanging = Request(delay_seconds=60)
            held.extend((stub.Say(hanging), stub.Watch(hanging), stub.Collect(texts("a")), stub.Chat()))
            await held[3].write(Request())
            await held[3].read()

        asyncio.run(leave())
        assert all(call.done() for call in held)
        assert in_flight(mesh) == 0
        assert not channel._loops
        assert not mesh.cluster("echo")._listeners


def test_a_loop_that_is_not_ended_properly(make_mesh: Any) -> None:
    """Without asyncio.run nobody says that a loop ends: what it held goes with the channel's next loop."""
    with grpc_backend() as backend:
        mesh = make_mesh([backend.address])
        channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)

        async def call() -> str:
            return (await EchoStub(channel).Say(Request(text="a"))).text

        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(call()) == "a"
        loop.close()
        assert list(channel._loops) == [loop]
        assert asyncio.run(call()) == "a"
        assert not channel._loops


def test_made_outside_of_any_loop(make_mesh: Any) -> None:
    with grpc_backend() as backend:
        mesh = make_mesh([backend.address])
        stub = EchoStub(meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh))

        async def call() -> str:
            return (await stub.Say(Request(text="a"))).text

        assert [asyncio.run(call()) for _ in range(3)] == ["a"] * 3
        loop = asyncio.new_event_loop()
        try:
            asyncio.set_event_loop(loop)
            assert loop.run_until_complete(stub.Say(Request(text="b"))).text == "b"
        finally:
            asyncio.set_event_loop(None)
            loop.close()


async def test_the_mesh_is_closed_under_a_channel(serve: Any, make_mesh: Any) -> None:
    (server,) = await serve()
    mesh = make_mesh([server.address])
    channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
    stub = EchoStub(channel)
    hanging = stub.Say(Request(text="hang"))
    await eventually_async(lambda: server.calls["Say"])
    await mesh.aclose()
    assert (await outcome(hanging))[:2] == ("AioRpcError", grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(MeshClosed) as caught:
        await stub.Say(Request())
    assert isinstance(caught.value, grpc.aio.AioRpcError)
    with pytest.raises(MeshClosed):
        await channel.channel_ready()
    await channel.close()


async def test_targets_of_grpcs_own(serve: Any, make_mesh: Any) -> None:
    (server,) = await serve()
    mesh = make_mesh([])
    for target in (server.address, f"ipv4:{server.address}", f"dns:///{server.address}"):
        async with meshlb.grpc.aio.insecure_channel(target, mesh=mesh) as channel:
            assert type(channel) is type(grpc.aio.insecure_channel("x"))
            assert (await EchoStub(channel).Say(Request(text="a"))).text == "a"
    assert isinstance(meshlb.grpc.aio.insecure_channel("echo", mesh=mesh), MeshChannel)
    with pytest.raises(ConfigError, match="unknown scheme"):
        meshlb.grpc.aio.insecure_channel("lb://echo", mesh=mesh)
    with pytest.raises(ConfigError, match="credentials"):
        meshlb.grpc.aio.secure_channel("consul:///echo", None, mesh=mesh)  # type: ignore[arg-type]


def test_without_a_mesh_the_default_one(monkeypatch: Any) -> None:
    from meshlb import default

    monkeypatch.setattr(default, "_mesh", None)
    channel = meshlb.grpc.aio.insecure_channel("consul:///echo")
    mesh = default.default_mesh()
    assert channel.mesh is mesh  # type: ignore[attr-defined]
    mesh.close()
    monkeypatch.setattr(default, "_mesh", None)


async def test_a_done_callback_that_raises(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    stub = EchoStub(await channel_to([server]))
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
    try:
        call = stub.Say(Request(text="a"))
        call.add_done_callback(lambda _: 1 / 0)
        call.add_done_callback(reported.append)
        assert (await call).text == "a"
        assert isinstance(reported[0], ZeroDivisionError)
        assert reported[1] is call
    finally:
        asyncio.get_running_loop().set_exception_handler(None)


class Refusing(Server):
    @property
    def address(self) -> str:
        return self._address

    def __init__(self) -> None:
        super().__init__("refusing")
        self._address = unused_address()


# -- real processes that die, hang and come back -------------------------------------------------------------------


async def test_killed_frozen_and_restarted(make_mesh: Any) -> None:
    """Five servers; one at a time is killed, frozen or comes back. The caller of idempotent calls sees no error."""
    with grpc_backends(5) as backends:
        mesh = make_mesh(
            [backend.address for backend in backends],
            policy="least_response_time",
            retry=Retry(per_try_timeout=0.5, idempotent_methods=("*",)),
        )
        async with meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as channel:
            stub = EchoStub(channel)
            counts = {"calls": 0}
            stop = asyncio.Event()
            kinds: list[Callable[[], Any]] = [
                lambda: stub.Say(Request(text="a"), timeout=20),
                lambda: stub.Put(Request(text="a"), timeout=20),
                lambda: all_of(stub.Watch(Request(text="a"), timeout=20)),
                lambda: stub.Collect(texts("a"), timeout=20),
                lambda: all_of(stub.Chat(texts("a"), timeout=20)),
            ]

            async def caller(number: int) -> None:
                while not stop.is_set():
                    assert (await kinds[(number + counts["calls"]) % 5]()).text == "a"
                    counts["calls"] += 1

            async def some_calls() -> None:
                goal = counts["calls"] + 100
                await eventually_async(lambda: counts["calls"] >= goal or stop.is_set(), timeout=30)

            async def trouble() -> None:
                try:
                    await some_calls()
                    backends[0].kill()
                    await some_calls()
                    backends[1].freeze()
                    await some_calls()
                    await asyncio.to_thread(backends[0].restart)
                    await some_calls()
                    backends[1].thaw()
                    await some_calls()
                    backends[2].terminate()
                    await some_calls()
                finally:
                    stop.set()

            await asyncio.gather(trouble(), *(caller(number) for number in range(8)))
            # The one that was killed gets traffic again.
            before = backends[0].requests()

            async def served() -> bool:
                await asyncio.gather(*(stub.Say(Request(text="a")) for _ in range(10)))
                return await asyncio.to_thread(backends[0].requests) > before

            await eventually_async(served, timeout=20)
        eventually(lambda: in_flight(mesh) == 0)


async def all_of(call: Any) -> Any:
    """The last reply. An error after the first one is nobody's to hide."""
    last = None
    try:
        async for reply in call:
            last = reply
    except grpc.aio.AioRpcError:
        if last is None:
            raise
    return last


async def test_no_coroutine_is_left_unawaited(serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    stub = EchoStub(await channel_to([*servers, Refusing()]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            calls = [stub.Say(Request()), stub.Watch(Request()), stub.Collect(texts("a")), stub.Chat(texts("a"))]
            for call in calls:
                call.cancel()
            await asyncio.gather(*(call.code() for call in calls))
            del calls, call
            gc.collect()
