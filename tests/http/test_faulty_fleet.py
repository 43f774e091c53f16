"""Five servers, of which one is killed and one freezes while calls go on: nobody who asks for something notices."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from meshlb import Retry
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.support.backends import http_backends
from tests.support.wait import eventually

_CALLERS = 4


@pytest.mark.parametrize(("package", "kind"), [("httpx", "sync"), ("httpx", "asyncio"), ("httpx2", "trio")])
def test_callers_of_idempotent_requests_see_no_error(driver: Driver):
    with http_backends(5) as fleet:
        retry = Retry(per_try_timeout=0.5)
        with (
            mesh_of(*fleet, policy="least_response_time", retry=retry) as mesh,
            driver.client(driver.transport(mesh), timeout=30) as client,
            Traffic(driver, client.client) as traffic,
        ):
            traffic.wait_for(100)
            fleet[0].kill()
            traffic.wait_for(100)
            fleet[1].freeze()
            traffic.wait_for(200)
            fleet[0].restart()
            fleet[1].thaw()
            traffic.wait_for(100)
            # They are back in rotation: each is asked again, though they have failed.
            for backend in fleet[:2]:
                before = backend.requests()
                eventually(lambda backend=backend, before=before: backend.requests() > before, timeout=30)
            traffic.stop()
            assert traffic.errors == []
            assert set(traffic.seen) == {backend.id for backend in fleet}
            eventually(lambda: in_flight(mesh) == 0)
            nodes = mesh.cluster("orders").nodes
            assert sum(node.calls for node in nodes) == sum(
                node.successes + node.failures + node.overloads + node.ignored for node in nodes
            )


class Traffic:
    """Callers that ask without pause, and note who answered."""

    def __init__(self, driver: Driver, client: Any) -> None:
        self._driver = driver
        self._client = client
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(_CALLERS)
        self.seen: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def __enter__(self) -> Traffic:
        if self._driver.portal is not None:
            self._pool.submit(self._driver.portal.call, self._call_all_async)
        else:
            for _ in range(_CALLERS):
                self._pool.submit(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, calls: int) -> None:
        goal = self.seen.total() + calls
        eventually(lambda: self.seen.total() >= goal or self.errors, timeout=60)

    def stop(self) -> None:
        self._stopping.set()
        self._pool.shutdown()

    def _call(self) -> None:
        while not self._stopping.is_set() and not self.errors:
            try:
                self._note(self._client.get("http://orders/"))
            except BaseException as error:
                self.errors.append(error)

    async def _call_all_async(self) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(_CALLERS):
                group.start_soon(self._call_async)

    async def _call_async(self) -> None:
        while not self._stopping.is_set() and not self.errors:
            try:
                self._note(await self._client.get("http://orders/"))
            except Exception as error:
                self.errors.append(error)

    def _note(self, response: Any) -> None:
        assert response.status_code == 200
        self.seen[response.headers["x-backend"]] += 1
