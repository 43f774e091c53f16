"""TLS to the endpoints, under the name of the service."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from meshlb import Endpoint, Mesh
from meshlb.discovery import StaticDiscovery
from tests.http.drivers import Driver, in_flight, mesh_of, patient
from tests.support.backends import Backend, Certificate, http_backend, started


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def tls_backends(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Backend]]:
    """Two that are "orders" (and orders.service.consul), and one that is somebody else."""
    folder = tmp_path_factory.mktemp("tls")
    backends = []
    for number, names in enumerate([("orders", "orders.service.consul")] * 2 + [("billing",)]):
        issued = authority.issue_cert(*names)
        files = Certificate(folder / f"{number}.pem", folder / f"{number}.key")
        issued.cert_chain_pems[0].write_to_path(files.cert)
        issued.private_key_pem.write_to_path(files.key)
        backends.append(http_backend(tls=files))
    with started(backends):
        yield backends


@pytest.fixture
def trusting(authority: trustme.CA, tmp_path: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_certificate_is_verified_for_the_service(driver: Driver, tls_backends: list[Backend], trusting: ssl.SSLContext):
    with mesh_of(*tls_backends[:2], policy="round_robin") as mesh:
        with driver.client(driver.transport(mesh, verify=trusting)) as client:
            seen = {client.get("https://orders/").headers["x-backend"] for _ in range(4)}
            assert seen == {backend.id for backend in tls_backends[:2]}
            response = client.get("https://orders.service.consul/")
            assert response.json()["headers"]["host"] == "orders.service.consul"
        assert in_flight(mesh) == 0


def test_endpoint_that_is_somebody_else_is_not_talked_to(
    driver: Driver, tls_backends: list[Backend], trusting: ssl.SSLContext
):
    stranger = tls_backends[2]
    stranger.stats(clear=True)
    with mesh_of(stranger, tls_backends[0], connect_timeout=5) as mesh:
        with driver.client(driver.transport(mesh, verify=trusting)) as client:
            assert client.post("https://orders/").headers["x-backend"] == tls_backends[0].id
        with driver.client(driver.transport(mesh, verify=trusting)) as client:
            with pytest.raises(driver.module.ConnectError):
                client.get("https://orders/", extensions={"sni_hostname": "elsewhere"})
            name = {"sni_hostname": "billing"}  # the caller's own wins
            assert client.get("https://orders/", extensions=name).headers["x-backend"] == stranger.id
        assert mesh.cluster("orders").nodes[0].failures >= 1
        assert stranger.requests() == 1
        assert in_flight(mesh) == 0


def test_unknown_authority(driver: Driver, tls_backends: list[Backend]):
    with mesh_of(tls_backends[0], retry=None, connect_timeout=5) as mesh:
        with driver.client(driver.transport(mesh)) as client, pytest.raises(driver.module.ConnectError):
            client.get("https://orders/")
        with driver.client(driver.transport(mesh, verify=False)) as client:
            assert client.get("https://orders/").status_code == 200


def test_tls_towards_a_plain_server_and_the_other_way_round(
    driver: Driver, backends: list[Backend], tls_backends: list[Backend], trusting: ssl.SSLContext
):
    with mesh_of(backends[0], tls_backends[0], retry=patient(), connect_timeout=5) as mesh:
        with driver.client(driver.transport(mesh, verify=trusting)) as client:
            assert client.get("https://orders/").headers["x-backend"] == tls_backends[0].id
            assert client.get("http://orders/").headers["x-backend"] == backends[0].id
        assert in_flight(mesh) == 0


def test_hosts_outside_the_mesh_use_the_same_settings(
    driver: Driver, tls_backends: list[Backend], trusting: ssl.SSLContext
):
    with mesh_of() as mesh, driver.client(driver.transport(mesh, verify=trusting)) as client:
        name = {"sni_hostname": "orders"}
        assert client.get(tls_backends[0].url, extensions=name).headers["x-backend"] == tls_backends[0].id


def test_http2_over_tls_is_offered(driver: Driver, tls_backends: list[Backend], trusting: ssl.SSLContext):
    """The server knows HTTP/1.1 only, and that is what comes out; test_http2.py has one that speaks HTTP/2."""
    discovery = StaticDiscovery({"orders": [Endpoint(tls_backends[0].host, tls_backends[0].port)]})
    with Mesh(discovery) as mesh, driver.client(driver.transport(mesh, verify=trusting, http2=True)) as client:
        assert client.get("https://orders/").http_version == "HTTP/1.1"
