"""What many threads cost each other: picks and whole leases per second, by one thread and by sixteen together.

Under the GIL sixteen threads cannot do more than one. What is to be seen is how much less they do: that is what waiting
for locks takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from benchmarks.services import REPORT, mesh_of, variants
from meshlb.cluster import Cluster
from meshlb.model import CallContext

THREADS = 16
SIZE = 1_000
_SECONDS = 0.2
_REPEAT = 2
_BATCH = 100


def run(size: int = SIZE) -> None:
    print(f"\nthousands a second at {size} endpoints (best of {_REPEAT}), by 1 thread and by {THREADS} together")
    print(f"  {'policy':34} {'picks':>8} {'by 16':>8} {'ratio':>6} {'leases':>8} {'by 16':>8} {'ratio':>6}")
    for name, policy in variants().items():
        with mesh_of(policy, size) as mesh:
            cluster = mesh.cluster("service")
            cells = []
            for operation in (_pick(cluster), _lease(cluster)):
                alone, together = _best_rate(operation, 1), _best_rate(operation, THREADS)
                cells.append(f"{alone / 1e3:8.0f} {together / 1e3:8.0f} {together / alone:6.2f}")
            print(f"  {name:34} " + " ".join(cells))


def _pick(cluster: Cluster) -> Callable[[], None]:
    pick = cluster.view.picker.pick
    context = CallContext(key="192.0.2.42")

    def operation() -> None:
        for _ in range(_BATCH):
            pick(context)

    return operation


def _lease(cluster: Cluster) -> Callable[[], None]:
    context = CallContext(key="192.0.2.42")
    reports = cluster.wants_reports

    def operation() -> None:
        for _ in range(_BATCH):
            lease = cluster.try_start(context)
            assert lease is not None
            lease.close()
            if reports:
                cluster.observe_report(lease.node, REPORT)

    return operation


def _best_rate(operation: Callable[[], None], threads: int) -> float:
    return max(_rate(operation, threads) for _ in range(_REPEAT))


def _rate(operation: Callable[[], None], threads: int) -> float:
    """Operations of a batch per second, by so many threads together."""
    counts = [0] * threads
    begin = threading.Barrier(threads + 1)
    stop = threading.Event()

    def work(number: int) -> None:
        begin.wait()
        done = 0
        while not stop.is_set():
            operation()
            done += _BATCH
        counts[number] = done

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    begin.wait()
    began = time.perf_counter()
    stop.wait(_SECONDS)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)
