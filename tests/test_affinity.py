"""Hash keys: where they come from, and that equal keys meet, over real servers and from every kind of client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest

import meshlb.grpc
import meshlb.grpc.aio
from meshlb import (
    ConfigError,
    ConsistentHash,
    Cookie,
    ForwardedFor,
    Header,
    IPHash,
    Mesh,
    PathSegment,
    QueryParameter,
    Retry,
    ServiceConfig,
    hash_key,
)
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.affinity import (
    call_context,
    caller_address,
    current_caller_address,
    note_caller_address,
)
from meshlb.discovery import StaticDiscovery
from meshlb.grpc._keys import KeyRequest as RpcKeyRequest
from meshlb.httpx import MeshTransport
from meshlb.model import NO_CONTEXT
from meshlb.testing import Answer, LocalMesh, ScriptedEndpoints
from tests.http.drivers import Driver, drive
from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.processes import REPO
from tests.support.wait import eventually

USERS = [f"user-{number}" for number in range(40)]


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


def test_grpc_metadata_as_a_request():
    request = RpcKeyRequest("/a.B/C", (("x-user", "u1"), ("x-user", "u2"), ("x-id-bin", b"\xff")))
    assert (request.method, request.path) == ("/a.B/C", "/a.B/C")
    assert request.header("X-User") == "u1, u2"
    assert request.header("x-id-bin") == "\xff"
    assert request.header("x-none") is None
    assert request.query("user") is None
    assert RpcKeyRequest("/a.B/C", None).header("x-user") is None


# -- over real servers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backends() -> Iterator[list[Backend]]:
    with http_backends(4) as backends:
        yield backends


@pytest.fixture(scope="module")
def rpc_backends() -> Iterator[list[Backend]]:
    with grpc_backends(4) as backends:
        yield backends


def mesh_of(backends: list[Backend], policy: Any = "consistent_hash", **settings: Any) -> Mesh:
    config = ServiceConfig(policy=policy, **settings)
    return Mesh(StaticDiscovery({"orders": [backend.address for backend in backends]}), defaults=config)


def expected(mesh: Mesh, backends: list[Backend], keys: list[Any]) -> list[str]:
    """The backends that these keys belong to, by the protocol-neutral core."""
    names = {backend.address: backend.id for backend in backends}
    cluster = mesh.cluster("orders")
    cluster.wait_ready(5)
    found = []
    for key in keys:
        with cluster.lease(key=key) as lease:
            found.append(names[lease.endpoint.address])
    assert len(set(found)) > 1
    return found


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
        command = [sys.executable, "-m", "tests.key_map", policy, *order]
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


# -- gRPC ------------------------------------------------------------------------------------------------------

Say = echo_pb2.EchoRequest(text="hello")


def say(stub: Any, style: str, metadata: Any = None) -> str:
    """The backend that answered."""
    if style == "blocking":
        return str(stub.Say(Say, metadata=metadata, timeout=10).backend)
    if style == "with_call":
        return str(stub.Say.with_call(Say, metadata=metadata, timeout=10)[0].backend)
    if style == "future":
        return str(stub.Say.future(Say, metadata=metadata, timeout=10).result().backend)
    if style == "unary_stream":
        return str(next(stub.Watch(Say, metadata=metadata, timeout=10)).backend)
    if style == "stream_unary":
        return str(stub.Collect(iter([Say]), metadata=metadata, timeout=10).backend)
    return str(next(stub.Chat(iter([Say]), metadata=metadata, timeout=10)).backend)


STYLES = ("blocking", "with_call", "future", "unary_stream", "stream_unary", "stream_stream")


@pytest.mark.parametrize("style", STYLES)
def test_grpc_calls_with_equal_keys_meet(rpc_backends: list[Backend], style: str):
    source = Header("X-User")
    with (
        mesh_of(rpc_backends, hash_on=source) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
    ):
        stub = echo_pb2_grpc.EchoStub(channel)
        belongs = expected(mesh, rpc_backends, USERS)
        assert [say(stub, style, (("x-user", user),)) for user in USERS] == belongs
        assert [say(stub, style, iter([("x-user", user)])) for user in USERS] == belongs
        got = []
        for user in USERS:
            with hash_key(user):
                got.append(say(stub, style))
        assert got == belongs


def test_grpc_keys_from_the_method_and_a_function(rpc_backends: list[Backend]):
    with (
        mesh_of(rpc_backends, hash_on=lambda request: request.method) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
    ):
        stub = echo_pb2_grpc.EchoStub(channel)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        with cluster.lease(key="/meshlb.demo.v1.Echo/Say") as lease:
            address = lease.endpoint.address
        belongs = next(backend.id for backend in rpc_backends if backend.address == address)
        assert {say(stub, "blocking") for _ in range(8)} == {belongs}


class LateDiscovery(StaticDiscovery):
    """Answers when it is told to."""

    def __init__(self, services: dict[str, list[str]]) -> None:
        super().__init__(services)
        self.released = threading.Event()

    async def watch(self, query: Any, sink: Any) -> None:
        while not self.released.is_set():
            await asyncio.sleep(0.01)
        await super().watch(query, sink)


def test_the_key_is_that_of_the_moment_of_the_call_however_late_it_starts(rpc_backends: list[Backend]):
    discovery = LateDiscovery({"orders": [backend.address for backend in rpc_backends]})
    with (
        Mesh(discovery, defaults=ServiceConfig(policy="consistent_hash")) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
    ):
        stub = echo_pb2_grpc.EchoStub(channel)
        futures, streams = [], []
        for user in USERS:
            with hash_key(user):
                futures.append(stub.Say.future(Say, timeout=20))
                streams.append(stub.Watch(Say, timeout=20))
        assert not any(future.done() for future in futures)
        discovery.released.set()
        got = [future.result().backend for future in futures]
        assert got == expected(mesh, rpc_backends, USERS)
        assert [next(stream).backend for stream in streams] == got
        for stream in streams:
            stream.cancel()


@contextlib.asynccontextmanager
async def aio_stub(mesh: Mesh, **options: Any) -> Any:
    async with meshlb.grpc.aio.insecure_channel("consul:///orders", mesh=mesh, **options) as channel:
        yield echo_pb2_grpc.EchoStub(channel)


class Passing(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds metadata, as interceptors do."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        await asyncio.sleep(0)
        return await continuation(client_call_details, request)


async def say_async(stub: Any, style: str, metadata: Any = None) -> str:
    if style in ("unary_unary", "intercepted"):
        return str((await stub.Say(Say, metadata=metadata, timeout=10)).backend)
    if style == "stream_unary":
        return str((await stub.Collect(iter([Say]), metadata=metadata, timeout=10)).backend)
    call = (
        stub.Watch(Say, metadata=metadata, timeout=10)
        if style == "unary_stream"
        else stub.Chat(iter([Say]), metadata=metadata, timeout=10)
    )
    replies = [reply async for reply in call]
    return str(replies[0].backend)


@pytest.mark.parametrize("style", ["unary_unary", "unary_stream", "stream_unary", "stream_stream", "intercepted"])
def test_grpc_aio_calls_with_equal_keys_meet(rpc_backends: list[Backend], style: str):
    async def main(mesh: Mesh) -> None:
        belongs = await asyncio.to_thread(expected, mesh, rpc_backends, USERS)
        async with aio_stub(mesh, interceptors=[Passing()] if style == "intercepted" else None) as stub:
            assert [await say_async(stub, style, (("x-user", user),)) for user in USERS] == belongs

            async def within(user: str) -> str:
                with hash_key(user):
                    return await say_async(stub, style)

            assert await asyncio.gather(*map(within, USERS)) == belongs

            # Made in the block, awaited after it.
            if style in ("unary_unary", "intercepted"):
                calls = []
                for user in USERS:
                    with hash_key(user):
                        calls.append(stub.Say(Say, timeout=10))
                assert [(await call).backend for call in calls] == belongs

    with mesh_of(rpc_backends, hash_on=Header("x-user")) as mesh:
        asyncio.run(main(mesh))


def test_an_aio_call_keeps_its_key_until_it_can_start(rpc_backends: list[Backend]):
    discovery = LateDiscovery({"orders": [backend.address for backend in rpc_backends]})

    async def main(mesh: Mesh) -> list[str]:
        async with aio_stub(mesh) as stub:
            calls = []
            for user in USERS:
                with hash_key(user):
                    calls.append(stub.Say(Say, timeout=20))
            discovery.released.set()
            return [(await call).backend for call in calls]

    with Mesh(discovery, defaults=ServiceConfig(policy="consistent_hash")) as mesh:
        assert asyncio.run(main(mesh)) == expected(mesh, rpc_backends, USERS)


def test_a_grpc_retry_goes_to_the_next_best_for_its_key(rpc_backends: list[Backend]):
    retry = Retry(idempotent_methods=["meshlb.demo.v1.Echo/*"], budget=None)
    with mesh_of(rpc_backends, hash_on=Header("x-user"), breaker=None, retry=retry) as mesh:
        mesh.cluster("orders").wait_ready(5)
        with meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            metadata = (("x-user", "user-1"),)
            best = say(stub, "blocking", metadata)
            broken = next(backend for backend in rpc_backends if backend.id == best)
            broken.behave(code="UNAVAILABLE")
            try:
                second = {style: say(stub, style, metadata) for style in ("blocking", "future", "unary_stream")}
                assert len(set(second.values())) == 1
                assert best not in second.values()
            finally:
                broken.behave()
            eventually(lambda: all(node.in_flight == 0 for node in mesh.cluster("orders").nodes))


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
