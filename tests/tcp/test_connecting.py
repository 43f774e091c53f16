"""What the three ways to connect have in common."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import meshlb
from meshlb import Breaker, ConfigError, Limits, Mesh, Retry, ServiceConfig, StickyKey, tcp
from meshlb.discovery import StaticDiscovery
from tests.support.wait import eventually_async
from tests.tcp.conftest import ClusterOf, Way, in_flight
from tests.tcp.servers import Server, black_hole, refused, silent

Serve = Callable[..., list[Server]]

REFUSED = OSError
"""Each way raises its own library's: anyio's is no ConnectionRefusedError, but has one as its cause."""


async def test_a_connection_is_one_request_in_flight(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    servers = serve(2)
    cluster = cluster_of(*servers)
    async with way.connected(cluster) as first, way.connected(cluster) as second:
        assert {await first(b""), await second(b"")} == {b"s0\n", b"s1\n"}
        assert await first(b"hello\n") == b"hello\n"
        assert [node.in_flight for node in cluster.nodes] == [1, 1]
        assert all(node.latency.has_history and node.oldest_wait(cluster.clock()) == 0 for node in cluster.nodes)
    await eventually_async(lambda: in_flight(cluster) == 0)
    assert [(node.calls, node.successes) for node in cluster.nodes] == [(1, 1), (1, 1)]
    await eventually_async(lambda: [server.open for server in servers] == [0, 0], 20)


async def test_least_connections_counts_connections(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve(2), policy=meshlb.LeastConnections(full_scan=True))
    async with way.connected(cluster) as first:
        held = await first(b"")
        for _ in range(5):
            async with way.connected(cluster) as other:
                assert await other(b"") != held
            await eventually_async(lambda: in_flight(cluster) == 1)


async def test_one_that_refuses_is_passed_over(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    dead = refused()
    config: dict[str, Any] = {"max_ejection_percent": 100, "panic_threshold": 0, "retry": Retry(max_attempts=1)}
    breaker = Breaker(consecutive_failures=2, open_time=600, max_open_time=600)
    cluster = cluster_of(dead, *serve(1), dead.rpartition(":")[0] + ":1", breaker=breaker, **config)
    for _ in range(6):
        async with way.connected(cluster) as talk:
            assert await talk(b"") == b"s0\n"
    bad, good, other = cluster.nodes
    assert bad.failures == other.failures == 2
    assert bad.last_failure == "ConnectionRefusedError"
    assert good.failures == 0
    assert bad.standing == other.standing == "open"  # fed, and so asked no more
    assert cluster.budget is None or cluster.budget.balance > 0


async def test_one_that_swallows_packets_costs_a_connect_timeout(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    with black_hole() as hole:
        cluster = cluster_of(hole, *serve(1), connect_timeout=1.5, retry=Retry(max_attempts=1))
        tried = {b""}
        while cluster.nodes[0].failures == 0:
            async with way.connected(cluster) as talk:
                tried.add(await talk(b""))
        assert tried == {b"", b"s0\n"}
        assert cluster.nodes[0].last_failure == "TimeoutError"


async def test_nobody_can_be_connected(way: Way, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(refused(), refused(), breaker=None, retry=Retry(max_attempts=1))
    with pytest.raises(REFUSED) as raised:
        async with way.connected(cluster):
            pass
    assert "attempt 2" in raised.value.__notes__[0]
    assert sum(node.failures for node in cluster.nodes) == 2


async def test_retries_that_are_off_are_off(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(refused(), *serve(1), retry=None)
    ended = []
    for _ in range(2):
        try:
            async with way.connected(cluster) as talk:
                ended.append(await talk(b""))
        except REFUSED:
            ended.append(b"refused")
    assert sorted(ended) == [b"refused", b"s0\n"]


async def test_the_timeout_is_for_all_of_it(way: Way, cluster_of: ClusterOf) -> None:
    with black_hole() as hole, black_hole() as other:
        cluster = cluster_of(hole, other, connect_timeout=60)
        with pytest.raises(TimeoutError):
            async with way.connected(cluster, timeout=0.5):
                pass


async def test_errors_are_oserrors_and_mesh_errors(way: Way, cluster_of: ClusterOf) -> None:
    breaker = Breaker(consecutive_failures=1, open_time=600, max_open_time=600)
    cluster = cluster_of(refused(), breaker=breaker, max_ejection_percent=100, panic_threshold=0, retry=None)
    with pytest.raises(REFUSED):
        async with way.connected(cluster):
            pass
    await eventually_async(lambda: cluster.nodes[0].is_open and not cluster.view.nodes)
    with pytest.raises(tcp.CircuitOpen) as raised:
        async with way.connected(cluster):
            pass
    assert isinstance(raised.value, meshlb.CircuitOpen)
    assert isinstance(raised.value, ConnectionError)
    assert "cache" in str(raised.value)
    with pytest.raises(ConfigError, match="timeout"):
        async with way.connected(cluster, timeout=-1):
            pass
    with Mesh(StaticDiscovery({"empty": []})) as mesh:
        empty = mesh.cluster("empty")
        with pytest.raises(tcp.NoEndpoints):
            async with way.connected(empty, timeout=20):
                pass
    with pytest.raises(tcp.MeshClosed):
        async with way.connected(empty):
            pass


async def test_errors_of_limits_and_sessions(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve(1), limits=Limits(max_concurrency=1, max_queue=0))
    async with way.connected(cluster):
        with pytest.raises(tcp.LimitExceeded) as full:
            async with way.connected(cluster):
                pass
    assert isinstance(full.value, meshlb.LimitExceeded)
    assert isinstance(full.value, ConnectionError)

    cluster = cluster_of(*serve(2), sticky=StickyKey(when_gone="fail"))
    async with way.connected(cluster, key="user-42") as talk:
        home = await talk(b"")
    known = [node.endpoint for node in cluster.nodes]
    cluster.update([known[1] if home == b"s0\n" else known[0]])
    with pytest.raises(tcp.SessionLost) as lost:
        async with way.connected(cluster, key="user-42"):
            pass
    assert isinstance(lost.value, meshlb.SessionLost)
    assert isinstance(lost.value, tcp.NoEndpoints)
    cluster.update(known)
    async with way.connected(cluster, key="user-42") as talk:
        assert await talk(b"") == home


async def test_the_registry_does_not_answer(way: Way) -> None:
    class Silent(StaticDiscovery):
        async def watch(self, query: Any, sink: Any) -> None:
            await asyncio.Event().wait()

    with Mesh(Silent({}), defaults=ServiceConfig(discovery_timeout=0.2)) as mesh:
        with pytest.raises(tcp.DiscoveryTimeout) as raised:
            async with way.connected(mesh.cluster("cache")):
                pass
        assert isinstance(raised.value, TimeoutError)
        assert isinstance(raised.value, meshlb.DiscoveryTimeout)
        assert isinstance(raised.value, tcp.DiscoveryError)


async def test_a_key_leads_to_the_same_instance(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve(3), policy="consistent_hash")
    seen = set()
    for _ in range(5):
        async with way.connected(cluster, key="user-42") as talk:
            seen.add(await talk(b""))
    assert len(seen) == 1


async def test_tls_with_the_name_of_the_service(
    way: Way, serve: Serve, cluster_of: ClusterOf, trusting: ssl.SSLContext, server_tls: Any
) -> None:
    servers = serve(2, server_tls("cache"))
    cluster = cluster_of(*servers)
    async with way.connected(cluster, ssl=trusting) as talk:
        assert (await talk(b"")).startswith(b"s")
        assert await talk(b"secret\n") == b"secret\n"
        assert in_flight(cluster) == 1
    await eventually_async(lambda: in_flight(cluster) == 0)
    with pytest.raises(ssl.SSLError):
        async with way.connected(cluster, ssl=trusting, server_hostname="somebody-else"):
            pass
    assert sum(node.failures for node in cluster.nodes) >= 2


async def test_an_instance_with_anothers_certificate_is_passed_over(
    way: Way, serve: Serve, cluster_of: ClusterOf, trusting: ssl.SSLContext, server_tls: Any
) -> None:
    [stranger] = serve(1, server_tls("somebody-else"))
    [right] = serve(1, server_tls("cache"))
    cluster = cluster_of(stranger, right)
    for _ in range(3):
        async with way.connected(cluster, ssl=trusting) as talk:
            assert await talk(b"hello\n") == b"s0\n"
    assert cluster.nodes[1].successes == 3
    assert cluster.nodes[0].last_failure == "SSLCertVerificationError"


async def test_one_that_never_ends_the_tls_handshake(
    way: Way, serve: Serve, cluster_of: ClusterOf, trusting: ssl.SSLContext, server_tls: Any
) -> None:
    with silent() as address:
        cluster = cluster_of(address, *serve(1, server_tls("cache")), connect_timeout=3)
        while cluster.nodes[0].failures == 0:
            async with way.connected(cluster, ssl=trusting, timeout=100) as talk:
                assert await talk(b"") == b"s0\n"


async def test_an_endpoint_that_leaves_keeps_its_connections_for_the_drain_timeout(
    way: Way, serve: Serve, cluster_of: ClusterOf
) -> None:
    servers = serve(2)
    cluster = cluster_of(*servers, drain_timeout=0.3)
    async with way.connected(cluster) as first, way.connected(cluster) as second:
        talks = {await first(b""): first, await second(b""): second}
        gone = next(node for node in cluster.nodes if node.endpoint.address == servers[0].address)
        cluster.update([node.endpoint for node in cluster.nodes if node is not gone])
        with anyio.fail_after(30):
            try:
                assert await talks[b"s0\n"](b"") == b""  # the end of the stream, which was not the server's doing
            except OSError:
                pass
        assert await talks[b"s1\n"](b"still\n") == b"still\n"
    await eventually_async(lambda: gone.in_flight == 0)


async def test_closing_the_mesh_ends_the_connections(way: Way, serve: Serve, cluster_of: ClusterOf) -> None:
    servers = serve(1)
    mesh = Mesh(StaticDiscovery({"cache": [servers[0].address]}))
    cluster = mesh.cluster("cache")
    async with way.connected(cluster, timeout=60) as talk:
        assert await talk(b"") == b"s0\n"
        await mesh.aclose()
        with anyio.fail_after(30):
            try:
                assert await talk(b"") == b""
            except OSError:
                pass
    await eventually_async(lambda: servers[0].open == 0, 20)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_cancelled_while_connecting(cluster_of: ClusterOf, anyio_backend: str) -> None:
    with black_hole() as hole:
        cluster = cluster_of(hole, connect_timeout=60)
        opens: list[Any] = [tcp.open_stream]
        if anyio_backend == "asyncio":
            opens.append(tcp.open_connection)
        for open_one in opens:
            async with anyio.create_task_group() as group:
                group.start_soon(open_one, cluster)
                await eventually_async(lambda: in_flight(cluster) == 1)
                group.cancel_scope.cancel()
            assert in_flight(cluster) == 0
        assert cluster.nodes[0].failures == 0
        assert cluster.nodes[0].ignored == len(opens)
