"""``Retry.retry_on``, ``Retry.buffer_body``, refunds, and calls that are refused here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import tenacity

import meshlb
from meshlb import AdaptiveThrottling, RetryBudget
from tests.http.drivers import Driver, in_flight, mesh_of, patient
from tests.support.backends import Backend
from tests.support.wait import eventually

STATUSES: list[tuple[Any, int, bool]] = [
    ((500,), 500, True),
    ((500,), 503, False),
    ((404, 503), 404, True),
    (tenacity.retry_if_result(lambda response: response.status_code == 418), 418, True),
    (tenacity.retry_if_result(lambda response: "x-backend" in response.headers), 400, True),
    (tenacity.retry_if_exception_type(OSError), 503, False),
    (tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_result(lambda found: found.is_error), 409, True),
    (tenacity.retry_if_result(lambda response: 1 / 0 > 1), 503, True),  # broken: the verdict table holds
    (tenacity.retry_if_result(lambda response: 1 / 0 > 1), 404, False),
]


def test_statuses(driver: Driver, backends: list[Backend]):
    for retry_on, status, retried in STATUSES:
        backends[0].behave(status=status)
        with (
            mesh_of(*backends, retry=patient(retry_on=retry_on, max_attempts=2)) as mesh,
            driver.client(driver.transport(mesh)) as client,
        ):
            response = client.get("http://orders/")
            assert response.extensions["meshlb"]["attempts"] == (2 if retried else 1), (status, retry_on)
            assert client.post("http://orders/").extensions["meshlb"]["attempts"] == 1, "not safe, whatever it says"
            assert in_flight(mesh) == 0


def test_errors(driver: Driver, backends: list[Backend]):
    backends[0].behave(reset=True)
    only_timeouts = tenacity.retry_if_exception_type(driver.module.TimeoutException)
    for retry_on, retried in ((only_timeouts, False), (("ReadError", "RemoteProtocolError"), True)):
        with (
            mesh_of(*backends, retry=patient(retry_on=retry_on)) as mesh,
            driver.client(driver.transport(mesh)) as client,
        ):
            if retried:
                assert client.get("http://orders/").status_code == 200
            else:
                with pytest.raises(driver.module.TransportError):
                    client.get("http://orders/")
            assert in_flight(mesh) == 0


def once(size: int) -> Iterator[bytes]:
    for number in range(size):
        yield b"%03d " % (number % 1000)


async def once_async(size: int) -> AsyncIterator[bytes]:
    for part in once(size):
        yield part


@pytest.mark.parametrize(("limit", "parts", "attempts"), [(0, 4, 1), (16, 4, 2), (15, 4, 1), (4000, 1000, 2)])
def test_body_that_can_be_read_once(driver: Driver, backends: list[Backend], limit: int, parts: int, attempts: int):
    backends[0].behave(status=503)
    with (
        mesh_of(*backends, retry=patient(buffer_body=limit)) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        body: Any = once_async(parts) if driver.is_async else once(parts)
        response = client.request("PUT", "http://orders/", content=body)
        assert response.extensions["meshlb"]["attempts"] == attempts
        if attempts == 2:
            assert response.json()["body"] == b"".join(once(parts)).decode(), "whole, and in order"
        assert in_flight(mesh) == 0


def test_body_whose_first_sending_broke_off(driver: Driver, backends: list[Backend]):
    """A reset in the middle: what had been read comes out of the buffer, the rest out of the generator."""
    backends[0].behave(reset=True)
    with mesh_of(*backends, retry=patient(buffer_body=4000)) as mesh, driver.client(driver.transport(mesh)) as client:
        body: Any = once_async(1000) if driver.is_async else once(1000)
        response = client.request("PUT", "http://orders/", content=body, headers={"content-length": "4000"})
        assert response.json()["body"] == b"".join(once(1000)).decode()
        assert in_flight(mesh) == 0


def test_body_that_raises_is_not_sent_again(driver: Driver, backends: list[Backend]):
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise ZeroDivisionError("mine")

    async def broken_async() -> AsyncIterator[bytes]:
        for part in broken():
            yield part

    with mesh_of(*backends, retry=patient(buffer_body=1000)) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(ZeroDivisionError, match="mine"):
            client.request("PUT", "http://orders/", content=broken_async() if driver.is_async else broken())
        assert in_flight(mesh) == 0


def test_retry_that_is_cancelled_in_its_pause_is_paid_back(package: str, backends: list[Backend]):
    from tests.http.drivers import drive

    backends[0].behave(status=503)
    retry = meshlb.Retry(wait=tenacity.wait_fixed(60), budget=RetryBudget(0, 1))
    for kind in ("asyncio", "trio"):
        with (
            drive(package, kind) as driver,
            mesh_of(backends[0], retry=retry) as mesh,
            driver.client(driver.transport(mesh)) as client,
        ):
            assert driver.portal is not None
            budget = mesh.cluster("orders").budget
            assert budget is not None
            future = driver.portal.start_task_soon(client.client.get, "http://orders/")
            eventually(lambda budget=budget: budget.balance == 9, 20)
            future.cancel()
            eventually(lambda budget=budget: budget.balance == 10, 20)
            assert in_flight(mesh) == 0


def test_refused_here_while_the_service_turns_everything_away(driver: Driver, backends: list[Backend]):
    for backend in backends:
        backend.behave(status=429)
    with (
        mesh_of(*backends, retry=None, throttling=AdaptiveThrottling()) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        errors = []
        for _ in range(200):
            try:
                answer = client.get("http://orders/").status_code
            except driver.adapter.Throttled as error:
                errors.append(error)
            else:
                assert answer == 429
        refused = len(errors)
        for error in errors[:1]:
            assert isinstance(error, meshlb.Throttled)
            assert isinstance(error, driver.module.PoolTimeout)
            assert "orders" in str(error)
            assert str(error.request.url) == "http://orders/"
        reached = sum(backend.requests() for backend in backends)
        assert reached == 200 - refused
        assert refused > 100
        cluster = mesh.cluster("orders")
        assert sum(node.calls for node in cluster.nodes) == reached, "no endpoint is blamed"
        assert in_flight(mesh) == 0
