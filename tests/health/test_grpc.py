"""gRPC checks of real servers."""

from __future__ import annotations

import grpc
import pytest
import trustme
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

from meshlb import CheckTLS, GrpcCheck
from meshlb.health.grpc_prober import health_request, read_status
from tests.health.checked import SECONDS, checked
from tests.health.grpc_server import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health, health_server
from tests.support.backends import http_backends
from tests.support.ports import free_port, loopback_host
from tests.support.wait import eventually


@given(st.text(max_size=300))
def test_the_request_is_the_protocols(service):
    assert health_request(service) == health_pb2.HealthCheckRequest(service=service).SerializeToString()


@given(st.sampled_from(range(4)))
def test_the_answer_is_the_protocols(status):
    assert read_status(health_pb2.HealthCheckResponse(status=status).SerializeToString()) == status


@given(st.binary(max_size=4))
def test_no_other_answer_passes(message):
    if read_status(message) == SERVING:
        try:
            assert health_pb2.HealthCheckResponse.FromString(message).status == SERVING
        except DecodeError:
            pytest.fail("not even a message")


def test_a_server_that_serves_stops_serving_and_serves_again():
    health = Health()
    health.set("", SERVING)
    with health_server(health) as address, checked(GrpcCheck(), address) as service:
        service.until(address, "ready", r"^gRPC health: SERVING in \d+ ms, ")
        health.set("", NOT_SERVING)
        row = service.until(address, "unhealthy", "^gRPC health: NOT_SERVING in .* (3 of 3 failures|in a row)")
        assert row["reason"].startswith("gRPC health: NOT_SERVING")
        health.set("", SERVING)
        service.until(address, "ready", "SERVING in")
        health.enter_graceful_shutdown()
        service.until(address, "unhealthy", "NOT_SERVING in")
        assert health.metadata["user-agent"].startswith("grpc-python")


def test_the_service_that_is_asked_for():
    health = Health()
    health.set("shop.Orders", SERVING)
    with health_server(health) as address:
        with checked(GrpcCheck(service="shop.Orders"), address) as service:
            service.until(address, "ready", r"^gRPC health of 'shop.Orders': SERVING in ")
        with checked(GrpcCheck(service="shop.Stock"), address) as service:
            service.until(address, "unhealthy", "NOT_FOUND")
        with checked(GrpcCheck(), address) as service:
            service.until(address, "ready", "SERVING in")


def test_a_server_without_a_health_service_passes():
    """gRFC A17: UNIMPLEMENTED is taken for healthy."""
    with health_server(None) as address, checked(GrpcCheck(wait_first=True, watch=True), address) as service:
        service.until(address, "ready", r"UNIMPLEMENTED \(it has no health service\) in ")
        service.rounds(address, 3)
        service.until(address, "ready", "UNIMPLEMENTED")


def test_a_server_that_fails_hangs_is_gone_or_speaks_something_else():
    health = Health()
    with health_server(health) as address, checked(GrpcCheck(timeout=0.5, unhealthy_threshold=2), address) as service:
        service.until(address, "ready", "SERVING in")
        health.code = grpc.StatusCode.UNAVAILABLE
        service.until(address, "unhealthy", r"UNAVAILABLE \(told to fail\) in ")
        health.code = None
        service.until(address, "ready", "SERVING in")
        health.hang = True
        service.until(address, "unhealthy", r"(DEADLINE_EXCEEDED|no answer)")
        health.hang = False
        health.released.set()
        service.until(address, "ready", "SERVING in")
    address = f"{loopback_host()}:{free_port()}"
    with checked(GrpcCheck(), address) as service:
        service.until(address, "unhealthy", r"UNAVAILABLE \(.*Connection refused")
        health = Health()
        with health_server(health, port=int(address.rpartition(":")[2])):
            service.until(address, "ready", "SERVING in")
        service.until(address, "unhealthy", "UNAVAILABLE")
    with http_backends(1) as (backend,), checked(GrpcCheck(), backend.address) as service:
        service.until(backend.address, "unhealthy", "UNAVAILABLE")


class Flood(Health):
    """Answers a megabyte."""

    def Check(self, request, context):  # noqa: N802  # the RPC's name
        context.set_trailing_metadata((("x-big", "y" * 1000),))
        answer = health_pb2.HealthCheckResponse(status=SERVING)
        answer.MergeFromString(b"\x7a\x80\x80\x40" + b"z" * (1 << 20))  # an unknown field 15
        return answer


def test_an_answer_that_is_too_long_is_refused():
    with health_server(Flood()) as address, checked(GrpcCheck(), address) as service:
        service.until(address, "unhealthy", "RESOURCE_EXHAUSTED")


def test_watch_tells_at_once_and_without_threshold():
    health = Health()
    check = GrpcCheck(watch=True, interval=3600, unhealthy_interval=3600, unhealthy_threshold=1000)
    with health_server(health) as address, checked(check, address) as service:
        service.until(address, "ready", r"gRPC health: SERVING \(said by its Watch\), ")
        checks = health.checks
        for _ in range(3):
            health.set("", NOT_SERVING)
            service.until(address, "unhealthy", r"NOT_SERVING \(said by its Watch\), ")
            health.set("", SERVING)
            service.until(address, "ready", r"SERVING \(said by its Watch\), ")
        health.set("", SERVICE_UNKNOWN)
        service.until(address, "unhealthy", r"SERVICE_UNKNOWN \(said by its Watch\), ")
        assert health.checks == checks and health.watches == 1


def test_a_watch_that_breaks_is_begun_again_and_one_that_is_not_there_is_not_asked_for():
    health = Health()
    health.watch_code = grpc.StatusCode.UNAVAILABLE
    with health_server(health) as address, checked(GrpcCheck(watch=True), address) as service:
        eventually(lambda: health.watches >= 3, SECONDS)
        service.until(address, "ready", "SERVING in")
        health.watch_code = None
        eventually(lambda: health.watched, SECONDS)
    health = Health()
    health.watch_code = grpc.StatusCode.UNIMPLEMENTED
    with health_server(health) as address, checked(GrpcCheck(watch=True), address) as service:
        service.rounds(address, 6)
        assert health.watches == 1
        health.code = grpc.StatusCode.INTERNAL
        service.until(address, "unhealthy", "INTERNAL")
        health.code = health.watch_code = None
        service.until(address, "ready")
        eventually(lambda: health.watches == 2, SECONDS)


def test_tls(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("orders", "other.name")
    pair = (issued.private_key_pem.bytes(), b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    client = authority.issue_cert("client")
    client.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    ca_file = tmp_path / "ca.pem"
    with health_server(Health(), grpc.ssl_server_credentials([pair])) as address:
        for tls, state, words in [
            (CheckTLS(ca_file=ca_file), "ready", "SERVING"),
            (CheckTLS(ca_file=ca_file, server_name="other.name"), "ready", "SERVING"),
            (CheckTLS(ca_file=ca_file, server_name="wrong.name"), "unhealthy", "UNAVAILABLE"),
            (CheckTLS(), "unhealthy", "UNAVAILABLE"),
            (None, "unhealthy", "UNAVAILABLE"),
        ]:
            with checked(GrpcCheck(tls=tls, watch=state == "ready"), address) as service:
                service.until(address, state, words)
    mutual = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    with health_server(Health(), mutual) as address:
        for tls, state in [
            (CheckTLS(ca_file=ca_file, cert=tmp_path / "client.pem"), "ready"),
            (CheckTLS(ca_file=ca_file), "unhealthy"),
        ]:
            with checked(GrpcCheck(tls=tls), address) as service:
                service.until(address, state)
                service.rounds(address, 1)


def test_no_proxy_of_the_environment_comes_between(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{loopback_host()}:1")
    health = Health()
    with health_server(health) as address, checked(GrpcCheck(watch=True), address) as service:
        service.until(address, "ready", "SERVING")
        eventually(lambda: health.watched, SECONDS)
