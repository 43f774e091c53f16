"""Why nobody can be called, and waiting for somebody."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest

from meshlb import (
    Breaker,
    CircuitOpen,
    Cluster,
    DiscoveryError,
    DiscoveryTimeout,
    Lease,
    MeshClosed,
    MeshError,
    NoEndpoints,
    Status,
)
from tests.core.parts import FAILURE, bare, endpoint
from tests.support.wait import eventually, eventually_async

# -- why nobody can be called


def error_of(cluster: Cluster, **arguments: Any) -> MeshError:
    with pytest.raises(MeshError) as caught:
        cluster.start(**arguments)
    return caught.value


def test_no_answer_in_time() -> None:
    error = error_of(bare(discovery_timeout=0.02))
    assert type(error) is DiscoveryTimeout
    assert isinstance(error, TimeoutError)
    assert "'orders'" in str(error)
    assert "0.02 s" in str(error)
    assert "reachable" in str(error)


def test_the_calls_own_deadline_is_shorter() -> None:
    assert type(error_of(bare(discovery_timeout=3600), timeout=0.02)) is DiscoveryTimeout


def test_a_registry_that_failed_is_quoted() -> None:
    cluster = bare(discovery_timeout=0.02)
    cluster.failed(DiscoveryError("Consul says 403 (ACL not found)"))
    error = error_of(cluster)
    assert type(error) is DiscoveryError
    assert "403 (ACL not found)" in str(error)


def test_a_watch_that_has_ended_is_not_waited_for() -> None:
    cluster = bare(discovery_timeout=3600)
    cluster.failed(DiscoveryError("no filter language"))
    cluster.watch_ended()
    assert type(error_of(cluster)) is DiscoveryError


def test_no_instance() -> None:
    cluster = bare()
    cluster.update([])
    error = error_of(cluster)
    assert type(error) is NoEndpoints
    assert "no instance" in str(error)
    assert "registered" in str(error)
    cluster.failed(DiscoveryError("it has: stock, users"))
    assert "it has: stock, users" in str(error_of(cluster))


def test_nobody_fit_says_how_many_are_in_which_state() -> None:
    cluster = bare(panic_threshold=0)
    cluster.update([endpoint(0, status=Status.CRITICAL), *(endpoint(i, status=Status.MAINTENANCE) for i in (1, 2))])
    error = error_of(cluster)
    assert type(error) is NoEndpoints
    assert "none of its 3 endpoints can be called (1 critical, 2 maintenance)" in str(error)
    assert "snapshot()" in str(error)


def test_all_broken() -> None:
    cluster = bare(panic_threshold=0, max_ejection_percent=100, breaker=Breaker(consecutive_failures=1))
    cluster.update([endpoint(0), endpoint(1), endpoint(2, status=Status.CRITICAL)])
    for _ in range(2):
        cluster.start().close(FAILURE)
    error = error_of(cluster)
    assert type(error) is CircuitOpen
    assert "(1 critical, 2 open)" in str(error)
    assert "come back by themselves" in str(error)


def test_closed() -> None:
    cluster = bare()
    cluster.update([endpoint(0)])
    lease = cluster.start()
    cluster.close()
    cluster.close()
    assert type(error_of(cluster)) is MeshClosed
    assert "Mesh.close()" in str(error_of(cluster, patient=True))
    with pytest.raises(MeshClosed):
        cluster.wait_ready()
    assert lease.close()  # what was under way may end
    cluster.update([endpoint(0)])
    assert cluster.nodes == ()


# -- waiting


class Waiter:
    """Calls ``cluster.start`` on a thread of its own."""

    def __init__(self, cluster: Cluster, **arguments: Any) -> None:
        self.cluster = cluster
        self.result: Lease | BaseException | None = None
        self.thread = threading.Thread(target=self._run, kwargs=arguments)
        self.thread.start()

    def _run(self, **arguments: Any) -> None:
        try:
            self.result = self.cluster.start(**arguments)
        except MeshError as error:
            self.result = error

    def end(self) -> Any:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.result


def waiting(cluster: Cluster) -> int:
    return len(cluster._changed._callbacks)


def test_a_first_call_waits_for_the_first_answer() -> None:
    cluster = bare(discovery_timeout=60)
    waiters = [Waiter(cluster) for _ in range(5)]
    eventually(lambda: waiting(cluster) == 5)
    cluster.failed(DiscoveryError("not yet"))  # the registry may come back: go on waiting
    cluster.update([endpoint(0)])
    leases = [waiter.end() for waiter in waiters]
    assert all(isinstance(lease, Lease) for lease in leases)
    assert waiting(cluster) == 0
    for lease in leases:
        lease.close()


def test_an_empty_first_answer_ends_the_waiting_too() -> None:
    cluster = bare(discovery_timeout=60)
    waiter = Waiter(cluster)
    eventually(lambda: waiting(cluster) == 1)
    cluster.update([])
    assert type(waiter.end()) is NoEndpoints


def test_only_the_patient_wait_for_somebody_to_come() -> None:
    cluster = bare()
    cluster.update([])
    assert type(error_of(cluster)) is NoEndpoints
    assert type(error_of(cluster, patient=True, timeout=0.02)) is NoEndpoints
    waiter = Waiter(cluster, patient=True)
    eventually(lambda: waiting(cluster) == 1)
    cluster.update([])
    cluster.update([endpoint(0, status=Status.MAINTENANCE)])
    assert waiter.result is None
    cluster.update([endpoint(0)])
    assert isinstance(waiter.end(), Lease)
    waiter.result = None


def test_closing_ends_all_waiting() -> None:
    cluster = bare(discovery_timeout=60)
    waiters = [Waiter(cluster, patient=patient) for patient in (True, False)]
    eventually(lambda: waiting(cluster) == 2)
    cluster.close()
    assert [type(waiter.end()) for waiter in waiters] == [MeshClosed, MeshClosed]


@pytest.mark.parametrize("timeout", [1e300, float("inf"), 1e10])
def test_endless_timeouts(timeout: float) -> None:
    cluster = bare(discovery_timeout=1e15)
    waiter = Waiter(cluster, timeout=timeout, patient=True)
    eventually(lambda: waiting(cluster) == 1)
    cluster.update([endpoint(0)])
    assert isinstance(waiter.end(), Lease)
    waiter.result = None


@pytest.mark.parametrize("timeout", [0, -1, float("-inf"), float("nan")])
def test_a_timeout_that_is_over_already(timeout: float) -> None:
    cluster = bare()
    assert type(error_of(cluster, timeout=timeout)) is DiscoveryTimeout
    with pytest.raises(DiscoveryTimeout):
        cluster.wait_ready(timeout)
    cluster.update([endpoint(0)])
    assert cluster.start(timeout=timeout).close()  # nothing to wait for
    cluster.wait_ready(timeout)


async def test_waiting_in_a_task() -> None:
    cluster = bare(discovery_timeout=60)
    found: list[Lease] = []

    async def call() -> None:
        found.append(await cluster.start_async())

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(call)
        await eventually_async(lambda: waiting(cluster) == 3)
        thread = threading.Thread(target=cluster.update, args=([endpoint(0)],))
        thread.start()
    thread.join()
    assert len(found) == 3
    await cluster.wait_ready_async()
    for lease in found:
        lease.close()


async def test_cancelled_while_waiting() -> None:
    cluster = bare(discovery_timeout=60)
    async with anyio.create_task_group() as group:
        group.start_soon(cluster.start_async)
        group.start_soon(cluster.wait_ready_async)
        await eventually_async(lambda: waiting(cluster) == 2)
        group.cancel_scope.cancel()
    assert waiting(cluster) == 0
    cluster.update([endpoint(0)])
    assert cluster.nodes[0].calls == 0
    with anyio.move_on_after(0) as scope:
        await anyio.sleep(0)
        lease = await cluster.start_async()
        lease.close()
    assert scope.cancelled_caught
    assert cluster.nodes[0].calls == 0


async def test_a_task_waits_no_longer_than_it_said() -> None:
    cluster = bare(discovery_timeout=0.02)
    with pytest.raises(DiscoveryTimeout):
        await cluster.start_async()
    with pytest.raises(DiscoveryTimeout):
        await cluster.wait_ready_async(0.01)
    cluster.update([])
    with pytest.raises(NoEndpoints):
        await cluster.start_async(patient=True, timeout=0.02)
    cluster.close()
    with pytest.raises(MeshClosed):
        await cluster.start_async(patient=True)


def test_wait_ready_is_about_somebody_to_call() -> None:
    cluster = bare()
    cluster.update([])
    with pytest.raises(NoEndpoints):
        cluster.wait_ready(0.02)
    cluster.update([endpoint(0, status=Status.CRITICAL)])
    cluster.wait_ready(0.02)  # in panic it will be called
    cluster.update([endpoint(0, status=Status.MAINTENANCE)])
    with pytest.raises(NoEndpoints, match="1 maintenance"):
        cluster.wait_ready(0.02)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: (cluster.wait_ready(), ready.set()))
    thread.start()
    eventually(lambda: waiting(cluster) == 1)
    assert not ready.is_set()
    cluster.update([endpoint(0)])
    assert ready.wait(10)
    thread.join()
