"""The same requests through the package's own transport and through ours: what a program sees must be the same."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from tests.http.drivers import Client, Driver, in_flight, mesh_of
from tests.support.backends import Backend

Scenario = Callable[[Client, str, Any], Any]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def seen_of(response: Any, origin: str) -> Any:
    """A response as plain data, without what differs from one server, or one request, to the next."""
    varying = ("date", "x-backend", "server", "content-length")  # of an echo of the Host header
    return (
        response.status_code,
        response.reason_phrase,
        response.http_version,
        str(response.url).replace(origin, "ORIGIN"),
        [(name, value.replace(origin, "ORIGIN")) for name, value in response.headers.items() if name not in varying],
        response.encoding,
        response.num_bytes_downloaded > 0,
        isinstance(response.elapsed, datetime.timedelta) and response.elapsed.total_seconds() > 0,
        (response.is_closed, response.is_stream_consumed),
        [str(earlier.url).replace(origin, "ORIGIN") for earlier in response.history],
    )


def outcome(function: Callable[[], Any], origin: str) -> Any:
    try:
        return function()
    except Exception as error:
        # The texts of connection errors are the operating system's, and meshlb's say more than httpx's.
        request = getattr(error, "_request", None)
        url = None if request is None else str(request.url).replace(origin, "ORIGIN")
        return [kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")], url


def hooks_of(driver: Driver, seen: list[Any]) -> dict[str, list[Any]]:
    def note(message: Any) -> None:
        seen.append((type(message).__name__, getattr(message, "status_code", None)))

    async def anote(message: Any) -> None:
        note(message)

    hook = anote if driver.is_async else note
    return {"request": [hook], "response": [hook]}


@scenario
def redirects_and_cookies(client: Client, origin: str, module: Any) -> Any:
    client.client.follow_redirects = True
    set_cookie = client.get(f"{origin}/cookie?name=a&value=b")
    moved = client.get(f"{origin}/redirect?to=/next%3Fx=1&status=307")
    return (
        seen_of(moved, origin),
        dict(client.client.cookies),
        dict(set_cookie.cookies),
        moved.json()["headers"].get("cookie"),
    )


@scenario
def redirect_that_is_not_followed(client: Client, origin: str, module: Any) -> Any:
    response = client.get(f"{origin}/redirect?to=/next")
    return (
        response.status_code,
        str(response.next_request.url).replace(origin, "ORIGIN"),
        response.has_redirect_location,
    )


@scenario
def too_many_redirects(client: Client, origin: str, module: Any) -> Any:
    client.client.follow_redirects = True
    client.client.max_redirects = 2
    return outcome(lambda: client.get(f"{origin}/redirect?to=/redirect?to%3D/redirect?to%253D/redirect"), origin)


@scenario
def basic_auth(client: Client, origin: str, module: Any) -> Any:
    return client.get(f"{origin}/", auth=("me", "secret")).json()["headers"]["authorization"]


@scenario
def auth_flow_with_two_requests(client: Client, origin: str, module: Any) -> Any:
    class Flow(module.Auth):
        requires_response_body = True

        def auth_flow(self, request: Any) -> Any:
            token = yield module.Request("POST", f"{origin}/token", content=b"who")
            request.headers["x-token"] = token.json()["body"]
            yield request

    response = client.post(f"{origin}/", content=b"body", auth=Flow())
    return response.json()["headers"]["x-token"], response.json()["body"], len(response.history)


@scenario
def event_hooks(client: Client, origin: str, module: Any) -> Any:
    seen: list[Any] = []
    client.client.event_hooks = hooks_of(client.driver, seen)
    client.client.follow_redirects = True
    client.get(f"{origin}/redirect?to=/next")
    return seen


@scenario
def phases_that_are_traced(client: Client, origin: str, module: Any) -> Any:
    seen: list[str] = []

    async def atrace(name: str, info: Any) -> None:
        seen.append(name)

    trace = atrace if client.driver.is_async else lambda name, info: seen.append(name)
    client.get(f"{origin}/", extensions={"trace": trace})
    return seen


@scenario
def params_headers_and_bodies(client: Client, origin: str, module: Any) -> Any:
    client.client.headers["x-client"] = "1"
    client.client.params = {"a": "1"}
    answers = [
        client.get(f"{origin}/p", params={"b": "ü"}),
        client.post(f"{origin}/p", json={"a": [1, None]}),
        client.post(f"{origin}/p", data={"a": "b c"}),
        client.request("PUT", f"{origin}/p", content=b"raw"),
        client.request("BREW", f"{origin}/p"),
        client.request("HEAD", f"{origin}/p"),
    ]
    skipped = ("host", "user-agent")
    return [
        (answer.status_code, answer.text and {**answer.json(), "backend": "", "headers": {
            name: value for name, value in answer.json()["headers"].items() if name not in skipped}})
        if answer.status_code == 200
        else answer.status_code
        for answer in answers
    ]  # fmt: skip


@scenario
def error_statuses(client: Client, origin: str, module: Any) -> Any:
    response = client.get(f"{origin}/redirect?to=/&status=404")
    return response.is_client_error, outcome(response.raise_for_status, origin)


@scenario
def default_encoding(client: Client, origin: str, module: Any) -> Any:
    client.client._default_encoding = lambda content: "latin-1"  # as the client's option
    return client.get(f"{origin}/bytes?size=3").encoding, seen_of(client.get(f"{origin}/"), origin)


@scenario
def read_timeout(client: Client, origin: str, module: Any) -> Any:
    timeout = module.Timeout(30, read=0.05)
    return outcome(lambda: client.post(f"{origin}/slow", timeout=timeout), origin)


@scenario
def errors_that_are_pickled(client: Client, origin: str, module: Any) -> Any:
    with pytest.raises(module.TimeoutException) as raised:
        client.post(f"{origin}/slow", timeout=module.Timeout(30, read=0.05))
    again = pickle.loads(pickle.dumps(raised.value))
    return type(again).__name__, str(again) == str(raised.value)


@scenario
def unsupported_scheme(client: Client, origin: str, module: Any) -> Any:
    return outcome(lambda: client.get("invalid://example.org"), origin), outcome(lambda: client.get("/path"), origin)


@scenario
def a_closed_client(client: Client, origin: str, module: Any) -> Any:
    client.driver.run(client.client.aclose if client.driver.is_async else client.client.close)
    client.driver.run(client.client.aclose if client.driver.is_async else client.client.close)
    with pytest.raises(RuntimeError) as raised:
        client.get(f"{origin}/")
    return str(raised.value), client.client.is_closed


@pytest.mark.parametrize("run", SCENARIOS, ids=lambda function: function.__name__)
def test_same_as_the_packages_own(run: Scenario, driver: Driver, backends: list[Backend]) -> None:
    backend, module = backends[0], driver.module
    if run in (read_timeout, errors_that_are_pickled):
        backend.behave(delay=1.0)
    with driver.client(None) as client:
        expected = run(client, backend.url, module)
    with mesh_of(backend) as mesh, driver.client(driver.transport(mesh)) as client:
        assert run(client, "http://orders", module) == expected
        assert in_flight(mesh) == 0
    with mesh_of(backend) as mesh, driver.client(driver.transport(mesh)) as client:  # a host that is no service
        assert run(client, backend.url, module) == expected
