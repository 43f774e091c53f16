"""What only a program that swaps one line would notice: each case on grpc.aio's own channel and on ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from grpc_status import rpc_status

import meshlb
import meshlb.grpc.aio
from meshlb._proto.echo_pb2_grpc import EchoStub
from tests.grpc.aio.servers import Request, unused_address
from tests.grpc.aio.test_contract import described, outcome
from tests.grpc.sync.servers import SAY, WATCH
from tests.grpc.sync.servers import Server as ThreadedServer
from tests.grpc.sync.test_dropin import Rich, rich_status
from tests.grpc.sync.test_tls import client_credentials, server_credentials

State = grpc.ChannelConnectivity


@pytest.fixture(params=["grpc", "mesh", "mesh, ready"])
async def channel_at(request: pytest.FixtureRequest, make_mesh: Any) -> AsyncIterator[Callable[..., Any]]:
    """A channel to an address that is given right in the target, of grpc's own kind or of ours."""
    async with AsyncExitStack() as stack:

        async def make(address: str, credentials: Any = None, **arguments: Any) -> Any:
            kind = "insecure_channel" if credentials is None else "secure_channel"
            positional = () if credentials is None else (credentials,)
            if request.param == "grpc":
                channel = getattr(grpc.aio, kind)(address, *positional, **arguments)
            else:
                factory = getattr(meshlb.grpc.aio, kind)
                channel = factory(f"static:///{address}", *positional, mesh=make_mesh([]), **arguments)
            if request.param == "mesh, ready":
                channel.cluster.wait_ready(20)
            return await stack.enter_async_context(channel)

        yield make


async def test_asking_to_connect_gives_the_state_of_before(serve: Any, channel_at: Any) -> None:
    (server,) = await serve()
    channel = await channel_at(server.address)
    state = channel.get_state(True)
    assert state is State.IDLE
    while state is not State.READY:  # nobody asks to connect again
        await asyncio.wait_for(channel.wait_for_state_change(state), 20)
        state = channel.get_state()


async def test_asking_to_connect_where_nobody_is(channel_at: Any) -> None:
    channel = await channel_at(unused_address())
    assert [channel.get_state(True), channel.get_state(False)][0] is State.IDLE
    state = channel.get_state()
    while state is not State.TRANSIENT_FAILURE:
        await asyncio.wait_for(channel.wait_for_state_change(state), 20)
        state = channel.get_state()


async def test_closed_while_a_change_is_waited_for(serve: Any, channel_at: Any) -> None:
    (server,) = await serve()
    channel = await channel_at(server.address)
    waiting = asyncio.ensure_future(channel.wait_for_state_change(channel.get_state()))
    await asyncio.sleep(0)
    await channel.close()
    assert await asyncio.wait_for(waiting, 20) is None
    assert channel.get_state(True) is channel.get_state() is State.SHUTDOWN
    with pytest.raises(grpc.aio.UsageError, match=r"Channel is closed\."):
        await channel.wait_for_state_change(State.SHUTDOWN)


@pytest.mark.parametrize("kind", ["Collect", "Chat"])
async def test_first_message_of_a_call_that_reaches_nobody(kind: str, channel_at: Any) -> None:
    channel = await channel_at(unused_address())
    for _ in range(8):  # so many failures that a breaker has opened
        call = getattr(EchoStub(channel), kind)(timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.write(Request())
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert (await outcome(call.write(Request())))[0] in ("InvalidStateError", "AioRpcError", "NoEndpoints")


async def test_cancelled_before_the_first_message(serve: Any, channel_at: Any) -> None:
    (server,) = await serve()
    call = EchoStub(await channel_at(server.address)).Chat()
    assert call.cancel()
    result = await outcome(call.write(Request()))
    assert result in (("InvalidStateError", "RPC already finished."), ("CancelledError", ""))
    assert (await call.code(), await call.details()) == (
        grpc.StatusCode.CANCELLED, "Locally cancelled by application!"
    )  # fmt: skip


async def test_options_in_bytes(serve: Any, channel_at: Any) -> None:
    (server,) = await serve()
    channel = await channel_at(server.address, options=[(b"grpc.max_send_message_length", 5)])
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await EchoStub(channel).Say(Request(text="longer than that"), timeout=20)
    assert described(raised.value)[:2] == ("AioRpcError", grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_tls_name_override(channel_at: Any) -> None:
    authority = trustme.CA()
    with ThreadedServer(credentials=server_credentials(authority, "orders.internal")) as server:
        options = [("grpc.ssl_target_name_override", "orders.internal")]
        channel = await channel_at(server.address, client_credentials(authority), options=options)
        assert (await EchoStub(channel).Say(Request(text="a"), timeout=20)).text == "a"
        assert server.authorities == [b"orders.internal"]


async def test_rich_status(channel_at: Any) -> None:
    with ThreadedServer(handler=Rich()) as server:
        channel = await channel_at(server.address)
        unary, stream = channel.unary_unary(SAY)(b"", timeout=20), channel.unary_stream(WATCH)(b"", timeout=20)
        assert await stream.read() == b"first"
        for refused in (unary, stream.read()):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await refused
            assert rpc_status.from_call(raised.value) == rich_status()
        assert await rpc_status.aio.from_call(unary) == await rpc_status.aio.from_call(stream) == rich_status()


@pytest.mark.parametrize("kind", ["Collect", "Chat"])
async def test_first_message_of_a_call_that_may_not_go_anywhere(kind: str, make_mesh: Any) -> None:
    """It has ended before its first message, but its error is known: no reason to say only that it is over."""
    mesh = make_mesh([unused_address()])
    async with meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as channel:
        mesh.close()
        call = getattr(EchoStub(channel), kind)()
        for _ in range(2):
            with pytest.raises(meshlb.MeshClosed) as raised:
                await call.write(Request())
            assert isinstance(raised.value, grpc.aio.AioRpcError)
        assert await call.code() is raised.value.code()
