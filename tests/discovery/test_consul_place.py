"""Whatever Consul says of places and distances: calls go on, and what is not known is said once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from meshlb import Failover, Mesh, ServiceConfig, Zones
from meshlb.discovery import ConsulDiscovery
from tests.discovery.odd_consul import HANG, Request, good, odd_consul, reply
from tests.support.wait import eventually_async

pytestmark = pytest.mark.anyio

NEAREST = ServiceConfig(failover=Failover(by="nearest"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # of the server; the mesh has a loop of its own


def coord(dimensions: int = 8, error: float = 0.2) -> dict[str, Any]:
    return {"Vec": [0.0001] * dimensions, "Height": 1e-5, "Adjustment": 0, "Error": error}


def answering(agent: object, nodes: object = None, servers: object = None) -> Callable[[Request], bytes]:
    paths = {"/v1/agent/self": agent, "/v1/coordinate/nodes": nodes, "/v1/coordinate/datacenters": servers}

    def answer(request: Request) -> bytes:
        body = paths.get(request.path, "")
        return body if isinstance(body, bytes) else reply(200, json.dumps(body).encode())

    return answer


AGENT = {"Config": {"Datacenter": "dc1", "NodeName": "me"}, "Meta": {"zone": "a"}, "Coord": coord()}


@pytest.mark.parametrize(
    ("elsewhere", "tier"),
    [
        (answering(AGENT, [{"Node": "n1", "Segment": "", "Coord": coord()}], []), "up to 2 ms"),
        (answering(AGENT, [{"Node": "n1", "Segment": "", "Coord": coord(4)}], None), "unknown"),
        (answering(AGENT, [{"Node": "n1", "Segment": "", "Coord": coord(error=1.5)}], []), "unknown"),
        (answering(AGENT, [{"Node": "n1", "Segment": "", "Coord": {"Vec": ["?"]}}], [3]), "unknown"),
        (answering(AGENT, None, None), "unknown"),
        (answering(reply(403, b"Permission denied")), "unknown"),
        (answering(AGENT, reply(500, b"No cluster leader"), []), "unknown"),
        (answering(AGENT, reply(200, b"<html>"), []), "unknown"),
        (answering([]), "unknown"),
    ],
)
async def test_coordinates(elsewhere: Callable[[Request], bytes], tier: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with odd_consul(HANG, [good(5, 8001)]) as consul:
        consul.elsewhere = elsewhere
        async with Mesh(ConsulDiscovery(consul.address), defaults=NEAREST) as mesh:
            cluster = mesh.cluster("web")
            async with cluster.lease() as lease:
                assert lease.endpoint.port == 8001
            await eventually_async(lambda: cluster.snapshot()["tiers"][0]["name"] == tier)
            assert cluster.snapshot()["tiers"][0]["share"] == 1.0
            assert cluster.snapshot()["last_error"] is None
    if tier == "unknown":
        assert caplog.records


async def test_an_agent_that_hangs_does_not_hold_the_service_up_for_long() -> None:
    async with odd_consul(good(5, 8001)) as consul:
        consul.elsewhere = lambda request: HANG
        config = ServiceConfig(zones=Zones(peers="front"))
        async with Mesh(ConsulDiscovery(consul.address), defaults=config) as mesh, mesh.cluster("web").lease() as lease:
            assert lease.endpoint.port == 8001


async def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLB_ZONE", "b")
    async with odd_consul(HANG, [good(5, 8001)]) as consul:
        consul.elsewhere = answering(AGENT)
        config = ServiceConfig(zones=Zones(force_local=True))
        async with Mesh(ConsulDiscovery(consul.address), defaults=config) as mesh:
            cluster = mesh.cluster("web")
            await cluster.wait_ready_async(10)
            tiering = cluster.tiering
            assert tiering is not None
            await eventually_async(lambda: tiering.topology.place.datacenter == "dc1")
            assert tiering.topology.place.zone == "b"
