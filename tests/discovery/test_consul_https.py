"""Consul's HTTPS API, with certificates made by Consul's own tool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshlb.discovery import ConsulDiscovery
from tests.discovery.collect import watching
from tests.support.consul_agent import ConsulAgent

pytestmark = [pytest.mark.anyio, pytest.mark.consul]


@pytest.fixture(scope="module")
def agent() -> Iterator[ConsulAgent]:
    with ConsulAgent(mode="server", tls=True) as started:
        yield started


async def test_with_the_authority_it_works_and_changes_are_seen(agent, service_name):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    async with watching(ConsulDiscovery(agent.https_address, ca_file=agent.ca_file), service_name) as sink:
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8001"])
        agent.register(service_name, f"{service_name}-2", "127.0.0.1", 8002)
        await sink.until(lambda sink: len(sink.endpoints) == 2)
        assert not sink.failures


async def test_settings_from_the_environment(agent, service_name, monkeypatch):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    monkeypatch.setenv("CONSUL_HTTP_ADDR", agent.https_address)
    monkeypatch.setenv("CONSUL_CACERT", agent.ca_file)
    monkeypatch.setenv("CONSUL_TLS_SERVER_NAME", "server.dc1.consul")
    async with watching(ConsulDiscovery(), service_name) as sink:
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8001"])


@pytest.mark.parametrize(
    ("settings", "hint"),
    [({}, "CONSUL_CACERT"), ({"tls_server_name": "other.internal"}, "tls_server_name")],
    ids=["unknown authority", "another name"],
)
async def test_a_certificate_that_does_not_verify(agent, service_name, settings, hint):
    if "tls_server_name" in settings:
        settings = {**settings, "ca_file": agent.ca_file}
    async with watching(ConsulDiscovery(agent.https_address, **settings), service_name) as sink:
        await sink.until(lambda sink: sink.events)
        assert not sink.updates
        assert "TLS with Consul" in str(sink.failures[0]) and hint in str(sink.failures[0])


async def test_verification_can_be_turned_off(agent, service_name):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    async with watching(ConsulDiscovery(agent.https_address, verify=False), service_name) as sink:
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8001"])


async def test_plain_http_to_the_https_port(agent, service_name):
    plain = agent.https_address.replace("https://", "http://")
    async with watching(ConsulDiscovery(plain), service_name) as sink:
        await sink.until(lambda sink: sink.events)
        assert not sink.updates and "the port speaks TLS" in str(sink.failures[0])
