"""Programs that end without closing anything; which one is the argument."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx

import meshlb
import meshlb.grpc.aio
from meshlb import tcp
from meshlb._proto.echo_pb2 import EchoRequest
from meshlb.httpx import AsyncMeshTransport
from tests.process_life.programs import clients

KEPT: list[Any] = []
"""Alive until the interpreter has gone."""


def in_a_thread(forever: Callable[[], object]) -> None:
    """A daemon that calls without end, and is in the middle of it when the interpreter goes."""
    called = threading.Event()

    def run() -> None:
        while True:
            forever()
            called.set()

    threading.Thread(target=run, daemon=True).start()
    assert called.wait(60)


def unclosed() -> None:
    clients.order(), clients.echo()
    with tcp.connect(clients.mesh.cluster("orders")) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sock.recv(4) == b"HTTP"


def streaming() -> None:
    stream = clients.stub.Watch(EchoRequest(text="x", count=1000, interval_seconds=0.05))
    next(stream)
    KEPT.extend([stream, clients.stub.Say.future(EchoRequest(text="hang"))])


def threads() -> None:
    in_a_thread(clients.echo)


def threads_http() -> None:
    with httpx.Client(transport=clients.MeshTransport(clients.mesh)) as other:
        other.get("http://orders/")
    in_a_thread(clients.order)


def asyncio_ended() -> None:
    """asyncio.run is over; the aio channel, the async client and an asyncio stream were left open in it."""

    async def main() -> None:
        client = httpx.AsyncClient(transport=AsyncMeshTransport(clients.mesh), timeout=30)
        KEPT.append(client)
        await client.get("http://orders/")
        assert (await clients.aio_stub.Say(EchoRequest(text="x"), timeout=30)).text == "x"
        call = clients.aio_stub.Watch(EchoRequest(text="x", count=1000, interval_seconds=0.05))
        await call.read()
        KEPT.append(call)

    asyncio.run(main())


def asyncio_twice() -> None:
    asyncio_ended()
    asyncio_ended()


def forgotten() -> None:
    """Made and dropped, in functions that are over."""
    mesh = meshlb.Mesh(clients.mesh.discovery)
    httpx.Client(transport=clients.MeshTransport(mesh)).get("http://orders/", timeout=30)
    del mesh


def in_a_callback() -> None:
    """A call from atexit, where threads can no longer be started."""
    import atexit

    clients.order()
    atexit.register(clients.order)


def main(name: str) -> None:
    globals()[name]()
    print("well")


if __name__ == "__main__":
    assert os.environ["ORDERS"]
    main(sys.argv[1])
