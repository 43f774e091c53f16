"""How long a pick takes, for each policy, by the number of endpoints; and a whole lease."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from math import inf
from time import perf_counter_ns

from benchmarks.services import REPORT, mesh_of, variants
from meshlb.cluster import Cluster
from meshlb.model import CallContext

SIZES = (10, 100, 1_000, 10_000)
_NUMBER = 5_000
_REPEAT = 7

_NEW_KEYS = 20_000
"""More than are remembered anywhere, so that none is met again before it is forgotten."""


def run(sizes: tuple[int, ...] = SIZES) -> None:
    print("\npick time in us (best of 7), endpoints with and without a latency history mixed")
    print(f"  {'policy':34} " + " ".join(f"{size:>8}" for size in sizes))
    for name, policy in variants().items():
        fed = name == "prequal"  # without reports its picks are by the calls in flight
        times = [_measured(policy, size, _picking_after_a_report if fed else _picking) for size in sizes]
        print(f"  {name:34} " + " ".join(f"{time:8.2f}" for time in times))
        if fed:
            times = [_measured(policy, size, _reporting) for size in sizes]
            print(f"  {name + ', with taking in the report':34} " + " ".join(f"{time:8.2f}" for time in times))
        if "hash" in name:
            times = [_measured(policy, size, _picking_new_keys) for size in sizes]
            print(f"  {name + ', every key a new one':34} " + " ".join(f"{time:8.2f}" for time in times))
    print("\nlease: pick, begin, close with a success, in us (best of 7)")
    for name in ("round_robin", "least_response_time"):
        print(f"  {name:34} " + " ".join(f"{_measured(name, size, _leasing):8.2f}" for size in sizes))


def _measured(policy: object, size: int, measure: Callable[[Cluster], float]) -> float:
    with mesh_of(policy, size) as mesh:
        cluster = mesh.cluster("service")
        for _ in range(min(2 * size, 2_000)):
            cluster.start().close()
        return measure(cluster) * 1e6


def _best(statement: Callable[[], object], number: int = _NUMBER) -> float:
    return min(timeit.repeat(statement, number=number, repeat=_REPEAT)) / number


def _picking(cluster: Cluster) -> float:
    pick = cluster.view.picker.pick
    context = CallContext(key="192.0.2.42")
    return _best(lambda: pick(context))


def _picking_new_keys(cluster: Cluster) -> float:
    pick = cluster.view.picker.pick
    contexts = [CallContext(key=f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}") for i in range(_NEW_KEYS)]

    def pick_for_each() -> None:
        for context in contexts:
            pick(context)

    return _best(pick_for_each, number=1) / _NEW_KEYS


def _reporting(cluster: Cluster) -> float:
    picker = cluster.view.picker
    context = CallContext()

    def pick_and_report() -> None:
        cluster.observe_report(picker.pick(context), REPORT)  # type: ignore[arg-type]  # there is always one

    return _best(pick_and_report)


def _picking_after_a_report(cluster: Cluster) -> float:
    """A pick as it follows a response, without the taking in of what the response said. One reading of the clock is in
    it."""
    pick, observe, context, clock = cluster.view.picker.pick, cluster.observe_report, CallContext(), perf_counter_ns
    best = inf
    for _ in range(_REPEAT):
        spent = 0
        for _ in range(_NUMBER):
            began = clock()
            picked = pick(context)
            spent += clock() - began
            observe(picked, REPORT)  # type: ignore[arg-type]  # there is always one
        best = min(best, spent / _NUMBER / 1e9)
    return best


def _leasing(cluster: Cluster) -> float:
    def lease() -> None:
        one = cluster.try_start()
        assert one is not None
        one.close()

    return _best(lease)
