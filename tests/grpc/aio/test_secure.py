"""TLS: the instance proves to be the service, whatever its address is; credentials of the call travel along."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

import meshlb.grpc.aio
from meshlb._proto.echo_pb2_grpc import EchoStub
from tests.grpc.aio.servers import Request, unused_address
from tests.grpc.aio.test_contract import outcome, texts
from tests.support.backends import Backend, Certificate, grpc_backend

Tls = tuple[Backend, grpc.ChannelCredentials]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    """A server with a certificate for "echo" alone, not for its address."""
    ca = trustme.CA()
    issued = ca.issue_cert("echo")
    folder: Path = tmp_path_factory.mktemp("tls")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    with grpc_backend(tls=Certificate(folder / "cert.pem", folder / "key.pem")) as backend:
        yield backend, grpc.ssl_channel_credentials(ca.cert_pem.bytes())


def channel_to(mesh: Any, credentials: grpc.ChannelCredentials, **arguments: Any) -> Any:
    return meshlb.grpc.aio.secure_channel("consul:///echo", credentials, mesh=mesh, **arguments)


async def test_the_service_is_verified_not_the_address(tls: Tls, make_mesh: Any) -> None:
    backend, credentials = tls
    async with channel_to(make_mesh([unused_address(), backend.address]), credentials) as channel:
        stub = EchoStub(channel)
        for _ in range(2):
            assert (await stub.Say(Request(text="a"))).text == "a"
            assert (await stub.Collect(texts("a", "b"))).text == "a b"
        await channel.channel_ready()


async def test_another_name_is_refused(tls: Tls, make_mesh: Any) -> None:
    backend, credentials = tls
    options = [("grpc.ssl_target_name_override", "orders")]
    async with channel_to(make_mesh([backend.address]), credentials, options=options) as channel:
        result = await outcome(EchoStub(channel).Say(Request()))
        assert result[:2] == ("AioRpcError", grpc.StatusCode.UNAVAILABLE)


async def test_call_credentials(tls: Tls, make_mesh: Any) -> None:
    backend, credentials = tls
    async with channel_to(make_mesh([unused_address(), backend.address]), credentials) as channel:
        stub = EchoStub(channel)
        token = grpc.access_token_call_credentials("secret")
        for _ in range(2):  # one of them begins at the endpoint that is not there
            reply = await stub.Say(Request(), credentials=token)
            assert reply.metadata["authorization"] == "Bearer secret"
        async for reply in stub.Chat(texts("a"), credentials=token):
            assert reply.metadata["authorization"] == "Bearer secret"
    composite = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials("all"))
    async with channel_to(make_mesh([backend.address]), composite) as channel:
        reply = await EchoStub(channel).Say(Request())
        assert reply.metadata["authorization"] == "Bearer all"


async def test_call_credentials_without_tls(tls: Tls, make_mesh: Any) -> None:
    backend, _ = tls
    mesh = make_mesh([backend.address])
    mesh.cluster("echo").wait_ready(5)
    async with meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as channel:
        with pytest.raises(grpc.aio.UsageError, match="only valid on secure channels"):
            EchoStub(channel).Say(Request(), credentials=grpc.access_token_call_credentials("secret"))


async def test_channel_compression_and_options(serve: Any, make_mesh: Any) -> None:
    (server,) = await serve()
    async with meshlb.grpc.aio.insecure_channel(
        "consul:///echo",
        [("grpc.max_receive_message_length", 100), ("grpc.primary_user_agent", "mine")],
        grpc.Compression.Gzip,
        mesh=make_mesh([server.address]),
    ) as channel:
        stub = EchoStub(channel)
        assert (await stub.Say(Request())).metadata["user-agent"].startswith("mine ")
        result = await outcome(stub.Say(Request(payload_bytes=1000)))
        assert result[1] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert channel.cluster.nodes[0].overloads == 0  # the limit is this process's own
