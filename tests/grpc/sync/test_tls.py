"""TLS under the service's name, whatever the instance's address; call credentials."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
import trustme

from meshlb._proto import echo_pb2_grpc
from tests.grpc.sync.conftest import ChannelTo, Serve
from tests.grpc.sync.servers import Request


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def pem(certificate: trustme.LeafCert) -> tuple[bytes, bytes]:
    return certificate.private_key_pem.bytes(), b"".join(part.bytes() for part in certificate.cert_chain_pems)


def server_credentials(authority: trustme.CA, name: str, *, client: bool = False) -> grpc.ServerCredentials:
    root = authority.cert_pem.bytes() if client else None
    return grpc.ssl_server_credentials([pem(authority.issue_cert(name))], root, client)


def client_credentials(authority: trustme.CA, certificate: trustme.LeafCert | None = None) -> Any:
    key, chain = (None, None) if certificate is None else pem(certificate)
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


def test_the_certificate_is_the_services(authority: trustme.CA, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2, credentials=server_credentials(authority, "echo"))
    channel = channel_to(servers, credentials=client_credentials(authority))
    grpc.channel_ready_future(channel).result(timeout=10)
    stub = stub_of(channel)
    assert {stub.Say(Request(), timeout=5).backend for _ in range(4)} == {"s0", "s1"}
    assert [reply.sequence for reply in stub.Watch(Request(count=2), timeout=5)] == [0, 1]


@pytest.mark.parametrize("option", ["grpc.default_authority", "grpc.ssl_target_name_override"])
def test_another_name_by_option(option: str, authority: trustme.CA, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1, credentials=server_credentials(authority, "orders.internal"))
    channel = channel_to(servers, credentials=client_credentials(authority), options=[(option, "orders.internal")])
    assert stub_of(channel).Say(Request(), timeout=5).backend == "s0"


def test_an_instance_with_a_wrong_certificate_gets_no_call(
    authority: trustme.CA, serve: Serve, channel_to: ChannelTo
) -> None:
    wrong = serve(1, credentials=server_credentials(authority, "somebody-else"))
    right = serve(1, credentials=server_credentials(authority, "echo"))
    right[0].id = "right"
    stub = stub_of(channel_to([*wrong, *right], credentials=client_credentials(authority), breaker=None))
    assert {stub.Put(Request(), timeout=5).backend for _ in range(4)} == {"right"}
    assert wrong[0].total == 0
    alone = stub_of(channel_to(wrong, credentials=client_credentials(authority), breaker=None))
    with pytest.raises(grpc.RpcError) as raised:
        alone.Put(Request(), timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_client_certificates(authority: trustme.CA, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1, credentials=server_credentials(authority, "echo", client=True))
    mine = client_credentials(authority, authority.issue_cert("client"))
    assert stub_of(channel_to(servers, credentials=mine)).Say(Request(), timeout=5).backend == "s0"
    with pytest.raises(grpc.RpcError):
        stub_of(channel_to(servers, credentials=client_credentials(authority))).Put(Request(), timeout=5)


class Token(grpc.AuthMetadataPlugin):
    def __init__(self) -> None:
        self.urls: list[str] = []

    def __call__(self, context: Any, callback: Any) -> None:
        self.urls.append(context.service_url)
        callback((("x-token", "secret"),), None)


@pytest.mark.parametrize("where", ["channel", "call"])
def test_call_credentials(where: str, authority: trustme.CA, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1, credentials=server_credentials(authority, "echo"))
    token = Token()
    call_credentials = grpc.metadata_call_credentials(token)
    credentials, options = client_credentials(authority), {"credentials": call_credentials}
    if where == "channel":
        credentials, options = grpc.composite_channel_credentials(credentials, call_credentials), {}
    stub = stub_of(channel_to(servers, credentials=credentials))
    assert stub.Say(Request(), timeout=5, **options).metadata["x-token"] == "secret"
    assert stub.Say.future(Request(), timeout=5, **options).result().metadata["x-token"] == "secret"
    assert next(stub.Watch(Request(), timeout=5, **options)).metadata["x-token"] == "secret"
    assert stub.Collect(iter([Request()]), timeout=5, **options).metadata["x-token"] == "secret"
    assert next(stub.Chat(iter([Request()]), timeout=5, **options)).metadata["x-token"] == "secret"
    assert set(token.urls) == {"https://echo/meshlb.demo.v1.Echo"}
