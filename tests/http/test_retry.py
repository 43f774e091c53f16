"""Which answers are asked for again, of whom, how often, and what the caller gets when that is over."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

import pytest
import tenacity

import meshlb
from meshlb import Endpoint, Retry, RetryBudget
from meshlb.key_sources import Header, PathSegment, QueryParameter
from tests.http.drivers import Driver, drive, in_flight, mesh_of, patient
from tests.support.backends import Backend


def test_status_that_another_instance_may_not_have(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
        for status in (502, 503, 504, 429):
            backends[0].behave(status=status)
            response = client.get("http://orders/")
            assert response.headers["x-backend"] == backends[1].id
            assert response.extensions["meshlb"] == {"endpoint": backends[1].address, "attempts": 2}
        node = mesh.cluster("orders").nodes[0]
        assert (node.failures, node.overloads, in_flight(mesh)) == (3, 1, 0)


def test_status_that_is_the_answer(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
        for status in (400, 404, 409, 500, 501, 505):
            backends[0].behave(status=status)
            response = client.get("http://orders/")
            assert (response.status_code, response.json()["backend"]) == (status, backends[0].id)
        node = mesh.cluster("orders").nodes[0]
        assert (node.failures, node.successes, in_flight(mesh)) == (1, 5, 0)


def test_last_response_is_the_callers_when_attempts_are_used_up(driver: Driver, backends: list[Backend]):
    for backend, status in zip(backends, (502, 503, 504), strict=True):
        backend.behave(status=status)
    with mesh_of(*backends, retry=patient()) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get("http://orders/")
        assert (response.status_code, response.extensions["meshlb"]["attempts"]) == (504, 3)
        assert response.json()["backend"] == backends[2].id, "its body can be read"
        assert str(response.request.url) == "http://orders/"
        assert [backend.requests() for backend in backends] == [1, 1, 1]
        assert in_flight(mesh) == 0


def test_previous_response_is_closed_before_the_next_attempt(driver: Driver, backends: list[Backend]):
    """With one connection an endpoint and one endpoint, a retry would otherwise wait for itself."""
    backends[0].behave(status=503, fail_share=0.5)
    limits = driver.module.Limits(max_connections=1)
    timeout = driver.module.Timeout(5, pool=1)
    with (
        mesh_of(backends[0], retry=patient()) as mesh,
        driver.client(driver.transport(mesh, limits=limits), timeout=timeout) as client,
    ):
        for _ in range(4):
            response = client.stream("GET", "http://orders/")
            assert response.status_code == 200
            driver.close(response)
        assert in_flight(mesh) == 0


def test_one_instance_is_asked_again_after_a_pause(driver: Driver, backends: list[Backend]):
    backends[0].behave(status=503, fail_share=0.5)
    waits = []

    def wait(state: tenacity.RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 0.0

    with mesh_of(backends[0], retry=patient(wait=wait)) as mesh, driver.client(driver.transport(mesh)) as client:
        answers = [client.get("http://orders/") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert waits
        assert in_flight(mesh) == 0


@pytest.mark.parametrize(
    ("method", "options", "extension", "attempts"),
    [
        ("GET", {}, None, 2),
        ("HEAD", {}, None, 2),
        ("OPTIONS", {}, None, 2),
        ("TRACE", {}, None, 2),
        ("PUT", {}, None, 2),
        ("DELETE", {}, None, 2),
        ("QUERY", {}, None, 2),
        ("POST", {}, None, 1),
        ("PATCH", {}, None, 1),
        ("PURGE", {}, None, 1),
        ("POST", {"headers": {"Idempotency-Key": "abc"}}, None, 2),
        ("POST", {}, {"idempotent": True}, 2),
        ("GET", {}, {"idempotent": False}, 1),
        ("GET", {}, {"retry": False}, 1),
        ("GET", {}, {"retry": True}, 2),
    ],
)
def test_which_requests_may_be_sent_twice(
    package: str, method: str, options: dict[str, Any], extension: Any, attempts: int
):
    """503 from the first endpoint, 200 from the second, to any method."""
    with drive(package, "sync") as driver, mesh_of(Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 2)) as mesh:

        def factory(endpoint: Endpoint) -> Any:
            status = 503 if endpoint.port == 1 else 200
            return driver.module.MockTransport(lambda request: driver.module.Response(status))

        extensions = {} if extension is None else {"meshlb": extension}
        with driver.client(driver.transport(mesh, transport_factory=factory)) as client:
            response = client.request(method, "http://orders/", extensions=extensions, **options)
        assert response.extensions["meshlb"]["attempts"] == attempts
        assert response.status_code == (200 if attempts == 2 else 503)
        assert in_flight(mesh) == 0


def test_methods_that_the_configuration_says_are_idempotent(driver: Driver, backends: list[Backend]):
    backends[0].behave(status=503)
    retry = Retry(idempotent_methods=("post", "PATCH"))
    with mesh_of(*backends, retry=retry) as mesh, driver.client(driver.transport(mesh)) as client:
        assert client.post("http://orders/").status_code == 200
        assert client.request("PATCH", "http://orders/").status_code == 200


def test_retry_switched_off(driver: Driver, backends: list[Backend]):
    backends[0].behave(status=503)
    with mesh_of(*backends, retry=None) as mesh, driver.client(driver.transport(mesh)) as client:
        assert client.get("http://orders/").status_code == 503


def test_budget_bounds_the_extra_load(driver: Driver, backends: list[Backend]):
    for backend in backends:
        backend.behave(status=503)
    budget = RetryBudget(ratio=0.2, min_per_second=0)
    with mesh_of(*backends, retry=Retry(budget=budget)) as mesh, driver.client(driver.transport(mesh)) as client:
        for _ in range(50):
            assert client.get("http://orders/").status_code == 503
        assert 50 <= sum(backend.requests() for backend in backends) <= 60


class TestRetryAfter:
    def test_429_is_for_the_service_so_others_wait_too(self, driver: Driver, backends: list[Backend]):
        backends[0].behave(status=429, headers={"retry-after": "1"})
        with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
            started = time.monotonic()
            assert client.get("http://orders/").headers["x-backend"] == backends[1].id
            assert time.monotonic() - started >= 1

    def test_503_is_for_the_instance_so_others_do_not_wait(self, driver: Driver, backends: list[Backend]):
        backends[0].behave(status=503, headers={"retry-after": "3600"})
        with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
            assert client.get("http://orders/").headers["x-backend"] == backends[1].id

    def test_hint_that_is_too_long_to_wait_for(self, driver: Driver, backends: list[Backend]):
        with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
            for hint in ("3600", "9" * 400, formatdate(time.time() + 3600, usegmt=True)):
                backends[0].behave(status=429, headers={"retry-after": hint})
                response = client.get("http://orders/")
                assert (response.status_code, response.headers["retry-after"]) == (429, hint)
            assert in_flight(mesh) == 0

    def test_hint_that_says_nothing_or_now(self, driver: Driver, backends: list[Backend]):
        with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
            for hint in ("0", "soon", "-1", formatdate(0, usegmt=True)):
                backends[0].behave(status=429, headers={"retry-after": hint})
                assert client.get("http://orders/").headers["x-backend"] == backends[1].id

    def test_hint_beyond_the_deadline(self, driver: Driver, backends: list[Backend]):
        backends[0].behave(status=429, headers={"retry-after": "20"})
        with mesh_of(*backends, timeout=2.0) as mesh, driver.client(driver.transport(mesh)) as client:
            assert client.get("http://orders/").status_code == 429


class TestOptions:
    def test_wrong_ones(self, driver: Driver, backends: list[Backend]):
        wrong = [
            ({"idempotant": True}, "unknown option 'idempotant'; there are idempotent, key, retry, timeout"),
            ({"idempotent": "yes"}, "'yes' is not True or False"),
            ({"retry": 3}, "3 is not True or False"),
            ({"timeout": -1}, "timeout"),
            ({"timeout": "1s"}, "timeout"),
            ({"key": 1.5}, "key"),
            ("idempotent", "'idempotent' is not a dict"),
        ]
        with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
            for given, message in wrong:
                with pytest.raises(driver.module.LocalProtocolError, match=message) as caught:
                    client.get("http://orders/", extensions={"meshlb": given})
                assert isinstance(caught.value, meshlb.ConfigError)
            assert in_flight(mesh) == 0

    def test_hash_key(self, driver: Driver, backends: list[Backend]):
        sources = (Header("x-user"), QueryParameter("user"), PathSegment(1))
        with (
            mesh_of(*backends, policy="consistent_hash", hash_on=sources) as mesh,
            driver.client(driver.transport(mesh)) as client,
        ):
            wanted = {client.get("http://orders/", headers={"x-user": "42"}).headers["x-backend"] for _ in range(9)}
            assert len(wanted) == 1
            for number in range(9):
                asked = [
                    client.get("http://orders/", extensions={"meshlb": {"key": "42"}}, headers={"x-user": f"{number}"}),
                    client.get("http://orders/?user=42"),
                    client.get(f"http://orders/users/42?page={number}"),
                ]
                assert {response.headers["x-backend"] for response in asked} == wanted
            used = {client.get("http://orders/", headers={"x-user": f"{n}"}).headers["x-backend"] for n in range(64)}
            assert used == {backend.id for backend in backends}
