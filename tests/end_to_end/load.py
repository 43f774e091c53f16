"""Callers of a service: several threads, or several event loops with several tasks each, that call at a steady pace and
note who answered and what went wrong.

The four kinds are the four adapters. Every call is idempotent. A load is bounded in pace and in number of calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Literal

import httpx

import meshlb.grpc
import meshlb.grpc.aio
from meshlb import Mesh
from meshlb._proto.echo_pb2 import EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.httpx import AsyncMeshTransport, MeshTransport
from tests.support.wait import eventually

CALLERS = 4
LOOPS = 2
PACE = 0.02
"""Seconds between two calls of a caller."""
MOST_CALLS = 10_000
CALL_TIMEOUT = 20.0
"""Seconds: not what a test is about, only what ends it."""

SyncCall = Callable[[], str]
AsyncCall = Callable[[], Awaitable[str]]


@contextlib.contextmanager
def httpx_calls(mesh: Mesh, service: str) -> Iterator[SyncCall]:
    with httpx.Client(transport=MeshTransport(mesh), timeout=CALL_TIMEOUT) as client:

        def call() -> str:
            response = client.get(f"http://{service}/load")
            response.raise_for_status()
            return str(response.headers["x-backend"])

        yield call


@contextlib.asynccontextmanager
async def httpx_async_calls(mesh: Mesh, service: str) -> AsyncIterator[AsyncCall]:
    async with httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=CALL_TIMEOUT) as client:

        async def call() -> str:
            response = await client.get(f"http://{service}/load")
            response.raise_for_status()
            return str(response.headers["x-backend"])

        yield call


@contextlib.contextmanager
def grpc_calls(mesh: Mesh, service: str) -> Iterator[SyncCall]:
    with meshlb.grpc.insecure_channel(f"consul:///{service}", mesh=mesh) as channel:
        stub = EchoStub(channel)
        yield lambda: stub.Say(EchoRequest(text="load"), timeout=CALL_TIMEOUT).backend


@contextlib.asynccontextmanager
async def grpc_aio_calls(mesh: Mesh, service: str) -> AsyncIterator[AsyncCall]:
    async with meshlb.grpc.aio.insecure_channel(f"consul:///{service}", mesh=mesh) as channel:
        stub: Any = EchoStub(channel)

        async def call() -> str:
            return str((await stub.Say(EchoRequest(text="load"), timeout=CALL_TIMEOUT)).backend)

        yield call


SYNC: dict[str, Callable[[Mesh, str], AbstractContextManager[SyncCall]]] = {
    "httpx": httpx_calls,
    "grpc": grpc_calls,
}
ASYNC: dict[str, Callable[[Mesh, str], AbstractAsyncContextManager[AsyncCall]]] = {
    "httpx-async": httpx_async_calls,
    "grpc-aio": grpc_aio_calls,
}
KINDS = [*SYNC, *ASYNC]


def protocol(kind: str) -> Literal["http", "grpc"]:
    """Which backends a kind of load calls."""
    return "http" if kind.startswith("httpx") else "grpc"


def call_once(kind: str, mesh: Mesh, service: str) -> str:
    """One call with a client of its own; who answered. Raises what the caller gets."""
    if kind in SYNC:
        with SYNC[kind](mesh, service) as call:
            return call()

    async def one() -> str:
        async with ASYNC[kind](mesh, service) as call:
            return await call()

    return asyncio.run(one())


class Load:
    """The callers, from entering the block to leaving it. All use one mesh; each event loop has a client of its own."""

    def __init__(
        self, kind: str, mesh: Mesh, service: str, *, callers: int = CALLERS, loops: int = LOOPS, pace: float = PACE
    ) -> None:
        self.kind = kind
        self._callers = callers
        self._loops = loops
        self._pace = pace
        self._mesh = mesh
        self._service = service
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._seen: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []
        self.calls = 0
        self.errors: list[BaseException] = []
        self.left_tasks: list[str] = []
        """Tasks of ours that were still there when an event loop's clients were closed."""

    def __enter__(self) -> Load:
        if self.kind in SYNC:
            self._threads = [threading.Thread(target=self._run_sync, name="load")]
        else:
            self._threads = [
                threading.Thread(target=self._run_async, name=f"load-loop-{n}") for n in range(self._loops)
            ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    # What the test asks

    def seen(self) -> Counter[str]:
        """Who answered how many calls since the last `forget`."""
        with self._lock:
            return Counter(self._seen)

    def forget(self) -> None:
        """Count anew. A call under way is counted when it ends, so the first few may be older."""
        with self._lock:
            self._seen.clear()

    def make(self, calls: int, timeout: float = 30.0) -> Counter[str]:
        """Wait until so many more calls have ended, without an error in any; who answered them."""
        self.forget()

        def made() -> bool:
            self.check()
            return self.seen().total() >= calls

        eventually(made, timeout, message=lambda: f"{self.seen().total()} of {calls} calls: {self.seen()}")
        return self.seen()

    def settles(self, callable_ids: set[str], timeout: float = 15.0, calls: int = 60) -> None:
        """Wait until so many calls in a row are answered by these and by nobody else, without an error."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self.make(calls)
            if set(seen) == callable_ids:
                return
            assert time.monotonic() < deadline, f"calls go to {dict(seen)} instead of {sorted(callable_ids)}"

    def reaches(self, id: str, timeout: float = 10.0) -> float:
        """Wait until this one answers; the seconds it took."""
        began = time.monotonic()
        self.forget()

        def reached() -> bool:
            self.check()
            return self.seen()[id] > 0

        eventually(reached, timeout, message=lambda: f"{id} gets nothing: {self.seen()}")
        return time.monotonic() - began

    def check(self) -> None:
        """No call has failed, and the callers are still there."""
        assert not self.errors, f"{len(self.errors)} of {self.calls} calls failed: {self.errors[:3]!r}"
        assert all(thread.is_alive() for thread in self._threads)

    # The callers

    def _run_sync(self) -> None:
        with SYNC[self.kind](self._mesh, self._service) as call:
            workers = [
                threading.Thread(target=self._work, args=(call,), name="load-worker") for _ in range(self._callers)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

    def _work(self, call: SyncCall) -> None:
        for _ in range(MOST_CALLS):
            if self._stopping.wait(self._pace):
                return
            try:
                backend = call()
            except Exception as error:
                self._note(error)
            else:
                self._note(backend)

    def _run_async(self) -> None:
        asyncio.run(self._on_loop())

    async def _on_loop(self) -> None:
        before = asyncio.all_tasks()
        async with ASYNC[self.kind](self._mesh, self._service) as call:
            await asyncio.gather(*(self._work_async(call) for _ in range(self._callers // self._loops)))
        # What was cancelled by the closing may end in the next few turns of the loop.
        for _ in range(100):
            if asyncio.all_tasks() == before:
                return
            await asyncio.sleep(0.01)
        self.left_tasks += [repr(task) for task in asyncio.all_tasks() - before]

    async def _work_async(self, call: AsyncCall) -> None:
        for _ in range(MOST_CALLS):
            if self._stopping.is_set():
                return
            await asyncio.sleep(self._pace)
            try:
                backend = await call()
            except Exception as error:
                self._note(error)
            else:
                self._note(backend)

    def _note(self, result: str | Exception) -> None:
        with self._lock:
            self.calls += 1
            if isinstance(result, str):
                self._seen[result] += 1
            else:
                self.errors.append(result)
