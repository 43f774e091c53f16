"""py-consul over httpx: what goes over the wire, and what comes back as an exception."""

from __future__ import annotations

import base64

import consul
import httpx
import pytest
from opentelemetry import context as otel_context

from meshlb.discovery import ConsulDiscovery
from meshlb.errors import DiscoveryError
from tests.discovery.collect import watching
from tests.discovery.odd_consul import good, odd_consul, reply
from tests.support.wait import eventually_async

pytestmark = pytest.mark.anyio


async def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-env")
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "192.0.2.1:1")
    async with odd_consul(answers=[good(7, 80)]) as consul_server:
        discovery = ConsulDiscovery(
            consul_server.address,
            token="s3cret",
            namespace="team",
            partition="part",
            headers={"X-Extra": "1"},
            auth=("user", "pass"),
            datacenter="dc2",
            tag=["a", "b"],
            filter="Service.Port == 80",
            consistency="stale",
            cached=True,
            wait=30,
        )
        async with watching(discovery, "web"):
            await eventually_async(lambda: len(consul_server.requests) == 2)
        first, second = consul_server.requests
        assert first.target == (
            "/v1/health/service/web?tag=a&tag=b&dc=dc2&filter=Service.Port+%3D%3D+80&stale=&cached="
        )
        assert second.target.startswith("/v1/health/service/web?index=7&wait=30000ms&tag=a")
        assert "passing" not in first.target
        assert first.headers["x-consul-token"] == "s3cret"
        assert first.headers["x-consul-namespace"] == "team" and first.headers["x-consul-partition"] == "part"
        assert first.headers["x-extra"] == "1"
        assert first.headers["authorization"] == "Basic " + base64.b64encode(b"user:pass").decode()


async def test_no_token_is_sent_if_none_is_wanted(monkeypatch):
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-env")
    async with odd_consul() as consul_server:
        for token, expected in ((None, "from-env"), ("", None)):
            async with watching(ConsulDiscovery(consul_server.address, token=token), "web"):
                await eventually_async(lambda: consul_server.requests)
                assert consul_server.requests.pop().headers.get("x-consul-token") == expected


async def test_a_rotated_token_file_is_used_by_the_next_query(tmp_path):
    path = tmp_path / "token"
    path.write_text("one")
    answers = [reply(403, b"ACL not found"), good(1, 80)]
    async with odd_consul(answers=answers) as consul_server:
        async with watching(ConsulDiscovery(consul_server.address, token_file=path), "web") as sink:
            await sink.until(lambda sink: sink.failures)
            path.write_text("two")
            await sink.until(lambda sink: sink.addresses)
        assert [request.headers["x-consul-token"] for request in consul_server.requests[:2]] == ["one", "two"]


@pytest.mark.parametrize("name", ["a/../../kv/secret", "a?b=c#d", "ä b", "100%"])
async def test_a_service_name_cannot_leave_its_place_in_the_path(name):
    async with odd_consul(good(1, 80)) as consul_server:
        async with watching(ConsulDiscovery(consul_server.address, min_refresh_interval=3600), name) as sink:
            await sink.until(lambda sink: sink.addresses)
        path = consul_server.requests[0].path
        assert path.startswith("/v1/health/service/") and path.count("/") == 4
        assert httpx.URL(f"http://h{path}").path == f"/v1/health/service/{name}"


async def test_a_prefix_in_the_address_stands_before_every_path():
    async with odd_consul() as consul_server:
        consul_server.elsewhere = lambda request: reply(200, b"[]", {"X-Path": request.path})
        discovery = ConsulDiscovery(f"{consul_server.address}/consul/")
        client = await discovery.client()
        response = await client.http.get(lambda response: response, "/v1/catalog/nodes")
        assert response.headers["x-path"] == "/consul/v1/catalog/nodes"
        await discovery.aclose()


async def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "consul.sock")
    async with (
        odd_consul(good(1, 80), socket=path) as consul_server,
        watching(ConsulDiscovery(consul_server.address, min_refresh_interval=3600), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:80"])


async def test_the_environments_proxy_is_not_used(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with (
        odd_consul(good(1, 80)) as consul_server,
        watching(ConsulDiscovery(consul_server.address, min_refresh_interval=3600), "web") as sink,
    ):
        await sink.until(lambda sink: sink.addresses)
        assert not sink.failures


async def test_netrc_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with odd_consul() as consul_server, watching(ConsulDiscovery(consul_server.address), "web"):
        await eventually_async(lambda: consul_server.requests)
        assert "authorization" not in consul_server.requests[0].headers


async def test_its_own_requests_are_marked_for_opentelemetrys_instrumentations(monkeypatch):
    seen = []
    original = httpx.AsyncHTTPTransport.handle_async_request

    async def instrumented(self, request):  # where the instrumentation of httpx hooks in
        seen.append(otel_context.get_value("suppress_instrumentation"))
        return await original(self, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", instrumented)
    async with odd_consul(good(1, 80)) as consul_server:
        discovery = ConsulDiscovery(consul_server.address)
        client = await discovery.client()
        await client.agent.self()
        assert seen == [True]
        assert otel_context.get_value("suppress_instrumentation") is None
        await discovery.aclose()


async def test_py_consuls_exceptions_and_ours():
    async with odd_consul() as consul_server:
        discovery = ConsulDiscovery(consul_server.address)
        client = await discovery.client()
        answers = [
            (403, consul.ACLPermissionDenied),
            (400, consul.exceptions.BadRequest),
            (429, consul.exceptions.ClientError),
            (500, consul.ConsulException),
        ]
        for status, expected in answers:
            consul_server.elsewhere = lambda request, status=status: reply(status, b"text")
            with pytest.raises(expected):
                await client.kv.get("key")
        consul_server.elsewhere = lambda request: b""
        with pytest.raises(DiscoveryError, match="broke"):
            await client.kv.get("key")
        await discovery.aclose()


async def test_every_method_of_py_consuls_client(monkeypatch):
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-env")  # which py-consul itself would prefer
    async with odd_consul() as consul_server:
        discovery = ConsulDiscovery(consul_server.address, token="t")
        seen = []

        def elsewhere(request):
            seen.append((request.method, request.path, request.body, request.headers["x-consul-token"]))
            return reply(200, b"true", {"X-Consul-Index": "1"})

        consul_server.elsewhere = elsewhere
        client = await discovery.client()
        assert await client.kv.put("a b", "value") is True
        assert await client.kv.delete("a b") is True
        await client.http.post(lambda response: response, "/v1/x", data=b"bytes")
        response = await client.http.get(lambda response: response, "/v1/x", raw=True)
        assert response.body == b"true"
        assert seen == [
            ("PUT", "/v1/kv/a%20b", b"value", "t"),
            ("DELETE", "/v1/kv/a%20b", b"", "t"),
            ("POST", "/v1/x", b"bytes", "t"),
            ("GET", "/v1/x", b"", "t"),
        ]
        await discovery.aclose()
