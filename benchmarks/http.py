"""httpx: a bare client against meshlb's transport, sync and async; and both over 300 hosts."""

from __future__ import annotations

import asyncio
import itertools

import httpx

from benchmarks.measure import interleave, interleave_async, report
from benchmarks.servers import server
from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import AsyncMeshTransport, MeshTransport

_HOSTS = 300


def run(*, rounds: int, batch: int) -> None:
    with server("http", 3) as addresses, Mesh(StaticDiscovery({"echo": addresses})) as mesh:
        with httpx.Client() as bare, httpx.Client(transport=MeshTransport(mesh)) as meshed:
            variants = {
                "httpx.Client, bare": lambda: bare.get(f"http://{addresses[0]}/v1/orders/42"),
                "meshlb, 3 endpoints": lambda: meshed.get("http://echo/v1/orders/42"),
            }
            report("httpx sync, GET", interleave(variants, rounds=rounds, batch=batch))
        asyncio.run(_run_async(addresses, mesh, rounds, batch))


async def _run_async(addresses: list[str], mesh: Mesh, rounds: int, batch: int) -> None:
    async with httpx.AsyncClient() as bare, httpx.AsyncClient(transport=AsyncMeshTransport(mesh)) as meshed:
        variants = {
            "httpx.AsyncClient, bare": lambda: bare.get(f"http://{addresses[0]}/v1/orders/42"),
            "meshlb, 3 endpoints": lambda: meshed.get("http://echo/v1/orders/42"),
        }
        report("httpx async, GET", await interleave_async(variants, rounds=rounds, batch=batch))


def run_many_hosts(*, rounds: int) -> None:
    """The pool of one httpx client is quadratic in its connections; a pool an endpoint is not."""
    with (
        server("http", _HOSTS) as addresses,
        Mesh(StaticDiscovery({"echo": addresses}), defaults=ServiceConfig(policy="round_robin")) as mesh,
        httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=None)) as bare,
        httpx.Client(transport=MeshTransport(mesh)) as meshed,
    ):
        turn = itertools.cycle(addresses)
        variants = {
            "httpx.Client, bare": lambda: bare.get(f"http://{next(turn)}/"),
            "meshlb": lambda: meshed.get("http://echo/"),
        }
        # A batch of the number of hosts: the warm-up round opens a connection to every one of them.
        samples = interleave(variants, rounds=rounds, batch=_HOSTS)
        report(f"httpx sync, GET over {_HOSTS} hosts in turn, one kept connection each", samples)
