"""Hash keys: where they come from, and that equal keys meet, over real servers and from every kind of client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from meshlb import (
    ConfigError,
    ConsistentHash,
    Cookie,
    ForwardedFor,
    Header,
    IPHash,
    PathSegment,
    QueryParameter,
    ServiceConfig,
    hash_key,
)
from meshlb.affinity import (
    call_context,
    caller_address,
    current_caller_address,
    note_caller_address,
)
from meshlb.httpx import MeshTransport
from meshlb.model import NO_CONTEXT
from meshlb.testing import Answer, LocalMesh, ScriptedEndpoints
from tests.http.drivers import Driver, drive
from tests.support.backends import Backend, http_backends
from tests.support.keyed import USERS, expected, mesh_of
from tests.support.processes import REPO


class Request:
    """A request as sources see it."""

    def __init__(self, path: str = "/", headers: dict[str, str] | None = None, query: dict[str, str] | None = None):
        self.method = "GET"
        self.path = path
        self._headers = headers or {}
        self._query = query or {}

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    def query(self, name: str) -> str | None:
        return self._query.get(name)


# -- sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "request_", "key"),
    [
        (Header("x-user"), Request(headers={"x-user": "u1"}), "u1"),
        (Header("x-user"), Request(headers={"x-user": ""}), None),
        (Header("x-user"), Request(), None),
        (Cookie("sid"), Request(headers={"cookie": "a=1; sid=s7;b=2"}), "s7"),
        (Cookie("sid"), Request(headers={"cookie": 'sid="s7"'}), "s7"),
        (Cookie("sid"), Request(headers={"cookie": "xsid=1; sid2=2"}), None),
        (Cookie("sid"), Request(), None),
        (QueryParameter("user"), Request(query={"user": "u1"}), "u1"),
        (QueryParameter("user"), Request(query={"user": ""}), None),
        (PathSegment(1), Request("/users/42/orders"), "42"),
        (PathSegment(-1), Request("/users/42/orders/"), "orders"),
        (PathSegment(3), Request("/users/42/orders"), None),
        (PathSegment(-4), Request("/users/42/orders"), None),
        (PathSegment(0), Request("/"), None),
        (ForwardedFor(), Request(headers={"x-forwarded-for": " 203.0.113.7 , 10.0.0.1"}), "203.0.113.7"),
        (ForwardedFor("x-real-ip"), Request(headers={"x-real-ip": "203.0.113.7"}), "203.0.113.7"),
        (ForwardedFor(), Request(), None),
    ],
)
def test_sources(source: Callable[[Any], Any], request_: Request, key: str | None):
    assert source(request_) == key


@pytest.mark.parametrize("make", [Header, Cookie, QueryParameter, ForwardedFor])
@pytest.mark.parametrize("name", ["", " ", None, 5])
def test_a_source_needs_a_name(make: Any, name: Any):
    with pytest.raises(ConfigError, match="name"):
        make(name)


@pytest.mark.parametrize("hash_on", ["x-user", 5, ["x-user"], Header, [Header("a"), None]])
def test_what_is_no_source_is_refused(hash_on: Any):
    with pytest.raises(ConfigError, match="hash_on"):
        ServiceConfig(policy="consistent_hash", hash_on=hash_on)


@pytest.mark.parametrize("key", [1.5, True, ("a",), object()])
def test_what_is_no_key_is_refused(key: Any):
    with pytest.raises(ConfigError, match="hash_key"), hash_key(key):
        pass


# -- their order -----------------------------------------------------------------------------------------------


class Cluster:
    """What call_context reads of one."""

    service = "orders"

    def __init__(self, *sources: Any, hashes: bool = True, hashes_callers: bool = False) -> None:
        self.key_sources = sources
        self.sessions = None
        self.hashes = hashes
        self.hashes_callers = hashes_callers


def key_of(cluster: Cluster, explicit: Any = None, request: Any = None) -> Any:
    return call_context(cluster, explicit, "GET", Request() if request is None else request).key


def test_the_nearest_wins():
    cluster = Cluster(Header("a"), Header("b"), hashes_callers=True)
    request = Request(headers={"b": "header"})
    with caller_address("203.0.113.7"):
        assert key_of(cluster) == "203.0.113.7"
        assert key_of(cluster, request=request) == "header"
        with hash_key("context"):
            assert key_of(cluster, request=request) == "context"
            assert key_of(cluster, "explicit", request) == "explicit"
            assert key_of(cluster, 0, request) == 0  # falsy, but a key
            with hash_key(None):
                assert key_of(cluster, request=request) == "header"
    assert key_of(cluster) is None
    assert key_of(Cluster(hashes_callers=False)) is None


def test_the_caller_is_for_policies_that_hash_callers():
    with caller_address("203.0.113.7"):
        assert key_of(Cluster()) is None
        assert key_of(Cluster(hashes_callers=True)) == "203.0.113.7"


def test_a_source_that_fails_is_logged_and_passed_over(caplog: pytest.LogCaptureFixture):
    def broken(request: Any) -> str:
        raise KeyError("user")

    assert key_of(Cluster(broken, Header("a")), request=Request(headers={"a": "1"})) == "1"
    assert "orders" in caplog.text


def test_nothing_is_looked_at_for_a_policy_that_hashes_nothing():
    def never(request: Any) -> str:
        raise AssertionError("asked")

    with hash_key("context"):
        assert call_context(Cluster(never, hashes=False), None, "GET", Request()) is NO_CONTEXT


def test_surroundings_end_with_their_block_and_are_a_threads_own():
    seen = []
    with caller_address("203.0.113.7"), hash_key("k"):
        thread = threading.Thread(target=lambda: seen.append(current_caller_address()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert current_caller_address() is None

    async def task() -> str | None:
        note_caller_address("203.0.113.9")
        await asyncio.sleep(0)
        return current_caller_address()

    assert asyncio.run(task()) == "203.0.113.9"
    assert current_caller_address() is None


# -- over real servers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backends() -> Iterator[list[Backend]]:
    with http_backends(4) as backends:
        yield backends


HTTP_WAYS: dict[str, tuple[Any, Callable[[str], dict[str, Any]]]] = {
    "header": (Header("X-User"), lambda user: {"headers": {"x-user": user}}),
    "cookie": (Cookie("user"), lambda user: {"headers": {"cookie": f"a=b; user={user}"}}),
    "query": (QueryParameter("user"), lambda user: {"params": {"a": "b", "user": user}}),
    "path": (PathSegment(1), lambda user: {"path": f"/users/{user}/orders"}),
    "function": (lambda request: request.path.rpartition("/")[2], lambda user: {"path": f"/by/{user}"}),
    "second": ((Header("x-none"), Header("x-user")), lambda user: {"headers": {"x-user": user}}),
    "explicit": ((), lambda user: {"extensions": {"meshlb": {"key": user}}}),
}


@pytest.fixture(params=[("httpx", "sync"), ("httpx", "asyncio"), ("httpx", "trio"), ("httpx2", "asyncio")])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with drive(*request.param) as driver:
        yield driver


@pytest.mark.parametrize("way", HTTP_WAYS)
def test_http_requests_with_equal_keys_meet(backends: list[Backend], driver: Driver, way: str):
    source, options_of = HTTP_WAYS[way]
    with (
        mesh_of(backends, hash_on=source) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        belongs = expected(mesh, backends, USERS)
        for _ in range(2):
            got = []
            for user in USERS:
                options = options_of(user)
                path = options.pop("path", "/")
                got.append(client.get(f"http://orders{path}", **options).headers["x-backend"])
            assert got == belongs


def test_http_requests_in_a_block_with_a_key(backends: list[Backend], driver: Driver):
    with mesh_of(backends) as mesh, driver.client(driver.transport(mesh)) as client:
        belongs = expected(mesh, backends, USERS)

        def get() -> str:
            name: str = client.client.get("http://orders/").headers["x-backend"]
            return name

        async def get_async(user: str) -> str:
            with hash_key(user):
                response = await client.client.get("http://orders/")
            name: str = response.headers["x-backend"]
            return name

        got = []
        for user in USERS:
            if driver.portal is None:
                with hash_key(user):
                    got.append(get())
            else:
                got.append(driver.portal.call(get_async, user))
        assert got == belongs


def test_a_cookie_that_a_server_has_set_keeps_the_client_there(backends: list[Backend]):
    with (
        mesh_of(backends, hash_on=Cookie("sid")) as mesh,
        httpx.Client(transport=MeshTransport(mesh)) as client,
    ):
        client.get("http://orders/cookie", params={"name": "sid", "value": "user-3"})
        belongs = expected(mesh, backends, USERS)[3]
        assert {client.get("http://orders/").headers["x-backend"] for _ in range(10)} == {belongs}


def test_without_a_key_calls_are_spread(backends: list[Backend]):
    policy = ConsistentHash(missing_key="round_robin")
    with (
        mesh_of(backends, policy, hash_on=Header("x-user")) as mesh,
        httpx.Client(transport=MeshTransport(mesh)) as client,
    ):
        assert len({client.get("http://orders/").headers["x-backend"] for _ in range(4)}) == 4


@pytest.mark.parametrize("key", [1.5, True, ["a"]])
def test_a_wrong_key_is_refused_before_anything_is_sent(backends: list[Backend], key: Any):
    with (
        mesh_of(backends) as mesh,
        httpx.Client(transport=MeshTransport(mesh)) as client,
        pytest.raises(ConfigError, match="key"),
    ):
        client.get("http://orders/", extensions={"meshlb": {"key": key}})


@pytest.mark.parametrize("policy", ["consistent_hash", "ip_hash"])
def test_two_processes_agree(backends: list[Backend], policy: str):
    keys = USERS if policy == "consistent_hash" else [f"203.0.113.{number}" for number in range(40)]
    addresses = [backend.address for backend in backends]
    processes = []
    for order in (addresses, addresses[::-1]):  # the registry need not list them in one order
        command = [sys.executable, "-m", "tests.support.key_map", policy, *order]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO, text=True))
    answers = [json.loads(process.communicate(json.dumps(keys), timeout=60)[0]) for process in processes]
    assert answers[0] == answers[1]
    with mesh_of(backends, policy) as mesh:
        assert [answers[0][key] for key in keys] == expected(mesh, backends, keys)


def test_a_retry_goes_to_the_next_best_for_its_key():
    addresses = [f"10.0.0.{number}:80" for number in range(1, 6)]
    with LocalMesh({"orders": addresses}, defaults=ServiceConfig(policy="consistent_hash", breaker=None)) as mesh:
        scripted = ScriptedEndpoints({address: Answer(503) for address in addresses})
        with httpx.Client(transport=MeshTransport(mesh, transport_factory=scripted)) as client:
            for user in USERS[:5]:
                orders = []
                for _ in range(3):
                    scripted.calls.clear()
                    client.get("http://orders/", extensions={"meshlb": {"key": user}})
                    orders.append(tuple(scripted.addresses))
                assert len(set(orders)) == 1
                assert len(set(orders[0])) == len(orders[0]) > 1


def test_ip_hash_of_the_explicit_key_by_networks(backends: list[Backend]):
    with (
        mesh_of(backends, IPHash(ipv4_prefix=24)) as mesh,
        httpx.Client(transport=MeshTransport(mesh)) as client,
    ):

        def backend_of(address: str) -> str:
            response = client.get("http://orders/", extensions={"meshlb": {"key": address}})
            return str(response.headers["x-backend"])

        assert len({backend_of(f"203.0.113.{number}") for number in range(20)}) == 1
        assert len({backend_of(f"203.0.{number}.1") for number in range(20)}) > 1
