"""The channel itself: connectivity, interceptors, stubs of every age, sub-channels that come and go."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshlb import Mesh, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from tests.grpc.sync.conftest import ChannelTo, Serve, in_flight
from tests.grpc.sync.servers import SAY, Reply, Request, refusing_address
from tests.grpc.sync.test_calls import silent_channel
from tests.support.stubs import current_stubs
from tests.support.wait import eventually

State = grpc.ChannelConnectivity


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


# -- connectivity --------------------------------------------------------------------------------------------------


def test_ready_means_connected(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to([refusing_address(), refusing_address(), *serve(1)])
    ready = grpc.channel_ready_future(channel)
    ready.result(timeout=10)
    assert ready.done()
    assert len(channel._resources) >= 1
    assert stub_of(channel).Say(Request(), timeout=5).backend == "s0"
    eventually(lambda: channel._connectivity._watch is None)  # nobody is subscribed any more


def test_not_ready_before_somebody_can_be_connected(serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    server.stop()
    channel = channel_to([server, refusing_address()])
    ready = grpc.channel_ready_future(channel)
    seen: list[Any] = []
    channel.subscribe(seen.append, try_to_connect=True)
    eventually(lambda: State.TRANSIENT_FAILURE in seen)
    with pytest.raises(grpc.FutureTimeoutError):
        ready.result(timeout=0.1)
    server.start()
    ready.result(timeout=20)
    eventually(lambda: seen[-1] is State.READY)


def test_not_ready_before_the_registry_has_answered() -> None:
    channel = silent_channel()
    seen: list[Any] = []
    channel.subscribe(seen.append, try_to_connect=True)
    eventually(lambda: seen == [State.IDLE, State.CONNECTING] or seen == [State.CONNECTING])
    channel.close()
    channel.mesh.close()


def test_another_endpoint_takes_over(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers)
    seen: list[Any] = []
    channel.subscribe(seen.append, try_to_connect=True)
    eventually(lambda: seen and seen[-1] is State.READY)
    watched = channel._connectivity._watch.node.endpoint.address
    told = len(seen)
    next(server for server in servers if server.address == watched).stop()
    eventually(lambda: len(seen) > told and seen[-1] is State.READY)
    assert channel._connectivity._watch.node.endpoint.address != watched
    channel.unsubscribe(seen.append)


def test_observing_does_not_connect(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(1))
    seen: list[Any] = []

    def observe(state: Any) -> None:
        seen.append(state)
        raise ValueError("a subscriber's own trouble")

    channel.subscribe(observe)
    eventually(lambda: seen == [State.IDLE])
    assert len(channel._resources) == 0
    stub_of(channel).Say(Request(), timeout=5)
    eventually(lambda: seen[-1] is State.READY)
    channel.unsubscribe(observe)
    channel.unsubscribe(observe)
    eventually(lambda: channel._connectivity._watch is None)


def test_many_subscribers_and_one_watched_sub_channel(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(3))
    lists: list[list[Any]] = [[] for _ in range(5)]
    callbacks = [states.append for states in lists]
    for callback in callbacks:
        channel.subscribe(callback, try_to_connect=True)
    eventually(lambda: all(states and states[-1] is State.READY for states in lists))
    for _ in range(6):
        stub_of(channel).Say(Request(), timeout=5)
    pollers = [thread for thread in threading.enumerate() if "poll_connectivity" in str(thread)]
    assert len(pollers) <= 1
    for callback in callbacks:
        channel.unsubscribe(callback)


# -- sub-channels --------------------------------------------------------------------------------------------------


def test_an_endpoint_that_leaves_is_drained_then_closed(serve: Serve) -> None:
    servers = serve(2)
    discovery = StaticDiscovery({"echo": [server.address for server in servers]})
    with Mesh(discovery, defaults=ServiceConfig(policy="round_robin")) as mesh:
        channel: Any = insecure_channel("echo", mesh=mesh)
        stub = stub_of(channel)
        streams = [stub.Watch(Request(count=1000, interval_seconds=0.02)) for _ in range(2)]
        backends = [next(stream).backend for stream in streams]
        assert sorted(backends) == ["s0", "s1"]
        assert len(channel._resources) == 2
        discovery.update("echo", [servers[1].address])
        eventually(lambda: len(mesh.cluster("echo").nodes) == 1)
        leaving = streams[backends.index("s0")]
        assert next(leaving).backend == "s0"  # goes on
        assert {stub.Say(Request(), timeout=5).backend for _ in range(4)} == {"s1"}
        assert len(channel._resources) == 2
        leaving.cancel()
        eventually(lambda: len(channel._resources) == 1)
        channel.close()


def test_a_drain_that_takes_too_long_ends_in_another_attempt(serve: Serve) -> None:
    servers = serve(2)
    servers[0].hang = True
    discovery = StaticDiscovery({"echo": [servers[0].address]})
    with Mesh(discovery, defaults=ServiceConfig(drain_timeout=0.1)) as mesh:
        channel: Any = insecure_channel("echo", mesh=mesh)
        call = stub_of(channel).Say.future(Request(), timeout=20)
        eventually(lambda: servers[0].total)
        discovery.update("echo", [servers[1].address])
        assert call.result(10).backend == "s1"
        channel.close()


def test_idle_sub_channels_are_dropped_and_made_again(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(2), idle_timeout=0.2)
    stub = stub_of(channel)
    for _ in range(3):
        assert {stub.Say(Request(), timeout=5).backend for _ in range(2)} == {"s0", "s1"}
        eventually(lambda: len(channel._resources) == 0)
    assert len(stub.Say._natives) <= 2  # what belongs to closed ones is forgotten


def test_calls_race_with_sub_channels_that_are_closed(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(2), idle_timeout=0.02)
    stub = stub_of(channel)
    over = threading.Event()
    failed: list[str] = []

    def close_some() -> None:
        while not over.is_set():
            for node in channel.cluster.nodes:
                if node.in_flight == 0:
                    channel._resources.endpoint_removed(node)

    closer = threading.Thread(target=close_some)
    closer.start()
    try:
        for number in range(300):
            start = (stub.Put, lambda request, timeout: stub.Put.future(request, timeout=timeout).result())[number % 2]
            try:
                start(Request(), timeout=10)
            except grpc.RpcError as error:
                failed.append(error.details())
    finally:
        over.set()
        closer.join()
    # Some are closed under a call that was already on its way: Put may not be repeated.
    assert set(failed) <= {"Channel closed!"}
    assert len(failed) < 300


def test_host_names_and_ipv6(serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve(host="localhost")
    assert stub_of(channel_to([f"localhost:{server.port}"])).Say(Request(), timeout=5).backend == "s0"
    [server] = serve(host="[::1]")
    assert stub_of(channel_to([f"[::1]:{server.port}"])).Say(Request(), timeout=5).backend == "s0"


def test_a_proxy_in_the_environment_is_not_asked(
    serve: Serve, channel_to: ChannelTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{refusing_address()}")
    assert stub_of(channel_to(serve(1))).Say(Request(), timeout=5).backend == "s0"


def test_the_authority_is_the_service_and_options_win(serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    stub_of(channel_to([server])).Say(Request(), timeout=5)
    stub_of(channel_to([server], options=[("grpc.default_authority", "mine")])).Say(Request(), timeout=5)
    assert server.authorities == [b"echo", b"mine"]


def test_message_limits(serve: Serve, channel_to: ChannelTo) -> None:
    stub = stub_of(channel_to(serve(1), options=[("grpc.max_receive_message_length", 1000)]))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Say(Request(payload_bytes=2000), timeout=5)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("where", ["channel", "call"])
def test_compression(where: str, serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    channel = channel_to([server], compression=grpc.Compression.Gzip if where == "channel" else None)
    options: dict[str, Any] = {"compression": grpc.Compression.Gzip} if where == "call" else {}
    stub = stub_of(channel)
    text = "x" * 10_000
    assert stub.Say(Request(text=text), timeout=5, **options).text == text
    assert stub.Say.future(Request(text=text), timeout=5, **options).result().text == text
    assert next(stub.Watch(Request(text=text), timeout=5, **options)).text == text
    assert stub.Collect(iter([Request(text=text)]), timeout=5, **options).text == text


# -- users ---------------------------------------------------------------------------------------------------------


def test_stubs_of_the_installed_generator(serve: Serve, channel_to: ChannelTo, tmp_path: Path) -> None:
    stub = current_stubs(tmp_path).EchoStub(channel_to(serve(2)))  # these pass _registered_method
    for _ in range(3):
        assert stub.Say(Request(text="a"), timeout=5).text == "a"
        assert stub.Say.future(Request(text="a"), timeout=5).result().text == "a"
        assert [reply.sequence for reply in stub.Watch(Request(count=2), timeout=5)] == [0, 1]
        assert stub.Collect(iter([Request(text="a")]), timeout=5).text == "a"
        assert [reply.text for reply in stub.Chat(iter([Request(text="a")]), timeout=5)] == ["a"]


class Recording(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        self.seen.append(details.method.rpartition("/")[2])
        return continuation(details, request)

    intercept_unary_unary = intercept_unary_stream = _intercept
    intercept_stream_unary = intercept_stream_stream = _intercept


@pytest.mark.parametrize("generated", ["committed", "current"])
def test_interceptors_run_over_it(generated: str, serve: Serve, channel_to: ChannelTo, tmp_path: Path) -> None:
    servers = serve(2)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    recording = Recording()
    channel = grpc.intercept_channel(channel_to(servers, breaker=None), recording)
    stub = stub_of(channel) if generated == "committed" else current_stubs(tmp_path).EchoStub(channel)
    for _ in range(2):
        assert stub.Say(Request(), timeout=5).backend == "s1"
    assert stub.Say.with_call(Request(), timeout=5)[1].code() is grpc.StatusCode.OK
    assert stub.Say.future(Request(), timeout=5).result().backend == "s1"
    servers[0].code = None
    assert len(list(stub.Watch(Request(count=2), timeout=5))) == 2
    assert stub.Collect(iter([Request(text="a")]), timeout=5).text == "a"
    assert len(list(stub.Chat(iter([Request()]), timeout=5))) == 1
    with pytest.raises(grpc.RpcError) as raised:
        stub.Say(Request(fail_code=5), timeout=5)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert recording.seen == ["Say"] * 4 + ["Watch", "Collect", "Chat", "Say"]  # once a call, not an attempt
    grpc.channel_ready_future(channel).result(timeout=5)


def test_serialisers_may_be_left_out(serve: Serve, channel_to: ChannelTo) -> None:
    say = channel_to(serve(1)).unary_unary(SAY)
    assert Reply.FromString(say(Request(text="raw").SerializeToString(), timeout=5)).text == "raw"
    assert Reply.FromString(say.future(Request(text="raw").SerializeToString()).result()).text == "raw"


def test_many_threads(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    channel = channel_to(servers)
    errors: list[BaseException] = []

    def work() -> None:
        stub = stub_of(channel)
        try:
            for _ in range(20):
                stub.Say(Request(), timeout=20)
                stub.Say.future(Request(), timeout=20).result()
                assert len(list(stub.Watch(Request(count=2), timeout=20))) == 2
                assert stub.Collect(iter([Request(text="a")]), timeout=20).text == "a"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    eventually(lambda: in_flight(channel.mesh) == 0)
    assert sum(node.successes for node in channel.cluster.nodes) == 16 * 80
    assert sum(server.total for server in servers) == 16 * 80
    assert len(channel._resources) == 3
