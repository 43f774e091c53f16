"""Endpoints that leave, and connections that are not used: how many connections this process has, and to whom.

A way to call is the argument: http, grpc, aio or tcp.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import meshlb.grpc.aio
from meshlb import Mesh, ServiceConfig, tcp
from meshlb._proto.echo_pb2 import EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.discovery import StaticDiscovery
from tests.support.wait import eventually, eventually_async

PATIENCE = 30.0


def connections() -> Counter[str]:
    """Established connections of this process, by the address of the other side."""
    own = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    found: Counter[str] = Counter()
    for name in ("tcp", "tcp6"):  # gRPC's sockets are of the second kind, whatever they are connected to
        with open(f"/proc/self/net/{name}") as table:
            for line in list(table)[1:]:
                fields = line.split()
                host, port = fields[2].split(":")
                if fields[3] == "01" and f"socket:[{fields[9]}]" in own:
                    found[f"{socket.inet_ntoa(struct.pack('=I', int(host[-8:], 16)))}:{int(port, 16)}"] += 1
    return found


def mesh_of(service: str, **config: Any) -> tuple[Mesh, StaticDiscovery, list[str]]:
    addresses = os.environ["ORDERS" if service == "orders" else "ECHO"].split(",")
    discovery = StaticDiscovery({service: addresses})
    given = {"policy": "round_robin", "connect_timeout": 20, "discovery_timeout": 30, **config}
    return Mesh(discovery, defaults=ServiceConfig(**given)), discovery, addresses


def idle(connect: Callable[[Mesh], Callable[[], object]], service: str) -> None:
    """Connections are dropped after a while without a call, and made again by the next one."""
    mesh, _, addresses = mesh_of(service, idle_timeout=0.5)
    with mesh:
        call = connect(mesh)
        for _ in range(2):
            eventually(lambda: (call(), call(), set(connections()) == set(addresses))[-1], PATIENCE)
            eventually(lambda: not connections(), PATIENCE, message=lambda: str(connections()))


def left(connect: Callable[[Mesh], Callable[[], object]], service: str) -> None:
    """The connections to an endpoint that left are closed, and only those."""
    mesh, discovery, addresses = mesh_of(service)
    with mesh:
        call = connect(mesh)
        eventually(lambda: (call(), call(), set(connections()) == set(addresses))[-1], PATIENCE)
        discovery.update(service, addresses[:1])
        eventually(lambda: set(connections()) == set(addresses[:1]), PATIENCE, message=lambda: str(connections()))
        call()


def http() -> None:
    import httpx

    from meshlb.httpx import MeshTransport

    def connect(mesh: Mesh) -> Callable[[], object]:
        client = httpx.Client(transport=MeshTransport(mesh), timeout=30)
        return lambda: client.get("http://orders/")

    idle(connect, "orders")
    left(connect, "orders")


def grpc() -> None:
    def connect(mesh: Mesh) -> Callable[[], object]:
        stub = EchoStub(meshlb.grpc.insecure_channel("consul:///echo", mesh=mesh))
        return lambda: stub.Say(EchoRequest(text="x"), timeout=30)

    idle(connect, "echo")
    left(connect, "echo")
    drained()


def drained() -> None:
    """A stream that runs keeps its connection after its endpoint has left, until it has ended."""
    mesh, discovery, addresses = mesh_of("echo")
    with mesh, meshlb.grpc.insecure_channel("consul:///echo", mesh=mesh) as channel:
        conversation: Any = EchoStub(channel).Watch(EchoRequest(text="x", count=40, interval_seconds=0.05), timeout=90)
        next(conversation)
        [busy] = [node for node in mesh.cluster("echo").nodes if node.in_flight]
        others = [address for address in addresses if address != busy.endpoint.address]
        discovery.update("echo", others)
        assert len(list(conversation)) == 39
        eventually(lambda: busy.endpoint.address not in connections(), PATIENCE)


def aio() -> None:
    async def main() -> None:
        mesh, discovery, addresses = mesh_of("echo", idle_timeout=0.5)
        async with mesh, meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as channel:
            stub = EchoStub(channel)

            async def connected() -> bool:
                await asyncio.gather(*(stub.Say(EchoRequest(text="x"), timeout=30) for _ in range(4)))
                return set(connections()) == set(addresses)

            for _ in range(2):
                await eventually_async(connected, PATIENCE)
                await eventually_async(lambda: not connections(), PATIENCE)
            await eventually_async(connected, PATIENCE)
            discovery.update("echo", addresses[:1])
            await eventually_async(lambda: addresses[1] not in connections(), PATIENCE)

    asyncio.run(main())


def tcp_connections() -> None:
    mesh, discovery, addresses = mesh_of("orders", drain_timeout=0.2)
    with mesh:
        cluster = mesh.cluster("orders")
        sockets = [tcp.connect(cluster), tcp.connect(cluster)]
        assert set(connections()) == set(addresses)
        discovery.update("orders", addresses[:1])
        [gone] = [sock for sock in sockets if "{}:{}".format(*sock.getpeername()) == addresses[1]]
        gone.settimeout(PATIENCE)
        assert gone.recv(1) == b""
        eventually(lambda: addresses[1] not in connections(), PATIENCE)
        for sock in sockets:
            sock.close()


if __name__ == "__main__":
    {"http": http, "grpc": grpc, "aio": aio, "tcp": tcp_connections}[sys.argv[1]]()
    print("well")
