"""Interleaved measurement: the variants take turns in small batches, so that a machine whose speed drifts is fair to
all of them, and only ratios and differences of medians are worth quoting."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Seconds per call, one entry a batch."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float, calls: int) -> None:
        self.wall.append(wall / calls)
        self.cpu.append(cpu / calls)


def interleave(variants: dict[str, Callable[[], object]], *, rounds: int, batch: int) -> dict[str, Samples]:
    """Run each variant ``batch`` times in each of ``rounds`` rounds, after one round of warm-up."""
    samples = {name: Samples() for name in variants}
    for turn in range(rounds + 1):
        order = list(variants.items())
        if turn % 2:
            order.reverse()
        gc.collect()  # once a round: it would leave each variant's first calls with cold caches
        for name, call in order:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(batch):
                call()
            if turn:
                samples[name].add(time.perf_counter() - wall, time.process_time() - cpu, batch)
    return samples


async def interleave_async(
    variants: dict[str, Callable[[], Awaitable[object]]], *, rounds: int, batch: int
) -> dict[str, Samples]:
    """``interleave`` for coroutines, on the running loop, one call at a time."""
    samples = {name: Samples() for name in variants}
    for turn in range(rounds + 1):
        order = list(variants.items())
        if turn % 2:
            order.reverse()
        gc.collect()  # once a round: it would leave each variant's first calls with cold caches
        for name, call in order:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(batch):
                await call()
            if turn:
                samples[name].add(time.perf_counter() - wall, time.process_time() - cpu, batch)
    return samples


def report(title: str, samples: dict[str, Samples]) -> None:
    """Print a line a variant; the first one is what the others are compared with."""
    names = list(samples)
    bare_wall = statistics.median(samples[names[0]].wall)
    bare_cpu = statistics.median(samples[names[0]].cpu)
    print(f"\n{title}")
    print(f"  {'':34} {'wall us':>9} {'ratio':>7} {'cpu us':>9} {'ratio':>7} {'added cpu us':>13}")
    for name in names:
        wall = statistics.median(samples[name].wall)
        cpu = statistics.median(samples[name].cpu)
        extra = "" if name == names[0] else f"{(cpu - bare_cpu) * 1e6:13.1f}"
        print(f"  {name:34} {wall * 1e6:9.1f} {wall / bare_wall:7.3f} {cpu * 1e6:9.1f} {cpu / bare_cpu:7.3f} {extra}")
