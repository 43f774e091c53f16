"""Discovery against three real servers: leader killed, quorum lost and back, snapshot restored."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshlb.discovery import ConsulDiscovery, ServiceQuery
from tests.discovery.collect import watching
from tests.support.wait import eventually_async

pytestmark = [pytest.mark.anyio, pytest.mark.consul]


async def test_a_cluster_breaks_in_every_way_and_comes_back(consul_cluster, service_name):
    """One cluster for all of it, since it takes seconds to start and to elect."""
    query = ServiceQuery(service_name)
    follower = consul_cluster.followers()[0]
    follower.register(service_name, "one", "127.0.0.1", 8001)
    await eventually_async(lambda: follower.health(service_name, stale=None).body)  # both kinds of query will see it
    # No pause between two queries: it is a waiting query that a restored snapshot is to find. One that comes just after
    # it waits for an index that is far off, as long as it may.
    often: dict[str, Any] = {"empty_grace": 120, "min_refresh_interval": 0, "wait": 10}
    default = ConsulDiscovery(follower.address, **often)
    stale = ConsulDiscovery(follower.address, consistency="stale", **often)
    async with watching(default, query) as sink, watching(stale, query) as stale_sink:
        for one in (sink, stale_sink):
            await one.until(lambda one: one.addresses == ["127.0.0.1:8001"])

        # The leader is killed: an election later the watch goes on.
        dead = await asyncio.to_thread(consul_cluster.kill_leader)
        await asyncio.to_thread(consul_cluster.wait_writable)
        follower.register(service_name, "two", "127.0.0.1", 8002)
        for one in (sink, stale_sink):
            await one.until(lambda one: len(one.endpoints) == 2, timeout=45)
        await asyncio.to_thread(dead.restart)
        await asyncio.to_thread(consul_cluster.wait_writable)

        # The index goes back with a snapshot: what came after it is gone, and changes are still seen.
        await eventually_async(lambda: default.describe(query)["error"] is None, timeout=45)
        follower.register(service_name, "three", "127.0.0.1", 8003)
        await sink.until(lambda sink: len(sink.endpoints) == 3, timeout=45)
        snapshot = await asyncio.to_thread(follower.save_snapshot)
        for number in range(20):
            follower.put(f"/v1/kv/{service_name}/{number}", b"x")
        # Past the agents: one that still has it might register it again, and the index would not be seen to go back.
        follower.catalog_register("elsewhere", "127.0.0.1", {"ID": "four", "Service": service_name, "Port": 8004})
        await sink.until(lambda sink: len(sink.endpoints) == 4, timeout=45)
        await stale_sink.until(lambda sink: len(sink.endpoints) == 4, timeout=45)
        before = default.describe(query)["index"]
        failures = len(sink.failures)
        await asyncio.to_thread(follower.restore_snapshot, snapshot)
        await eventually_async(lambda: default.describe(query)["index"] < before, timeout=45)
        assert len(sink.failures) == failures, "it has gone back by the rule, not by an error"
        follower.register(service_name, "five", "127.0.0.1", 8005)
        await sink.until(lambda sink: "127.0.0.1:8005" in sink.addresses, timeout=45)
        await stale_sink.until(lambda sink: "127.0.0.1:8005" in sink.addresses, timeout=45)

        # Without a quorum a default query fails, a stale one goes on; nobody loses what is known.
        known = set(sink.addresses)
        stale_failures = len(stale_sink.failures)
        others = [server for server in consul_cluster.servers if server is not follower]
        for server in others:
            server.kill()
        impatient = ConsulDiscovery(follower.address, wait=1)  # a query that waits does not notice by itself
        async with watching(impatient, query) as failing:
            await failing.until(lambda sink: "No cluster leader" in str(sink.failures), timeout=45)
        assert known <= set(sink.addresses) and known <= set(stale_sink.addresses)
        assert len(stale_sink.failures) == stale_failures
        for server in others:
            server.restart(wait=False)
        await asyncio.to_thread(consul_cluster.wait_writable)
        follower.register(service_name, "six", "127.0.0.1", 8006)
        for one in (sink, stale_sink):
            await one.until(lambda one: "127.0.0.1:8006" in one.addresses, timeout=60)

        assert all(change for one in (sink, stale_sink) for change in one.changes), "never told that nobody is there"
