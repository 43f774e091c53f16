"""A second attempt while the first is under way: who is asked, who is not, and what is left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from opentelemetry.trace import format_span_id

import meshlb
from meshlb import Endpoint, Hedge, Mesh, RetryBudget, ServiceConfig
from meshlb.discovery import StaticDiscovery
from tests.http.drivers import Driver, InOrder, drive, in_flight, mesh_of, patient
from tests.http.test_telemetry import Recorder, recorder
from tests.support.backends import Backend
from tests.support.ports import free_port, loopback_host
from tests.support.wait import eventually

__all__ = ["recorder"]  # a fixture

LONG = 30.0
"""A delay that no test comes to."""


def hedged(delay: float, **settings: Any) -> meshlb.Retry:
    return patient(hedge=Hedge(delay=delay), **settings)


def none_is_left(mesh: Mesh) -> None:
    eventually(lambda: in_flight(mesh) == 0, 20)


def no_thread_is_left() -> None:
    """The losers' threads have been woken: their own timeout is longer than this."""
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "meshlb-hedge"], 20)


def test_hung_instance_is_outrun(driver: Driver, backends: list[Backend]):
    backends[0].behave(hang=True)
    with (
        mesh_of(*backends, retry=hedged(0.02)) as mesh,
        driver.client(driver.transport(mesh), timeout=120) as client,
    ):
        response = client.get("http://orders/?x=1")
        assert response.extensions["meshlb"] == {"endpoint": backends[1].address, "attempts": 2}
        assert response.json()["backend"] == backends[1].id
        none_is_left(mesh)
        cluster = mesh.cluster("orders")
        slow, fast, _ = cluster.nodes
        assert (slow.failures, slow.ignored, slow.calls) == (0, 1, 1)
        assert (fast.successes, fast.calls) == (1, 1)
        assert slow.latency.has_history, "that it is slow is known all the same"
        assert cluster.retries == 1
        no_thread_is_left()


def test_connection_of_the_loser_is_free_again(driver: Driver, backends: list[Backend]):
    """With one connection an endpoint, a loser that kept its own would block the next call there."""
    limits = driver.module.Limits(max_connections=1)
    with (
        mesh_of(*backends[:2], retry=hedged(0.05)) as mesh,
        driver.client(driver.transport(mesh, limits=limits), timeout=driver.module.Timeout(60, pool=20)) as client,
    ):
        for _ in range(3):
            backends[0].behave(hang=True)
            assert client.get("http://orders/").headers["x-backend"] == backends[1].id
            backends[0].behave()
            backends[1].behave(hang=True)
            assert client.get("http://orders/").headers["x-backend"] == backends[0].id
            backends[1].behave()
        none_is_left(mesh)


def test_answer_in_time_is_not_hedged(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends, retry=hedged(LONG)) as mesh, driver.client(driver.transport(mesh)) as client:
        for _ in range(5):
            response = client.get("http://orders/")
            assert response.extensions["meshlb"] == {"endpoint": backends[0].address, "attempts": 1}
        assert backends[1].requests() == 0
        assert in_flight(mesh) == 0


def test_body_of_the_winner_is_streamed_and_holds_its_lease(driver: Driver, backends: list[Backend]):
    backends[0].behave(hang=True)
    backends[1].behave(chunks=3)
    with mesh_of(*backends, retry=hedged(0.02)) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.stream("GET", "http://orders/bytes?size=3000")
        node = mesh.cluster("orders").nodes[1]
        assert node.in_flight == 1
        assert len(driver.read(response)) == 3000
        driver.close(response)
        assert node.in_flight == 0
        none_is_left(mesh)


@pytest.mark.parametrize(
    ("method", "options", "extension", "attempts"),
    [
        ("GET", {}, None, 2),
        ("PUT", {"content": b"some"}, None, 2),
        ("POST", {"content": b"some"}, None, 1),
        ("POST", {"content": b"some", "headers": {"Idempotency-Key": "a"}}, None, 2),
        ("POST", {}, {"idempotent": True}, 2),
        ("GET", {}, {"idempotent": False}, 1),
        ("GET", {}, {"retry": False}, 1),
    ],
)
def test_only_what_may_be_sent_twice(
    package: str, backends: list[Backend], method: str, options: Any, extension: Any, attempts: int
):
    backends[0].behave(delay=10.0 if attempts == 2 else 0.2)
    with (
        drive(package, "sync") as driver,
        mesh_of(*backends, retry=hedged(0.01)) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        extensions = {} if extension is None else {"meshlb": extension}
        response = client.request(method, "http://orders/", extensions=extensions, **options)
        assert response.extensions["meshlb"]["attempts"] == attempts
        none_is_left(mesh)


def test_body_that_is_read_as_it_is_sent_is_not_hedged(driver: Driver, backends: list[Backend]):
    backends[0].behave(delay=0.3)
    body: Any = [b"some ", b"bytes"]

    async def parts() -> Any:
        for part in body:
            yield part

    with mesh_of(*backends, retry=hedged(0.01)) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.request("PUT", "http://orders/", content=parts() if driver.is_async else body)
        assert response.extensions["meshlb"]["attempts"] == 1
        assert in_flight(mesh) == 0


def test_budget_pays(driver: Driver, backends: list[Backend]):
    backends[0].behave(hang=True)
    retry = hedged(0.01, budget=RetryBudget(0, 0.1))  # one retry in all
    with mesh_of(*backends, retry=retry) as mesh, driver.client(driver.transport(mesh)) as client:
        assert client.get("http://orders/").headers["x-backend"] == backends[1].id
        backends[0].behave(delay=0.3)
        attempts = [client.get("http://orders/").extensions["meshlb"]["attempts"] for _ in range(2)]
        assert attempts == [1, 1]
        budget = mesh.cluster("orders").budget
        assert budget is not None
        assert budget.balance == 0
        none_is_left(mesh)


def test_failure_brings_the_next_attempt_forward(driver: Driver, backends: list[Backend]):
    backends[0].behave(status=503)
    with mesh_of(*backends, retry=hedged(LONG)) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get("http://orders/")
        assert response.extensions["meshlb"] == {"endpoint": backends[1].address, "attempts": 2}
        assert mesh.cluster("orders").nodes[0].failures == 1
        assert in_flight(mesh) == 0


def test_answer_that_no_other_would_change_wins(driver: Driver, backends: list[Backend]):
    backends[0].behave(hang=True)
    backends[1].behave(status=404)
    with mesh_of(*backends, retry=hedged(0.02)) as mesh, driver.client(driver.transport(mesh)) as client:
        assert client.get("http://orders/").status_code == 404
        none_is_left(mesh)


def test_slow_success_beats_a_fast_failure(driver: Driver, backends: list[Backend]):
    backends[0].behave(delay=0.4)
    backends[1].behave(status=503)
    with (
        mesh_of(*backends[:2], retry=hedged(0.02, max_attempts=2)) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        response = client.get("http://orders/")
        assert (response.status_code, response.headers["x-backend"]) == (200, backends[0].id)
        assert response.json()["backend"] == backends[0].id
        none_is_left(mesh)


def test_last_answer_is_the_callers_when_all_fail(driver: Driver, backends: list[Backend]):
    for backend in backends:
        backend.behave(status=503)
    with mesh_of(*backends, retry=hedged(0.05)) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get("http://orders/")
        assert (response.status_code, response.extensions["meshlb"]["attempts"]) == (503, 3)
        assert response.json()["backend"], "its body can be read"
        assert str(response.request.url) == "http://orders/"
        none_is_left(mesh)


def test_last_error_is_the_callers_when_nobody_answers(driver: Driver):
    nobody = [Endpoint(loopback_host(), free_port()) for _ in range(3)]
    with mesh_of(*nobody, retry=hedged(0.01)) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.module.ConnectError) as caught:
            client.get("http://orders/")
        assert str(caught.value.request.url) == "http://orders/"
        none_is_left(mesh)


def test_all_at_once(driver: Driver, backends: list[Backend]):
    for backend in backends:
        backend.behave(delay=1.0)
    retry = patient(hedge=Hedge(delay=0, max_attempts=3))
    with mesh_of(*backends, retry=retry) as mesh, driver.client(driver.transport(mesh)) as client:
        assert client.get("http://orders/").extensions["meshlb"]["attempts"] == 3
        none_is_left(mesh)
        eventually(lambda: [backend.requests() for backend in backends] == [1, 1, 1], 20)


def test_percentile_of_what_was_measured(driver: Driver, backends: list[Backend]):
    with (
        mesh_of(*backends, retry=patient(hedge=Hedge(percentile=0.9))) as mesh,
        driver.client(driver.transport(mesh), timeout=120) as client,
    ):
        for _ in range(25):
            assert client.get("http://orders/").status_code == 200
        backends[0].behave(hang=True)
        assert client.get("http://orders/").headers["x-backend"] == backends[1].id
        none_is_left(mesh)


def test_time_is_up_while_both_hang(driver: Driver, backends: list[Backend]):
    for backend in backends:
        backend.behave(hang=True)
    with (
        mesh_of(*backends, retry=hedged(0.02), timeout=0.6) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        with pytest.raises(driver.module.TimeoutException):
            client.get("http://orders/")
        none_is_left(mesh)
        no_thread_is_left()


def test_each_attempt_has_its_span(driver: Driver, backends: list[Backend], recorder: Recorder):
    backends[0].behave(hang=True)
    discovery = StaticDiscovery({"orders": [backend.address for backend in backends]})
    config = ServiceConfig(policy=InOrder(), breaker=None, retry=hedged(0.02), connect_timeout=10)
    with (
        Mesh(discovery, defaults=config, tracer_provider=recorder.provider) as mesh,
        driver.client(driver.transport(mesh), timeout=120) as client,
    ):
        response = client.get("http://orders/")
        lost, won = recorder.spans(2)
        assert (lost.attributes or {})["meshlb.outcome"] == "ignored"
        assert (won.attributes or {})["http.response.status_code"] == 200
        assert (won.attributes or {})["http.request.resend_count"] == 1
        context = won.get_span_context()
        assert context is not None
        assert format_span_id(context.span_id) in response.json()["headers"]["traceparent"]
        none_is_left(mesh)


def test_caller_who_goes_leaves_nothing(package: str, backends: list[Backend]):
    for backend in backends:
        backend.behave(hang=True)
    for kind in ("asyncio", "trio"):
        with (
            drive(package, kind) as driver,
            mesh_of(*backends, retry=hedged(0.01, budget=RetryBudget(0, 0.2))) as mesh,
            driver.client(driver.transport(mesh), timeout=120) as client,
        ):
            assert driver.portal is not None
            for backend in backends:
                backend.stats(clear=True)
            future = driver.portal.start_task_soon(client.client.get, "http://orders/")
            eventually(lambda: backends[1].requests() == 1, 20)
            future.cancel()
            none_is_left(mesh)
            nodes = mesh.cluster("orders").nodes
            assert [(node.failures, node.ignored) for node in nodes] == [(0, 1), (0, 1), (0, 0)]
