"""What a client sees when all is well: the service's name everywhere, and whatever else httpx does."""

from __future__ import annotations

import pytest

import meshlb
from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.support.backends import Backend


def test_the_service_is_what_client_and_server_see(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get("http://orders/v1/orders/42?x=1&y=%2F", headers={"x-mine": "1"})
        assert response.json()["headers"]["host"] == "orders"
        assert response.json()["path"] == "/v1/orders/42?x=1&y=%2F"
        assert response.json()["headers"]["x-mine"] == "1"
        assert str(response.request.url) == str(response.url) == "http://orders/v1/orders/42?x=1&y=%2F"
        assert response.extensions["meshlb"] == {"endpoint": backends[0].address, "attempts": 1}
        assert response.http_version == "HTTP/1.1"
        assert response.elapsed.total_seconds() > 0
        assert client.get("http://orders").json()["path"] == "/"
        assert in_flight(mesh) == 0


def test_every_endpoint_gets_calls(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends, policy="round_robin") as mesh, driver.client(driver.transport(mesh)) as client:
        seen = [client.get("http://orders/").headers["x-backend"] for _ in range(9)]
        assert sorted(seen) == sorted([backend.id for backend in backends] * 3)
        assert in_flight(mesh) == 0


def test_methods_and_bodies_get_through(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            response = client.request(method, "http://orders/", content=b"some bytes")
            assert response.status_code == 200
            if method != "HEAD":
                assert (response.json()["method"], response.json()["body"]) == (method, "some bytes")
        assert in_flight(mesh) == 0


def test_host_names_a_service(driver: Driver, backends: list[Backend]):
    hosts = {
        "orders": "orders",
        "ORDERS": "orders",
        "orders.": "orders",
        "orders:8080": "orders",  # an instance has its own port
        "orders.service.consul": "orders",
        "api.example.com": "api.example.com",  # dotted, but configured
    }
    known = StaticDiscovery({"orders": [backends[0].address], "api.example.com": [backends[0].address]})
    with Mesh(known) as mesh, driver.client(driver.transport(mesh)) as client:
        for host, service in hosts.items():
            response = client.get(f"http://{host}/")
            assert response.json()["headers"]["host"] == host.lower()
            assert service in [cluster.service for cluster in mesh.clusters]
        assert len(mesh.clusters) == 2


def test_tag_and_datacenter_in_the_host(driver: Driver, backends: list[Backend]):
    tagged = meshlb.Endpoint(backends[1].host, backends[1].port, tags=("v2",), datacenter="dc2")
    with (
        Mesh(StaticDiscovery({"orders": [backends[0].address, tagged]})) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        for _ in range(3):
            response = client.get("http://v2.orders.service.dc2.consul/")
            assert response.headers["x-backend"] == backends[1].id


def test_host_that_is_no_service_is_called_directly(driver: Driver, backends: list[Backend]):
    with mesh_of(backends[0]) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get(f"{backends[1].url}/direct")
        assert response.headers["x-backend"] == backends[1].id
        assert response.json()["headers"]["host"] == backends[1].address
        assert "meshlb" not in response.extensions
        assert mesh.clusters == ()
        with pytest.raises(driver.module.ConnectError):
            client.get("http://nowhere.invalid/")


def test_impossible_consul_name(driver: Driver):
    with mesh_of() as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.module.LocalProtocolError, match=r"web\.node\.consul") as caught:
            client.get("http://web.node.consul/")
        assert isinstance(caught.value, meshlb.ConfigError)
        assert caught.value.request.url.host == "web.node.consul"


def test_redirects_stay_in_the_mesh(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh), follow_redirects=True) as client:
        response = client.get("http://orders/redirect?to=/after")
        assert (response.json()["path"], str(response.url)) == ("/after", "http://orders/after")
        assert [hop.status_code for hop in response.history] == [302]
        response = client.post("http://orders/redirect?to=http://orders/again&status=307", content=b"kept")
        assert (response.json()["method"], response.json()["body"]) == ("POST", "kept")
        assert in_flight(mesh) == 0


def test_cookies_belong_to_the_service(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends, policy="round_robin") as mesh, driver.client(driver.transport(mesh)) as client:
        client.get("http://orders/cookie?name=session&value=1")
        for _ in range(4):
            assert client.get("http://orders/").json()["headers"]["cookie"] == "session=1"
        assert "cookie" not in client.get(backends[0].url).json()["headers"]


def test_authentication_flow(driver: Driver, backends: list[Backend]):
    class TwoSteps(driver.module.Auth):
        requires_response_body = True

        def auth_flow(self, request):
            response = yield request
            request.headers["authorization"] = f"after {response.json()['backend']}"
            yield request

    with mesh_of(backends[0]) as mesh, driver.client(driver.transport(mesh)) as client:
        answer = client.get("http://orders/", auth=TwoSteps()).json()
        assert answer["headers"]["authorization"] == f"after {backends[0].id}"
        answer = client.get("http://name:secret@orders/").json()
        assert answer["headers"]["authorization"].startswith("Basic ")
        assert in_flight(mesh) == 0


def test_mounts(driver: Driver, backends: list[Backend]):
    with mesh_of(backends[0]) as mesh, driver.client(mounts={"http://orders": driver.transport(mesh)}) as client:
        assert client.get("http://orders/").headers["x-backend"] == backends[0].id
        assert client.get(backends[1].url).headers["x-backend"] == backends[1].id


def test_event_hooks_trace_extension_and_default_encoding(driver: Driver, backends: list[Backend]):
    seen, progress = [], []
    with mesh_of(backends[0]) as mesh:
        if driver.is_async:

            async def hook(message):
                seen.append(str(getattr(message, "request", message).url))

            async def trace(name, info):
                progress.append(name)
        else:

            def hook(message):
                seen.append(str(getattr(message, "request", message).url))

            def trace(name, info):
                progress.append(name)

        options = {"event_hooks": {"request": [hook], "response": [hook]}, "default_encoding": "latin-1"}
        with driver.client(driver.transport(mesh), **options) as client:
            response = client.get("http://orders/", extensions={"trace": trace})
            assert seen == ["http://orders/", "http://orders/"]
            assert "http11.receive_response_headers.complete" in progress
            assert response.default_encoding == "latin-1"


def test_what_the_inner_transport_gets_is_a_request_of_the_package(driver: Driver):
    """Instrumentations patch and users write inner transports: both expect the real thing."""
    module, got = driver.module, []
    base = module.AsyncBaseTransport if driver.is_async else module.BaseTransport

    class Inner(base):
        def handle_request(self, request):
            got.append(request)
            return module.Response(200, text="fine")

        async def handle_async_request(self, request):
            return self.handle_request(request)

    endpoints = []
    with mesh_of(services={"orders": [meshlb.Endpoint("fd00::1", 80), "10.0.0.1:8080"]}, policy="round_robin") as mesh:

        def factory(endpoint):
            endpoints.append(endpoint.address)
            return Inner()

        with driver.client(driver.transport(mesh, transport_factory=factory)) as client:
            for _ in range(4):
                assert client.get("http://orders/a%20b?q=%26#part").text == "fine"
        assert sorted(endpoints) == ["10.0.0.1:8080", "[fd00::1]:80"]
        assert {type(request) for request in got} == {module.Request}
        urls = {str(request.url) for request in got}
        assert urls == {"http://[fd00::1]/a%20b?q=%26", "http://10.0.0.1:8080/a%20b?q=%26"}
        assert {request.url.raw_path for request in got} == {b"/a%20b?q=%26"}
        assert {request.headers["host"] for request in got} == {"orders"}


def test_default_mesh(driver: Driver, backends: list[Backend], tmp_path, monkeypatch: pytest.MonkeyPatch):
    addresses = ", ".join(f'"{backend.address}"' for backend in backends)
    (tmp_path / "meshlb.toml").write_text(f"[static.services]\norders = [{addresses}]\n")
    monkeypatch.chdir(tmp_path)
    transport = driver.transport()
    with driver.client(transport) as client:
        try:
            assert client.get("http://orders/").status_code == 200
            first = meshlb.default_mesh()
            first.close()
            assert client.get("http://orders/").status_code == 200, "a default mesh that was closed is made anew"
            assert meshlb.default_mesh() is not first
        finally:
            meshlb.default_mesh().close()


def test_wrong_arguments(driver: Driver):
    with pytest.raises(meshlb.ConfigError, match="mesh: 'orders' is not a Mesh"):
        driver.transport("orders")
    with mesh_of() as mesh, pytest.raises(meshlb.ConfigError, match="transport_factory"):
        driver.transport(mesh, transport_factory="no")
    with pytest.warns(DeprecationWarning, match="cert"), pytest.raises(OSError, match="No such file"):
        driver.transport(cert="/nowhere/client.pem")  # not first when it is used


def test_config_is_each_services_own(driver: Driver, backends: list[Backend]):
    discovery = StaticDiscovery({"orders": [backends[0].address], "users": [backends[0].address]})
    backends[0].behave(status=503)
    with (
        Mesh(discovery, services={"users": ServiceConfig(retry=None)}) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        assert client.get("http://orders/").extensions["meshlb"]["attempts"] == 3
        assert client.get("http://users/").extensions["meshlb"]["attempts"] == 1
