"""Everything at once: threads, event loops, endpoints that come and go, failures, cancellations and forgotten leases.

Whatever happens, at the end nothing is in flight and every attempt is counted under exactly one outcome.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import anyio
import pytest
import trio

from meshlb import Breaker, Cluster, Lease, Mesh, MeshClosed, MeshError, Outcome, ServiceConfig, Status
from meshlb.call import Call, Safety
from meshlb.discovery import StaticDiscovery
from meshlb.model import NO_CONTEXT, OK
from meshlb.node import Node
from meshlb.resilience import BreakerState
from tests.core.parts import FAILURE, IGNORED, OVERLOAD, REFUSED, assert_adds_up, endpoint
from tests.support.wait import eventually

CALLS = 40_000
THREADS = 32
OUTCOMES: list[Outcome] = [OK, OK, OK, FAILURE, FAILURE, OVERLOAD, IGNORED, REFUSED]


class Tally:
    """What the callers know of their own attempts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[BaseException] = []

    def add(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1

    def run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self.lock:
                self.wrong.append(error)


def calls_of_a_thread(cluster: Cluster, tally: Tally, stop: threading.Event, seed: int) -> None:
    random = Random(seed)
    kept: list[Lease] = []
    while not stop.is_set():
        try:
            way = random.randrange(6)
            if way == 0:
                with cluster.lease(timeout=5) as lease:
                    tally.add("begun")
                    if random.random() < 0.5:
                        lease.answered(healthy=random.random() < 0.8)
                    if random.random() < 0.3:
                        raise ConnectionResetError
            elif way == 1:
                cluster.start()  # and forgotten
                tally.add("begun")
            elif way == 2:
                cycle: list[object] = [cluster.start()]  # forgotten in a cycle, until the collector comes by
                tally.add("begun")
                cycle.append(cycle)
                del cycle
            elif way == 3:
                kept.append(cluster.start())
                tally.add("begun")
                if len(kept) > 5:
                    kept.pop(random.randrange(len(kept))).close(random.choice(OUTCOMES))
            else:
                lease = cluster.start()
                tally.add("begun")
                call = Call(cluster, NO_CONTEXT, lease.started, 1.0)
                while call.after(lease, outcome := random.choice(OUTCOMES), Safety.IDEMPOTENT) is not None:
                    again = call.again()
                    if again is None:
                        break
                    tally.add("begun")
                    lease = again
                assert lease.closed, outcome
        except ConnectionResetError:
            pass
        except MeshClosed:
            break
        except MeshError:
            tally.add("refused")
            time.sleep(0.002)  # or those without anybody to call would leave no time to the others
    for lease in kept:
        lease.close()


async def calls_of_a_task(cluster: Cluster, tally: Tally, stop: threading.Event, random: Random) -> None:
    while not stop.is_set():
        with anyio.move_on_after(random.choice([0.0005, 0.002, 1])):
            try:
                async with cluster.lease(timeout=5) as lease:
                    tally.add("begun")
                    await anyio.sleep(random.random() * 0.002)
                    if random.random() < 0.3:
                        raise ConnectionResetError
                    if random.random() < 0.3:
                        lease.close(random.choice(OUTCOMES))
                lease = await cluster.start_async(patient=random.random() < 0.2, timeout=0.05)
                tally.add("begun")
                try:
                    await anyio.sleep(0.0005)
                finally:
                    lease.close(random.choice(OUTCOMES))
            except ConnectionResetError:
                pass
            except MeshClosed:
                return
            except MeshError:
                tally.add("refused")
                await anyio.sleep(0.001)


async def calls_of_a_loop(cluster: Cluster, tally: Tally, stop: threading.Event, seed: int) -> None:
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(calls_of_a_task, cluster, tally, stop, Random(seed * 100 + number))


def changes(discovery: StaticDiscovery, seen: Callable[[], None], stop: threading.Event) -> None:
    random = Random(0)
    while not stop.is_set():
        members = [
            endpoint(number, weight=random.choice([1, 1, 3]), status=random.choices(list(Status), [8, 2, 1, 1])[0])
            for number in random.sample(range(12), random.choice([0, 1, 2, 4, 5, 6, 8, 10, 12]))
        ]
        discovery.update("orders", members)
        seen()
        time.sleep(0.01 * random.random())


@pytest.mark.parametrize("policy", ["least_response_time", "round_robin"])
def test_every_count_adds_up(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "meshlb.cluster")
    config = ServiceConfig(
        policy=policy,
        breaker=Breaker(consecutive_failures=2, open_time=0.005, max_open_time=0.02, half_open_calls=2),
        drain_timeout=0.05,
        discovery_timeout=5,
    )
    discovery = StaticDiscovery({"orders": [endpoint(number) for number in range(8)]})
    mesh = Mesh(discovery, defaults=config, random=Random(1))
    cluster = mesh.cluster("orders")
    cluster.wait_ready(5)
    nodes: dict[int, Node] = {}
    removed: list[Node] = []

    class Listener:
        def endpoint_removed(self, node: Node) -> None:
            removed.append(node)

    listener = Listener()
    cluster.add_listener(listener)

    def seen() -> None:
        for node in cluster.nodes:
            nodes[id(node)] = node

    seen()
    tally = Tally()
    stop, last = threading.Event(), threading.Event()
    works: list[Callable[[], None]] = [
        lambda seed=seed: calls_of_a_thread(cluster, tally, stop, seed)  # type: ignore[misc]
        for seed in range(THREADS)
    ]
    works += [
        lambda seed=seed: asyncio.run(calls_of_a_loop(cluster, tally, stop, seed))  # type: ignore[misc]
        for seed in range(3)
    ]
    works.append(lambda: trio.run(calls_of_a_loop, cluster, tally, stop, 9))
    threads = [threading.Thread(target=tally.run, args=(work,)) for work in works]
    threads.append(threading.Thread(target=tally.run, args=(lambda: changes(discovery, seen, last),)))
    for thread in threads:
        thread.start()

    def has_seen_enough() -> bool:
        cluster.snapshot()
        gc.collect()
        return tally.counts["begun"] > CALLS and cluster.ejections > 10

    eventually(has_seen_enough, timeout=60, interval=0.05, message=lambda: f"{tally.counts} {cluster.ejections}")
    # The callers stop by themselves, but for a few that the closing of the mesh has to stop.
    stop.set()
    for thread in threads[:-1]:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads[:-1])
    last.set()
    threads[-1].join(30)
    assert tally.wrong == []
    gc.collect()
    eventually(lambda: not cluster._abandoned)
    assert_adds_up(nodes.values())
    assert {node.in_flight for node in nodes.values()} == {0}
    assert {len(node._waiting) for node in nodes.values()} == {0}
    assert sum(node.calls for node in nodes.values()) == tally.counts["begun"]
    for counter in ("successes", "failures", "overloads", "ignored"):
        assert sum(getattr(node, counter) for node in nodes.values()) > 100, counter
    out = [n for n in cluster.nodes if n.breaker is not None and n.breaker.state is not BreakerState.CLOSED]
    assert cluster._members.cap.out == len(out) == sum(node.ejected for node in cluster.nodes)

    # And it still works: all come back, all are used, all are let go.
    discovery.update("orders", [endpoint(number) for number in range(4)])
    seen()

    def all_are_ready() -> bool:
        for node in cluster.nodes:
            if (lease := node.begin()) is not None:
                lease.close()
        return {row["state"] for row in cluster.snapshot()["endpoints"]} == {"ready"}

    eventually(all_are_ready)
    assert cluster._members.cap.out == 0
    assert not cluster.view.panic
    discovery.update("orders", [])
    eventually(lambda: {id(node) for node in removed} == set(nodes))
    assert len(removed) == len(nodes)
    mesh.close()


@pytest.mark.parametrize("seed", range(4))
def test_closing_under_load_leaves_nothing_in_flight(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "meshlb.cluster")
    discovery = StaticDiscovery({"orders": [endpoint(number) for number in range(5)]})
    mesh = Mesh(discovery)
    cluster = mesh.cluster("orders")
    cluster.wait_ready(5)
    nodes = cluster.nodes
    tally, never = Tally(), threading.Event()
    works: list[Callable[[], None]] = [
        lambda number=number: calls_of_a_thread(cluster, tally, never, number)  # type: ignore[misc]
        for number in range(seed * 10, seed * 10 + 8)
    ]
    works.append(lambda: asyncio.run(calls_of_a_loop(cluster, tally, never, 1)))
    works.append(lambda: trio.run(calls_of_a_loop, cluster, tally, never, 2))
    threads = [threading.Thread(target=tally.run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(node.calls for node in nodes) > 200)
    mesh.close()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert tally.wrong == []
    gc.collect()
    cluster._close_abandoned()
    assert_adds_up(nodes)
    assert [node.in_flight for node in nodes] == [0] * 5
    assert sum(node.calls for node in nodes) == tally.counts["begun"]
