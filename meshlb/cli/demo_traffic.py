"""The demo's callers: threads that call through httpx and a loop that calls through grpc.aio, at a steady pace."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import httpx

import meshlb.grpc.aio
from meshlb._proto import echo_pb2
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.httpx import MeshTransport
from meshlb.mesh import Mesh

if TYPE_CHECKING:
    from meshlb._proto.echo_pb2_grpc import EchoAsyncStub

_HTTP_WORKERS = 6
_GRPC_WORKERS = 6
_PACE = 0.020
"""Seconds between the calls of one worker: some 250 calls a second in all, which leaves a laptop room for the rest."""


class Traffic:
    """Drives both services until told to stop, and counts what its callers saw."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.calls = 0
        self.errors: list[str] = []
        """Errors that reached a caller: there should be none."""

    def run(self) -> None:
        """Call until ``stop``; returns when every call has ended."""
        with (
            httpx.Client(transport=MeshTransport(self._mesh), timeout=5) as client,
            ThreadPoolExecutor(_HTTP_WORKERS + 1) as pool,
        ):
            workers = [pool.submit(self._pace, lambda: self._get(client)) for _ in range(_HTTP_WORKERS)]
            workers.append(pool.submit(asyncio.run, self._call_grpc()))
            for worker in workers:
                error = worker.exception()  # waits for its end
                if error is not None:
                    self._count(error)

    def stop(self) -> None:
        self._stopping.set()

    @staticmethod
    def _get(client: httpx.Client) -> None:
        client.get("http://shop/offers").raise_for_status()

    def _pace(self, call: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                call()
            except Exception as error:  # whatever it is, the caller has seen it
                self._count(error)
            else:
                self._count(None)
            self._stopping.wait(max(0.0, _PACE - (time.monotonic() - began)))

    async def _call_grpc(self) -> None:
        async with meshlb.grpc.aio.insecure_channel("consul:///stock", mesh=self._mesh) as channel:
            stub = cast("EchoAsyncStub", EchoStub(channel))
            await asyncio.gather(*(self._say(stub) for _ in range(_GRPC_WORKERS)))

    async def _say(self, stub: EchoAsyncStub) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await stub.Say(echo_pb2.EchoRequest(text="how many?"), timeout=5)
            except Exception as error:
                self._count(error)
            else:
                self._count(None)
            await asyncio.sleep(max(0.0, _PACE - (time.monotonic() - began)))

    def _count(self, error: BaseException | None) -> None:
        with self._lock:
            self.calls += 1
            if error is not None:
                self.errors.append(f"{type(error).__name__}: {error}")
