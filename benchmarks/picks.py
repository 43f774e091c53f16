"""How long a pick takes, for each policy, by the number of endpoints; and a whole lease."""

from __future__ import annotations

import timeit

from meshlb import Endpoint, Mesh, ServiceConfig
from meshlb.balancing import policy_names
from meshlb.discovery import StaticDiscovery
from meshlb.model import NO_CONTEXT, CallContext

SIZES = (10, 100, 1_000, 10_000)
_NUMBER = 5_000
_REPEAT = 7


def run(sizes: tuple[int, ...] = SIZES) -> None:
    print("\npick time in us (best of 7), endpoints with and without a latency history mixed")
    print(f"  {'policy':28} " + " ".join(f"{size:>8}" for size in sizes))
    for policy in policy_names():
        print(f"  {policy:28} " + " ".join(f"{_pick(policy, size):8.2f}" for size in sizes))
    print("\nlease: pick, begin, close with a success, in us (best of 7)")
    for policy in ("round_robin", "least_response_time"):
        print(f"  {policy:28} " + " ".join(f"{_lease(policy, size):8.2f}" for size in sizes))


def _mesh(policy: str, size: int) -> Mesh:
    endpoints = [
        Endpoint(f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}", 80, weight=1 + i % 3, id=f"i{i}") for i in range(size)
    ]
    return Mesh(StaticDiscovery({"service": endpoints}), defaults=ServiceConfig(policy=policy))


def _pick(policy: str, size: int) -> float:
    with _mesh(policy, size) as mesh:
        cluster = mesh.cluster("service")
        cluster.wait_ready(30)
        for _ in range(min(2 * size, 2_000)):
            lease = cluster.start()
            lease.close()
        pick = cluster.view.picker.pick
        context = CallContext(key="user-42") if "hash" in policy else NO_CONTEXT
        return min(timeit.repeat(lambda: pick(context), number=_NUMBER, repeat=_REPEAT)) / _NUMBER * 1e6


def _lease(policy: str, size: int) -> float:
    with _mesh(policy, size) as mesh:
        cluster = mesh.cluster("service")
        cluster.wait_ready(30)

        def lease() -> None:
            one = cluster.try_start()
            assert one is not None
            one.close()

        return min(timeit.repeat(lease, number=_NUMBER, repeat=_REPEAT)) / _NUMBER * 1e6
