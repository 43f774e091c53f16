"""What a change of the set costs, off the call path: the time to build a picker and the view around it, and the memory
that a picker takes."""

from __future__ import annotations

import gc
import time
import tracemalloc
from random import Random

from benchmarks.services import mesh_of, variants
from meshlb.balancing import PolicyEnvironment
from meshlb.cluster import Cluster
from meshlb.config import ServiceConfig

SIZE = 10_000
_REPEAT = 7


def run(size: int = SIZE) -> None:
    print(f"\nrebuild at {size} endpoints after one has come or gone, in ms of processor time (best of {_REPEAT});")
    print("memory of the picker in KiB, without the endpoints' own state")
    print(f"  {'policy':34} {'picker':>8} {'view':>8} {'KiB':>8}")
    for name, policy in variants().items():
        with mesh_of(policy, size) as mesh:
            cluster = mesh.cluster("service")
            print(f"  {name:34} {_build(cluster):8.1f} {_refresh(cluster):8.1f} {_memory(cluster):8.0f}")


def _build(cluster: Cluster) -> float:
    environment = PolicyEnvironment("service", time.monotonic, Random(1))
    whole, less = cluster.view.nodes, cluster.view.nodes[:-1]
    best, picker = float("inf"), cluster.view.picker
    for turn in range(_REPEAT):
        gc.collect()
        nodes = whole if turn % 2 else less  # the same set again would get the same table again
        began = time.thread_time()
        picker = cluster.policy.build(nodes, environment, picker)
        best = min(best, time.thread_time() - began)
    return best * 1e3


def _refresh(cluster: Cluster) -> float:
    """All that happens when an endpoint's health has changed. The policy's tables are taken over where they can be."""
    best = float("inf")
    for _ in range(_REPEAT):
        gc.collect()
        began = time.thread_time()
        cluster.refresh()
        best = min(best, time.thread_time() - began)
    return best * 1e3


def _memory(cluster: Cluster) -> float:
    environment = PolicyEnvironment("service", time.monotonic, Random(1))
    policy = ServiceConfig(policy=cluster.policy).policy
    assert not isinstance(policy, str)
    gc.collect()
    tracemalloc.start()
    picker = policy.build(cluster.view.nodes, environment, None)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del picker
    return kept / 1024
