"""A program that calls a service through a mesh without pause, to be stopped and continued.

`python -m tests.resilience.stopped_program KIND TIMEOUT ADDRESS...`: KIND is "sync", "async" or "grpc". Whenever it is
sent a line on standard input, it prints one of JSON: what it has seen so far.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from typing import Any

from meshlb import Breaker, Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery

SERVICE = "orders"


class Seen:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.good = 0
        self.errors: Counter[str] = Counter()
        self.over = False

    def note(self, error: Exception | None = None) -> None:
        with self.lock:
            if error is None:
                self.good += 1
            else:
                self.errors[type(error).__name__] += 1


def call_http(mesh: Mesh, seen: Seen, timeout: float) -> None:
    import httpx

    from meshlb.httpx import MeshTransport

    with httpx.Client(transport=MeshTransport(mesh), timeout=timeout) as client:
        while not seen.over:
            try:
                client.get(f"http://{SERVICE}/").raise_for_status()
                seen.note()
            except httpx.TransportError as error:
                seen.note(error)


def call_grpc(mesh: Mesh, seen: Seen, timeout: float) -> None:
    import grpc

    from meshlb._proto import echo_pb2, echo_pb2_grpc
    from meshlb.grpc import insecure_channel

    with insecure_channel(f"consul:///{SERVICE}", mesh=mesh) as channel:
        stub = echo_pb2_grpc.EchoStub(channel)
        while not seen.over:
            try:
                stub.Say(echo_pb2.EchoRequest(text="x"), timeout=timeout)
                seen.note()
            except grpc.RpcError as error:
                seen.note(error)


async def call_async(mesh: Mesh, seen: Seen, timeout: float) -> None:
    import httpx

    from meshlb.httpx import AsyncMeshTransport

    async def run(client: httpx.AsyncClient) -> None:
        while not seen.over:
            try:
                (await client.get(f"http://{SERVICE}/")).raise_for_status()
                seen.note()
            except httpx.TransportError as error:
                seen.note(error)

    async with httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=timeout) as client:
        await asyncio.gather(*(run(client) for _ in range(20)))


def main(kind: str, timeout: str, *addresses: str) -> None:
    seen = Seen()
    breaker = Breaker(consecutive_failures=3, minimum_calls=5)
    config = ServiceConfig(policy="round_robin", retry=None, breaker=breaker, connect_timeout=10)
    with Mesh(StaticDiscovery({SERVICE: addresses}), defaults=config) as mesh:
        threads = []
        if kind == "async":
            target: Any = lambda: asyncio.run(call_async(mesh, seen, float(timeout)))  # noqa: E731  # one of two targets
            threads.append(threading.Thread(target=target))
        else:
            call = call_http if kind == "sync" else call_grpc
            threads += [threading.Thread(target=call, args=(mesh, seen, float(timeout))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in sys.stdin:
            with seen.lock:
                state = {"good": seen.good, "errors": seen.errors, "snapshot": mesh.snapshot()}
            print(json.dumps(state), flush=True)
        seen.over = True
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
