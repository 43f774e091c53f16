"""ACLs of a real Consul: a token that is missing, wrong, too weak, or deleted while a query waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshlb.discovery import ConsulDiscovery
from tests.discovery.collect import watching
from tests.support.consul_agent import ConsulAgent

pytestmark = [pytest.mark.anyio, pytest.mark.consul]

READ = 'service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }'


@pytest.fixture(scope="module")
def agent() -> Iterator[ConsulAgent]:
    with ConsulAgent(mode="server", acl=True) as started:
        yield started


@pytest.mark.parametrize(
    ("rules", "seen"),
    [
        (READ, True),
        ('service "{service}" {{ policy = "read" }} node "{node}" {{ policy = "read" }}', None),
        ('service "{service}" {{ policy = "read" }}', False),
        ('service "other" {{ policy = "read" }} node_prefix "" {{ policy = "read" }}', False),
        ('node_prefix "" {{ policy = "read" }}', False),
        ('key_prefix "" {{ policy = "read" }}', False),
    ],
)
async def test_a_token_that_is_too_weak_is_told_from_a_service_without_instances(agent, service_name, rules, seen):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    rules = rules.format(service=service_name, node=agent.name) if "{{" in rules else rules
    token = agent.create_token(rules, f"policy-{service_name}")
    async with watching(ConsulDiscovery(agent.address, token=token), service_name) as sink:
        await sink.until(lambda sink: sink.events)
        if seen is False:
            assert not sink.updates, "an empty list here is not the truth"
            assert f"the ACL token may not see instances of '{service_name}'" in str(sink.failures[0])
        else:
            assert sink.addresses == ["127.0.0.1:8001"]


async def test_no_token_and_a_wrong_one(agent, service_name):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    for token, said in (("", "may not see"), ("00000000-dead-beef-0000-000000000000", "answered 403 (ACL not found)")):
        async with watching(ConsulDiscovery(agent.address, token=token), service_name) as sink:
            await sink.until(lambda sink: sink.events)
            assert not sink.updates
            assert said in str(sink.failures[0]) and "service:read and node:read" in str(sink.failures[0])


async def test_a_service_without_instances_is_empty_for_a_token_that_is_good(agent, service_name):
    token = agent.create_token(READ, f"policy-{service_name}")
    async with watching(ConsulDiscovery(agent.address, token=token), service_name) as sink:
        await sink.until(lambda sink: sink.events)
        assert sink.addresses == [] and not sink.failures


async def test_a_token_deleted_while_a_query_waits_and_replaced(agent, service_name, tmp_path):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    token = agent.create_token(READ, f"policy-{service_name}")
    path = tmp_path / "token"
    path.write_text(token)
    # Consul looks at the token when a query starts or its service changes: one that waits goes on to its end.
    discovery = ConsulDiscovery(agent.address, token_file=path, wait=1, empty_grace=0)
    async with watching(discovery, service_name) as sink:
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8001"])
        agent.delete_token(token)
        await sink.until(lambda sink: sink.failures)
        assert "403" in str(sink.failures[0]) and "CONSUL_HTTP_TOKEN" in str(sink.failures[0])
        assert all(sink.changes), "what is known stays"
        path.write_text(agent.create_token(READ, f"policy-{service_name}-2"))
        agent.register(service_name, f"{service_name}-2", "127.0.0.1", 8002)
        await sink.until(lambda sink: len(sink.endpoints) == 2, timeout=30)


async def test_a_policy_that_becomes_too_weak_does_not_empty_the_service(agent, service_name):
    agent.register(service_name, service_name, "127.0.0.1", 8001)
    token = agent.create_token(READ, f"policy-{service_name}")
    async with watching(ConsulDiscovery(agent.address, token=token, wait=1, empty_grace=0), service_name) as sink:
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8001"])
        policy = agent.get("/v1/acl/token/self", token=token).body["Policies"][0]["ID"]
        weak = {"Name": f"policy-{service_name}", "Rules": 'key_prefix "" { policy = "read" }'}
        agent.put(f"/v1/acl/policy/{policy}", weak)
        await sink.until(lambda sink: sink.failures)
        assert "may not see instances" in str(sink.failures[0])
        assert all(sink.changes)
        agent.put(f"/v1/acl/policy/{policy}", weak | {"Rules": READ})
        agent.register(service_name, f"{service_name}-2", "127.0.0.1", 8002)
        await sink.until(lambda sink: len(sink.endpoints) == 2, timeout=30)
