"""Discovery against a real Consul agent."""

from __future__ import annotations

import asyncio
import http.client

import pytest

from meshlb.discovery import ConsulDiscovery, ServiceQuery
from meshlb.errors import DiscoveryError
from meshlb.model import Endpoint, Status
from tests.discovery.collect import CollectingSink, watching
from tests.support.consul_agent import ConsulAgent
from tests.support.consul_api import ConsulError
from tests.support.wait import eventually_async

pytestmark = [pytest.mark.anyio, pytest.mark.consul]


def status(sink):
    endpoint = sink.one()
    return None if endpoint is None else endpoint.status


async def test_the_life_of_an_instance(consul_agent, service_name):
    discovery = ConsulDiscovery(consul_agent.address, empty_grace=0.2)
    async with watching(discovery, service_name) as sink:
        await sink.until(lambda sink: sink.addresses == [])
        consul_agent.register(
            service_name, "one", "127.0.0.1", 8001, tags=["v1"], meta={"zone": "b", "k": "v"}, weights=(10, 2)
        )
        await sink.until(lambda sink: status(sink) is Status.PASSING)
        assert sink.one() == Endpoint(
            "127.0.0.1",
            8001,
            weight=10,
            zone="b",
            id="one",
            node=consul_agent.name,
            datacenter="dc1",
            tags=("v1",),
            meta={"zone": "b", "k": "v"},
        )
        consul_agent.set_status("one", "warning", "slow today")
        await sink.until(lambda sink: status(sink) is Status.WARNING)
        assert (sink.one().weight, sink.one().status_reason) == (2, "warning: check 'ttl' (slow today)")
        consul_agent.set_status("one", "critical", "out of disk")
        await sink.until(lambda sink: status(sink) is Status.CRITICAL)
        assert sink.one().status_reason == "critical: check 'ttl' (out of disk)"
        consul_agent.set_status("one", "passing")
        await sink.until(lambda sink: status(sink) is Status.PASSING)
        consul_agent.service_maintenance("one", True, "upgrade")
        await sink.until(lambda sink: status(sink) is Status.MAINTENANCE)
        assert sink.one().status_reason == "maintenance: the service is in maintenance mode (upgrade)"
        consul_agent.service_maintenance("one", False)
        await sink.until(lambda sink: status(sink) is Status.PASSING)
        consul_agent.register(service_name, "two", "127.0.0.1", 8002)
        await sink.until(lambda sink: len(sink.endpoints) == 2)
        consul_agent.deregister("one")
        await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8002"])
        consul_agent.deregister("two")
        await sink.until(lambda sink: sink.addresses == [])
        assert not sink.failures
        described = discovery.describe(ServiceQuery(service_name))
        assert described["index"] > 0 and described["known_leader"] == "true" and described["error"] is None


async def test_a_warning_without_weight_and_odd_entries(consul_agent, service_name):
    consul_agent.register(service_name, f"{service_name}-0", "127.0.0.1", 8001, weights=(1, 0), status="warning")
    consul_agent.register(service_name, f"{service_name}-1", "127.0.0.1", 0)
    consul_agent.register(service_name, f"{service_name}-2", "::1", 8002, checks=[])
    consul_agent.register(service_name, f"{service_name}-3", None, 8003)
    consul_agent.register(service_name, f"{service_name}-4", "127.0.0.9", 8004, status="critical")
    consul_agent.register(service_name, f"{service_name}-5", "127.0.0.9", 8004)
    discovery = ConsulDiscovery(consul_agent.address)
    async with watching(discovery, service_name) as sink:
        await sink.until(lambda sink: len(sink.endpoints or ()) == 4)
        found = {endpoint.address: endpoint for endpoint in sink.endpoints}
        no_weight = found["127.0.0.1:8001"]
        assert no_weight.status is Status.CRITICAL and no_weight.status_reason.startswith("weight 0 while warning")
        assert found["[::1]:8002"].status is Status.PASSING
        assert found[f"{consul_agent.host}:8003"].id == f"{service_name}-3"
        assert found["127.0.0.9:8004"].id == f"{service_name}-5"
        (problem,) = discovery.describe(ServiceQuery(service_name))["malformed"]
        assert f"{service_name}-1" in problem and "no port" in problem


async def test_tag_and_filter_and_tagged_address(consul_agent, service_name):
    wan = {"wan": {"Address": "198.51.100.7", "Port": 443}}
    consul_agent.register(
        service_name, f"{service_name}-0", "127.0.0.1", 8001, tags=["v1", "blue"], TaggedAddresses=wan
    )
    consul_agent.register(service_name, f"{service_name}-1", "127.0.0.1", 8002, tags=["v2", "blue"], meta={"k": "v"})
    wanted = [
        (ServiceQuery(service_name), {}, [8001, 8002]),
        (ServiceQuery(service_name, tag="v2"), {}, [8002]),
        (ServiceQuery(service_name, tag="v2"), {"tag": "blue"}, [8002]),
        (ServiceQuery(service_name, tag="v2"), {"tag": "v1"}, []),
        (ServiceQuery(service_name, filter='Service.Meta.k == "v"'), {}, [8002]),
        (ServiceQuery(service_name, filter="Service.Port != 9000"), {"filter": '"v1" in Service.Tags'}, [8001]),
        (ServiceQuery(service_name, datacenter="dc1"), {}, [8001, 8002]),
        (ServiceQuery(service_name), {"consistency": "stale"}, [8001, 8002]),
        (ServiceQuery(service_name), {"consistency": "consistent"}, [8001, 8002]),
        (ServiceQuery(service_name), {"cached": True}, [8001, 8002]),
        (ServiceQuery(service_name), {"tagged_address": "wan"}, [443, 8002]),
    ]
    for query, settings, ports in wanted:
        async with watching(ConsulDiscovery(consul_agent.address, **settings), query) as sink:
            await sink.until(lambda sink: sink.updates or sink.failures)
            assert sorted(endpoint.port for endpoint in sink.endpoints) == ports, (query, settings)


@pytest.mark.parametrize(
    ("query", "settings", "hint"),
    [
        ({"filter": "nonsense ==="}, {}, "the filter expression is wrong"),
        ({"datacenter": "atlantis"}, {}, "no such datacenter"),
        ({}, {"namespace": "team"}, "Enterprise"),
        ({}, {"scheme": "https", "verify": False}, "does not speak TLS"),
    ],
)
async def test_what_a_real_consul_refuses(consul_agent, service_name, query, settings, hint):
    address = consul_agent.address.removeprefix("http://")
    discovery = ConsulDiscovery(address, **settings)
    async with watching(discovery, ServiceQuery(service_name, **query)) as sink:
        await sink.until(lambda sink: sink.failures or sink.updates)
        assert sink.failures and hint in str(sink.failures[0])


async def test_the_cache_of_the_agent_tells_of_itself(consul_agent, service_name):
    consul_agent.register(service_name, service_name, "127.0.0.1", 8001)
    discovery = ConsulDiscovery(consul_agent.address, cached=True)
    async with watching(discovery, service_name) as sink:
        await sink.until(lambda sink: sink.addresses)
        assert discovery.describe(ServiceQuery(service_name))["cache"] in {"MISS", "HIT"}
        consul_agent.register(service_name, f"{service_name}-1", "127.0.0.1", 8002)
        await sink.until(lambda sink: len(sink.endpoints) == 2)


async def test_a_new_instance_is_seen_while_other_services_change(consul_agent, service_name):
    async with watching(ConsulDiscovery(consul_agent.address), service_name) as sink:
        await sink.until(lambda sink: sink.updates)
        for number in range(20):
            consul_agent.register(f"{service_name}-other", f"{service_name}-other-{number}", "127.0.0.1", 9000)
        for number in range(4):
            consul_agent.register(service_name, f"{service_name}-{number}", "127.0.0.1", 8000 + number)
            await sink.until(lambda sink, number=number: len(sink.endpoints) == number + 1)


async def test_a_query_that_times_out_confirms_what_is_known(consul_agent, service_name):
    consul_agent.register(service_name, service_name, "127.0.0.1", 8001)
    discovery = ConsulDiscovery(consul_agent.address, wait=1)
    async with watching(discovery, service_name) as sink:
        await sink.until(lambda sink: sink.addresses)
        index = discovery.describe(ServiceQuery(service_name))["index"]
        told = len(sink.updates)
        await sink.until(lambda sink: len(sink.updates) == told + 2)
        assert all(update is sink.updates[-3] for update in sink.updates[-2:]), "the very same tuple"
        assert discovery.describe(ServiceQuery(service_name))["index"] == index


async def test_py_consuls_other_calls_are_awaitable(consul_agent, service_name):
    discovery = ConsulDiscovery(consul_agent.address)
    client = await discovery.client()
    assert (await client.agent.self())["Config"]["NodeName"] == consul_agent.name
    assert await client.agent.service.register(service_name, service_id=service_name, port=8001)
    index, services = await client.catalog.services()
    assert int(index) > 0 and service_name in services
    index, nodes = await client.coordinate.nodes()
    assert isinstance(nodes, list)
    assert await client.kv.put(f"{service_name}/ä b", "value")
    _, found = await client.kv.get(f"{service_name}/ä b")
    assert found["Value"] == b"value"
    assert await client.agent.service.deregister(service_name)
    await discovery.aclose()


async def test_an_agent_that_is_killed_and_comes_back(service_name):
    with ConsulAgent(mode="server") as agent:
        agent.register(service_name, "one", "127.0.0.1", 8001)
        discovery = ConsulDiscovery(agent.address)
        async with watching(discovery, service_name) as sink:
            await sink.until(lambda sink: sink.addresses)
            agent.kill()
            await sink.until(lambda sink: len(sink.failures) >= 3)
            assert "cannot be reached" in str(sink.failures[-1])
            assert [len(change) for change in sink.changes] == [1], "the last known good set stays"
            assert discovery.describe(ServiceQuery(service_name))["failures"] >= 3
            await asyncio.to_thread(agent.restart)
            agent.register(service_name, "two", "127.0.0.1", 8002)
            # Up to 8 s of back-off after the failures above.
            await sink.until(lambda sink: len(sink.endpoints) == 2, timeout=30)
            assert discovery.describe(ServiceQuery(service_name))["error"] is None


async def test_an_agent_that_forgets_everything_and_a_frozen_one(service_name):
    with ConsulAgent() as agent:
        agent.register(service_name, "one", "127.0.0.1", 8001)
        discovery = ConsulDiscovery(agent.address, empty_grace=60)
        async with watching(discovery, service_name) as sink:
            await sink.until(lambda sink: sink.addresses)
            agent.freeze()
            late = CollectingSink()
            other = asyncio.create_task(discovery.watch(ServiceQuery(f"{service_name}-other"), late))
            await asyncio.to_thread(agent.restart)  # -dev: the index starts again and nothing is registered
            await eventually_async(lambda: discovery.describe(ServiceQuery(service_name))["empty_held_for"])
            assert [len(change) for change in sink.changes] == [1], "held back: this empty answer is suspicious"
            agent.register(service_name, "one", "127.0.0.1", 8002)
            await sink.until(lambda sink: sink.addresses == ["127.0.0.1:8002"])
            assert all(isinstance(error, DiscoveryError) for error in sink.failures)
            await late.until(lambda sink: sink.addresses == [])
            other.cancel()
            await asyncio.wait({other})


async def test_node_maintenance(service_name):
    with ConsulAgent() as agent:
        agent.register(service_name, "one", "127.0.0.1", 8001)
        async with watching(ConsulDiscovery(agent.address), service_name) as sink:
            await sink.until(lambda sink: status(sink) is Status.PASSING)
            agent.node_maintenance(True, "new disk")
            await sink.until(lambda sink: status(sink) is Status.MAINTENANCE)
            assert sink.one().status_reason == "maintenance: the node is in maintenance mode (new disk)"
            agent.node_maintenance(False)
            await sink.until(lambda sink: status(sink) is Status.PASSING)


async def test_a_connection_limit_slows_down_and_recovers(service_name):
    with ConsulAgent(config={"limits": {"http_max_conns_per_client": 3}}) as agent:
        agent.register(service_name, "one", "127.0.0.1", 8001)
        # wait: Consul counts a connection that was closed during a query until that query would have ended.
        discovery = ConsulDiscovery(agent.address, wait=1)
        async with watching(discovery, service_name) as sink:
            await sink.until(lambda sink: sink.addresses)
            more = [CollectingSink() for _ in range(6)]
            tasks = [
                asyncio.create_task(discovery.watch(ServiceQuery(f"{service_name}-{number}"), one))
                for number, one in enumerate(more)
            ]
            await eventually_async(lambda: any(one.failures for one in more))
            said = next(str(one.failures[0]) for one in more if one.failures)
            assert "http_max_conns_per_client" in said
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await eventually_async(lambda: _registers(agent, service_name))
            await sink.until(lambda sink: len(sink.endpoints) == 2, timeout=30)


def _registers(agent, service_name):
    """Also the test's own connection may be one too many, until Consul has noticed that the others are closed."""
    try:
        agent.register(service_name, "two", "127.0.0.1", 8002)
    except (OSError, http.client.HTTPException, ConsulError):
        return False
    return True
