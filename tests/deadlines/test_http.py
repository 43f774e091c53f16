"""Deadlines and the word between layers, over HTTP: each kind of client, and the ASGI middleware."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import meshlb
from meshlb import ConfigError, ServiceConfig
from meshlb._http.classify import outcome_of_response
from meshlb.model import OutcomeKind
from meshlb.server.asgi import LoadReportMiddleware
from meshlb.serving import ATTEMPT_COUNT, OVERLOADED, note_in_vain, serving, surroundings
from tests.http.drivers import Driver, in_flight, mesh_of, patient
from tests.http.raw_server import RawServer, answering, wait_for_close
from tests.server.asgi_server import serving as serving_app
from tests.support.backends import Backend

HEADER = "x-envoy-expected-rq-timeout-ms"


def sent(response: Any, name: str) -> str | None:
    """The header that the backend has got."""
    headers = {key.lower(): value for key, value in response.json()["headers"].items()}
    value: str | None = headers.get(name)
    return value


def test_the_deadline_is_passed_on_if_asked_for(driver: Driver, backends: list[Backend]):
    with (
        mesh_of(*backends, timeout=20, deadline_header=HEADER) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        assert 0 < int(sent(client.get("http://orders/"), HEADER)) <= 20_000
        tight = client.get("http://orders/", extensions={"meshlb": {"timeout": 15}})
        assert 0 < int(sent(tight, HEADER)) <= 15_000
    with mesh_of(*backends, timeout=20) as mesh, driver.client(driver.transport(mesh)) as client:
        assert sent(client.get("http://orders/"), HEADER) is None
    with mesh_of(*backends, deadline_header=HEADER) as mesh, driver.client(driver.transport(mesh)) as client:
        assert sent(client.get("http://orders/"), HEADER) is None, "there is none"


def test_it_is_what_an_attempt_has(driver: Driver, backends: list[Backend]):
    settings = {"timeout": 40, "deadline_header": HEADER, "retry": patient(per_try_timeout=20)}
    with mesh_of(*backends, **settings) as mesh, driver.client(driver.transport(mesh)) as client:
        assert int(sent(client.get("http://orders/"), HEADER)) <= 20_000


def test_it_is_inherited(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends, deadline_header=HEADER) as mesh, driver.client(driver.transport(mesh)) as client:
        with meshlb.deadline(18):
            assert 0 < int(sent(client.get("http://orders/"), HEADER)) <= 18_000
        with meshlb.deadline(0), pytest.raises(driver.adapter.DeadlineExceeded) as caught:
            client.get("http://orders/")
        assert isinstance(caught.value, driver.module.TimeoutException)
        assert isinstance(caught.value, meshlb.DeadlineExceeded)
        assert backends[0].requests() == 1, "no attempt was made"
        assert in_flight(mesh) == 0


def test_a_call_ends_with_the_inherited_deadline(driver: Driver, backends: list[Backend]):
    backends[0].behave(hang=True)
    with mesh_of(backends[0]) as mesh, driver.client(driver.transport(mesh), timeout=60) as client:
        with meshlb.deadline(0.3), pytest.raises(driver.module.TimeoutException):
            client.get("http://orders/")
        assert in_flight(mesh) == 0


def test_retries_say_which_attempt_they_are(driver: Driver, backends: list[Backend]):
    backends[0].behave(status=503)
    with mesh_of(*backends, retry=patient()) as mesh, driver.client(driver.transport(mesh)) as client:
        assert sent(client.get("http://orders/"), ATTEMPT_COUNT) == "2"
        backends[0].behave()
        assert sent(client.get("http://orders/"), ATTEMPT_COUNT) is None
        with serving(previous_attempts=2):
            assert sent(client.get("http://orders/"), ATTEMPT_COUNT) == "3"


def test_what_was_refused_by_a_connection_is_no_retry(driver: Driver, backends: list[Backend]):
    with mesh_of(meshlb.Endpoint("127.0.0.1", 1), backends[0]) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get("http://orders/")
        assert response.extensions["meshlb"]["attempts"] == 2
        assert sent(response, ATTEMPT_COUNT) is None


def test_a_forbidden_retry_is_not_made(driver: Driver, backends: list[Backend]):
    refuse = answering(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nX-Envoy-Overloaded: true\r\n\r\n")
    with RawServer(refuse) as raw:
        endpoint = meshlb.Endpoint(raw.address.rpartition(":")[0], int(raw.address.rpartition(":")[2]))
        with (
            mesh_of(endpoint, backends[0], retry=patient()) as mesh,
            driver.client(driver.transport(mesh)) as client,
            serving() as served,
        ):
            assert client.get("http://orders/").status_code == 503
            assert served.in_vain, "nor is that of whoever asks us"
            assert backends[0].requests() == 0


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [(503, -1.0), (502, -1.0), (500, -1.0), (429, -1.0), (501, None), (200, None), (404, None)],
)
def test_how_the_word_is_read(status: int, retry_after: float | None):
    outcome = outcome_of_response(status, httpx.Headers({OVERLOADED: "true", "retry-after": "3"}))
    assert outcome.retry_after == retry_after
    assert outcome_of_response(503, httpx.Headers({"retry-after": "3"})).retry_after == 3
    assert outcome.kind is outcome_of_response(status, httpx.Headers()).kind
    assert outcome_of_response(500, httpx.Headers({OVERLOADED: "true"})).retryable is False
    assert outcome_of_response(429, httpx.Headers({OVERLOADED: "true"})).kind is OutcomeKind.OVERLOAD


def test_a_silent_stream_is_given_up(driver: Driver):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    with RawServer(answering(head, then=wait_for_close)) as raw:
        endpoint = meshlb.Endpoint(raw.address.rpartition(":")[0], int(raw.address.rpartition(":")[2]))
        with (
            mesh_of(endpoint, stream_idle_timeout=0.3) as mesh,
            driver.client(driver.transport(mesh), timeout=None) as client,
        ):
            response = client.stream("GET", "http://orders/")
            with pytest.raises(driver.module.ReadTimeout):
                driver.read(response)
            driver.close(response)
            assert in_flight(mesh) == 0
            assert mesh.cluster("orders").nodes[0].last_failure == "ReadTimeout"


def test_a_stream_that_speaks_goes_on(driver: Driver, backends: list[Backend]):
    backends[0].behave(chunks=4, interval=0.5)
    with (
        mesh_of(backends[0], stream_idle_timeout=30) as mesh,
        driver.client(driver.transport(mesh), timeout=60) as client,
    ):
        assert client.get("http://orders/").status_code == 200


@pytest.mark.parametrize(
    "settings",
    [
        *({"deadline_header": ""}, {"deadline_header": "two words"}, {"deadline_header": 5}),
        *({"stream_idle_timeout": 0}, {"stream_idle_timeout": -1}, {"stream_idle_timeout": "1"}),
    ],
)
def test_wrong_settings(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"ServiceConfig.{next(iter(settings))}"):
        ServiceConfig(**settings)


# -- the middleware ------------------------------------------------------------------------------------------------


async def _service(request: Request) -> Response:
    around = surroundings()
    if "in-vain" in request.url.path:
        note_in_vain()
    assert around is not None
    left = around.limited(None)
    return PlainTextResponse(
        f"{'none' if left is None else round(left)} {around.previous_attempts}", int(request.url.path[-3:])
    )


def _ask(path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
    app = LoadReportMiddleware(Starlette(routes=[Route("/{path:path}", _service)]), **options)
    with serving_app(app) as address:
        return httpx.get(f"http://{address}/{path}", headers=headers, timeout=30)


def test_the_middleware_notes_deadline_and_attempt():
    headers = {HEADER: "500000", ATTEMPT_COUNT: "3"}
    assert _ask("200", headers, deadline_header=HEADER).text == "500 2"
    assert _ask("200", headers).text == "none 2"
    assert _ask("200", headers, deadline_header=HEADER.upper(), stop_amplification=False).text == "500 0"
    assert _ask("200", {HEADER: "soon", ATTEMPT_COUNT: "x"}, deadline_header=HEADER).text == "none 0"


def test_the_middleware_forbids_a_retry_that_is_in_vain():
    assert _ask("in-vain/503").headers[OVERLOADED] == "true"
    assert _ask("in-vain/500").headers[OVERLOADED] == "true"
    assert OVERLOADED not in _ask("in-vain/200").headers, "it went well all the same"
    assert OVERLOADED not in _ask("503").headers
    assert OVERLOADED not in _ask("in-vain/503", stop_amplification=False).headers


def test_the_middleware_with_a_wrong_header():
    with pytest.raises(ConfigError, match="deadline_header"):
        LoadReportMiddleware(Starlette(), deadline_header="not a name")
