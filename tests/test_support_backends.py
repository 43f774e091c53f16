"""The servers that the other tests trust."""

from __future__ import annotations

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
import trustme

from meshlb._proto import echo_pb2, echo_pb2_grpc
from tests.support.backends import Certificate, grpc_backend, http_backend, http_backends
from tests.support.stubs import current_stubs
from tests.support.wait import eventually


def test_http_backends_answer_32_keep_alive_clients():
    with http_backends(2) as backends, httpx.Client(limits=httpx.Limits(max_connections=64)) as client:

        def call(number: int) -> str:
            answer = client.post(f"{backends[number % 2].url}/calls?n={number}", content=f"body {number}")
            assert answer.json()["body"] == f"body {number}"
            assert answer.headers["x-backend"] == answer.json()["backend"]
            return answer.headers["x-backend"]

        with ThreadPoolExecutor(32) as pool:
            seen = list(pool.map(call, range(640)))
        assert [seen.count(backend.id) for backend in backends] == [320, 320]
        assert [backend.requests("/calls") for backend in backends] == [320, 320]


def test_http_backend_misbehaves_as_told():
    with http_backend() as backend, httpx.Client(timeout=0.5) as client:
        backend.behave(status=503, headers={"retry-after": "7"}, fail_share=0.25)
        assert [client.get(backend.url).status_code for _ in range(8)].count(503) == 2
        backend.behave(truncate=True)
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            client.get(backend.url)
        backend.behave(reset=True)
        with pytest.raises(httpx.ReadError):
            client.get(backend.url)
        backend.behave(hang=True)
        with pytest.raises(httpx.ReadTimeout):
            client.get(backend.url)
        backend.behave(chunks=4, interval=0.01)
        answer = client.put(backend.url, content=iter([b"in ", b"pieces"]))
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.json()["body"] == "in pieces"
        eventually(lambda: backend.stats()["in_flight"] == 0)


def test_backend_is_killed_frozen_and_restarted_on_its_port():
    with http_backend() as backend:
        address = backend.address
        backend.kill()
        with pytest.raises(httpx.ConnectError):
            httpx.get(backend.url)
        backend.restart()
        assert backend.address == address
        assert httpx.get(backend.url).status_code == 200
        backend.freeze()
        with socket.create_connection((backend.host, backend.port), timeout=5):
            pass
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(backend.url, timeout=0.3)
        backend.thaw()
        assert httpx.get(backend.url).status_code == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((backend.host, backend.port), timeout=5)


def test_http_backend_speaks_tls(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("orders.test")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with http_backend(tls=Certificate(tmp_path / "cert.pem", tmp_path / "key.pem")) as backend:
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with httpx.Client(verify=trusting) as client:
            answer = client.get(backend.url, extensions={"sni_hostname": "orders.test"})
        assert answer.json()["backend"] == backend.id


def test_grpc_backend_answers_all_four_arities_and_fails_as_told():
    with grpc_backend() as backend, grpc.insecure_channel(backend.address) as channel:
        stub = echo_pb2_grpc.EchoStub(channel)
        request = echo_pb2.EchoRequest
        assert stub.Say(request(text="hello"), timeout=5).backend == backend.id
        assert [reply.sequence for reply in stub.Watch(request(count=3), timeout=5)] == [0, 1, 2]
        assert stub.Collect(iter([request(text="a"), request(text="b")]), timeout=5).text == "a b"
        assert [reply.text for reply in stub.Chat(iter([request(text="a"), request(text="b")]), timeout=5)] == [
            "a",
            "b",
        ]
        stream = stub.Watch(request(count=5, fail_after=2, fail_code=14), timeout=5)
        assert [next(stream).sequence, next(stream).sequence] == [0, 1]
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        backend.behave(code="RESOURCE_EXHAUSTED", trailers={"grpc-retry-pushback-ms": "100"})
        with pytest.raises(grpc.RpcError) as caught:
            stub.Put(request(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata()) == {"grpc-retry-pushback-ms": "100"}
        backend.behave(hang=True)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Say(request(), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert backend.requests("Say") == 2
        eventually(lambda: backend.stats()["in_flight"] == 0)
        backend.behave()
        backend.restart()
        assert stub.Say(request(text="again"), timeout=10, wait_for_ready=True).text == "again"


def test_stubs_of_the_installed_generator_speak_to_the_backend(tmp_path):
    stubs = current_stubs(tmp_path)
    assert "_registered_method" in (tmp_path / "meshlb/_proto/echo_pb2_grpc.py").read_text()
    with grpc_backend() as backend, grpc.insecure_channel(backend.address) as channel:
        assert stubs.EchoStub(channel).Say(echo_pb2.EchoRequest(text="hello"), timeout=5).backend == backend.id
