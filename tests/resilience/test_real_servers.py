"""Breakers, outlier detection and limits before real servers, through real clients."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest

import meshlb
import meshlb.grpc.aio
from meshlb import Breaker, Limits, Mesh, OutlierDetection, Retry, ServiceConfig
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from meshlb.httpx import MeshTransport
from tests.core.parts import assert_adds_up
from tests.http.drivers import drive
from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.wait import eventually

Request = echo_pb2.EchoRequest


def mesh_of(backends: list[Backend], **settings: Any) -> Mesh:
    settings.setdefault("policy", "round_robin")
    settings.setdefault("connect_timeout", 10.0)
    mesh = Mesh(StaticDiscovery({"orders": [b.address for b in backends]}), defaults=ServiceConfig(**settings))
    mesh.cluster("orders").wait_ready(20)
    return mesh


def rows(mesh: Mesh) -> list[dict[str, Any]]:
    return list(mesh.cluster("orders").snapshot()["endpoints"])


def assert_nothing_left(mesh: Mesh) -> None:
    cluster = mesh.cluster("orders")
    assert_adds_up(cluster.nodes)
    assert sum(node.in_flight for node in cluster.nodes) == 0
    if cluster.limiter is not None:
        assert (cluster.limiter.in_use, cluster.limiter.waiting) == (0, 0)


# -- breakers and outliers


def test_an_endpoint_that_fails_half_of_its_calls_is_opened_and_the_caller_sees_none_of_it() -> None:
    with http_backends(3) as backends:
        backends[0].behave(status=503, fail_share=0.5)
        breaker = Breaker(consecutive_failures=None, open_time=600, max_open_time=600)
        with mesh_of(backends, breaker=breaker, retry=Retry(budget=None)) as mesh:
            with httpx.Client(transport=MeshTransport(mesh), timeout=30) as client:
                answers: Counter[int] = Counter()

                def opened() -> bool:
                    answers[client.get("http://orders/").status_code] += 1
                    return rows(mesh)[0]["state"] == "open"

                eventually(opened, 60, 0)
                assert rows(mesh)[0]["reason"].startswith("failure rate 0.5")
                assert set(answers) == {200}
                assert mesh.cluster("orders").nodes[0].calls <= 21  # the first twenty say it
                before = backends[0].requests()
                for _ in range(20):
                    client.get("http://orders/").raise_for_status()
                assert backends[0].requests() == before
            assert_nothing_left(mesh)


def test_a_slow_endpoint_is_opened_by_the_slow_call_rate() -> None:
    with http_backends(3) as backends:
        backends[1].behave(delay=0.6)
        breaker = Breaker(slow_call_duration=0.5, window_calls=3, minimum_calls=3, open_time=600, max_open_time=600)
        with mesh_of(backends, breaker=breaker) as mesh:
            with httpx.Client(transport=MeshTransport(mesh), timeout=30) as client:
                eventually(lambda: client.get("http://orders/").is_success and rows(mesh)[1]["state"] == "open", 60, 0)
            assert "slow-call rate" in rows(mesh)[1]["reason"]
            assert_nothing_left(mesh)


def test_the_worst_of_five_is_ejected_and_comes_back() -> None:
    with http_backends(5) as backends:
        backends[4].behave(status=503, fail_share=0.5)
        outlier = OutlierDetection(
            interval=0.5,
            base_ejection_time=0.5,
            success_rate_request_volume=10,
            failure_percentage_enforcement=0,
        )
        with mesh_of(backends, breaker=None, outlier=outlier, retry=Retry(budget=None)) as mesh:
            changes: list[str] = []
            mesh.cluster("orders").add_state_listener(lambda change: changes.append(change.after))
            over = threading.Event()
            statuses: Counter[int] = Counter()

            def load() -> None:
                with httpx.Client(transport=MeshTransport(mesh), timeout=30) as client:
                    while not over.is_set():
                        statuses[client.get("http://orders/").status_code] += 1

            with ThreadPoolExecutor(2) as pool:
                for _ in range(2):
                    pool.submit(load)
                try:
                    eventually(lambda: "ejected" in changes, 60)
                    backends[4].behave()
                    eventually(lambda: changes[-1] == "ready" and rows(mesh)[4]["eligible"], 60)
                finally:
                    over.set()
            assert set(statuses) == {200}
            assert_nothing_left(mesh)


# -- limits


@pytest.mark.parametrize("kind", ["sync", "asyncio", "trio"])
@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_a_full_limit_is_the_packages_pool_timeout_and_nobodys_failure(package: str, kind: str) -> None:
    with http_backends(2, hang=True) as backends, drive(package, kind) as driver:
        limits = Limits(max_concurrency=2, max_queue=0)
        with mesh_of(backends, limits=limits, retry=Retry(max_attempts=5, budget=None)) as mesh:
            with driver.client(driver.transport(mesh), timeout=60) as client, ThreadPoolExecutor(2) as pool:
                hung = [pool.submit(client.get, "http://orders/") for _ in range(2)]
                eventually(lambda: sum(row["in_flight"] for row in rows(mesh)) == 2, 20)
                eventually(lambda: sum(backend.requests() for backend in backends) == 2, 20)
                for _ in range(3):
                    with pytest.raises(driver.adapter.LimitExceeded, match=r"Limits.max_concurrency 2") as raised:
                        client.get("http://orders/")
                    assert isinstance(raised.value, driver.module.PoolTimeout)
                    assert isinstance(raised.value, meshlb.LimitExceeded)
                    assert raised.value.request.url == "http://orders/"
                assert sum(backend.requests() for backend in backends) == 2
                for backend in backends:
                    backend.behave()
                for call in hung:
                    assert call.result(60).status_code == 200  # closed without an answer, and retried elsewhere
            assert all(row["failures"] <= 2 for row in rows(mesh))
            assert_nothing_left(mesh)


@pytest.mark.parametrize("kind", ["sync", "asyncio", "trio"])
def test_calls_wait_for_their_turn_and_no_endpoint_gets_more_than_it_may(kind: str) -> None:
    with http_backends(2, delay=0.02) as backends, drive("httpx", kind) as driver:
        limits = Limits(max_concurrency=3, max_concurrency_per_endpoint=2, queue_timeout=60)
        with mesh_of(backends, limits=limits) as mesh:
            with driver.client(driver.transport(mesh), timeout=60) as client, ThreadPoolExecutor(12) as pool:
                most = 0
                calls = [pool.submit(client.get, "http://orders/") for _ in range(60)]
                while not all(call.done() for call in calls):
                    most = max(most, *(node.in_flight for node in mesh.cluster("orders").nodes))
                assert {call.result().status_code for call in calls} == {200}
            assert most <= 2
            assert_nothing_left(mesh)


def test_grpc_calls_wait_or_are_refused_whatever_their_kind() -> None:
    with grpc_backends(2, delay=0.05) as backends:
        limits = Limits(max_concurrency=2, queue_timeout=60)
        with mesh_of(backends, limits=limits) as mesh, insecure_channel("consul:///orders", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            with ThreadPoolExecutor(8) as pool:
                blocking = [pool.submit(stub.Say, Request(text="x"), timeout=60) for _ in range(16)]
                futures = [stub.Say.future(Request(text="x"), timeout=60) for _ in range(16)]
                streams = [pool.submit(lambda: list(stub.Watch(Request(count=1), timeout=60))) for _ in range(4)]
                assert len([future.result(60) for future in [*blocking, *futures]]) == 32
                assert [len(stream.result(60)) for stream in streams] == [1] * 4
            eventually(lambda: sum(row["in_flight"] for row in rows(mesh)) == 0, 20)
            assert_nothing_left(mesh)


def test_grpc_refusals_are_resource_exhausted_and_reach_no_server() -> None:
    with grpc_backends(1) as backends:
        backends[0].behave(hang=True)
        limits = Limits(max_concurrency=1, max_queue=0)
        with mesh_of(backends, limits=limits) as mesh, insecure_channel("consul:///orders", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            hung = stub.Say.future(Request(text="x"), timeout=60)
            eventually(lambda: backends[0].requests() == 1, 20)
            for call in (
                lambda: stub.Say(Request(), timeout=60),
                lambda: stub.Say.future(Request(), timeout=60).result(60),
                lambda: list(stub.Watch(Request(), timeout=60)),
                lambda: stub.Say(Request(), timeout=60, wait_for_ready=True),
            ):
                with pytest.raises(grpc.RpcError) as raised:
                    call()
                assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert isinstance(raised.value, meshlb.LimitExceeded)
            assert backends[0].requests() == 1
            hung.cancel()
            eventually(lambda: rows(mesh)[0]["in_flight"] == 0, 20)
            assert_nothing_left(mesh)


def test_grpc_waiting_for_a_turn_ends_with_the_calls_own_deadline() -> None:
    with grpc_backends(1) as backends:
        backends[0].behave(hang=True)
        limits = Limits(max_concurrency=1, queue_timeout=600)
        with mesh_of(backends, limits=limits) as mesh, insecure_channel("consul:///orders", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            hung = stub.Say.future(Request(text="x"), timeout=60)
            eventually(lambda: backends[0].requests() == 1, 20)
            with pytest.raises(grpc.RpcError) as raised:
                stub.Say(Request(), timeout=0.2)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            hung.cancel()
            eventually(lambda: rows(mesh)[0]["in_flight"] == 0, 20)
            assert_nothing_left(mesh)


def test_grpc_aio_calls_wait_or_are_refused() -> None:
    async def main() -> None:
        limits = Limits(max_concurrency=2, max_queue=10, queue_timeout=60)
        with mesh_of(backends, limits=limits) as mesh:
            async with meshlb.grpc.aio.insecure_channel("consul:///orders", mesh=mesh) as channel:
                stub = echo_pb2_grpc.EchoStub(channel)
                results = await asyncio.gather(
                    *(stub.Say(Request(text="x"), timeout=60) for _ in range(30)), return_exceptions=True
                )
                good = [result for result in results if not isinstance(result, BaseException)]
                refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
                assert len(good) >= 12
                assert len(good) + len(refused) == 30
                assert {error.code() for error in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
                assert all(isinstance(error, meshlb.LimitExceeded) for error in refused)
            assert_nothing_left(mesh)

    with grpc_backends(2, delay=0.05) as backends:
        asyncio.run(main())
