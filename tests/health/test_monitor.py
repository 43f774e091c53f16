"""The checks of a whole service, in virtual time: their pace, their number, who is checked and who no longer."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from opentelemetry import context as otel_context

from meshlb import Cluster, Endpoint, FunctionCheck
from meshlb.health import Health
from meshlb.health.monitor import MOST_AT_ONCE, HealthMonitor
from tests.core.parts import bare, endpoint
from tests.health.virtual_time import VirtualLoop, run


class Checks:
    """The function that checks, and the log of its calls."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.counts: Counter[str] = Counter()
        self.running: list[str] = []
        self.most = 0
        self.takes = 0.01
        self.verdict: Callable[[Endpoint], bool] = lambda endpoint: True

    async def __call__(self, endpoint: Endpoint) -> bool:
        self.starts.append(asyncio.get_running_loop().time())
        self.counts[endpoint.id] += 1
        self.running.append(endpoint.id)
        self.most = max(self.most, len(self.running))
        try:
            await asyncio.sleep(self.takes)
        finally:
            self.running.remove(endpoint.id)
        return self.verdict(endpoint)

    def most_in(self, window: float) -> int:
        return max(bisect_left(self.starts, time + window) - place for place, time in enumerate(self.starts))


class Background:
    """A control loop as a cluster sees it: the running one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        self._loop.call_soon(callback, *args)
        return True

    def call_later(self, delay: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        return self._loop.call_later(delay, callback)


class Rig:
    """A cluster without a mesh, and its monitor."""

    def __init__(self, count: int, **options: Any) -> None:
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, VirtualLoop)
        self.checks = Checks()
        self.cluster: Cluster = bare(
            self.loop.time,
            Background(),
            health_check=FunctionCheck(self.checks, name="check", **options),
            panic_threshold=0,
        )
        self.cluster.update([endpoint(number) for number in range(count)])
        check = self.cluster.config.health_check
        assert check is not None
        self.monitor = self.cluster.monitor = HealthMonitor(check, self.cluster, Random(1))
        self.task = self.loop.create_task(self.monitor.run())

    def set(self, numbers: Any, **fields: Any) -> None:
        self.cluster.update([endpoint(number, **fields) for number in numbers])

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        assert not self.checks.running


def test_ten_thousand_endpoints_without_a_burst():
    async def main() -> None:
        rig = Rig(10_000, interval=100, unhealthy_threshold=1)
        await asyncio.sleep(110)
        assert set(rig.checks.counts.values()) <= {1, 2}
        assert len(rig.checks.counts) == 10_000
        for window in (0.01, 0.1, 1.0, 10.0):
            assert rig.checks.most_in(window) <= 100 * (window + 0.05) + 1
        # All go bad at once: they are asked more often, and still no faster.
        rig.checks.verdict = lambda endpoint: False
        rig.checks.starts.clear()
        await asyncio.sleep(15)
        assert rig.checks.most_in(1.0) <= 106
        assert len(rig.checks.starts) >= 14 * 100
        assert sum(node.is_unhealthy for node in rig.cluster.nodes) > 1200
        await rig.end()

    run(main())


def test_checks_that_hang_do_not_pile_up():
    async def main() -> None:
        rig = Rig(500, max_rate=1000, timeout=5, unhealthy_threshold=1)
        rig.checks.takes = 3600
        await asyncio.sleep(30)
        assert rig.checks.most == MOST_AT_ONCE
        assert len(rig.checks.counts) == 500
        assert rig.cluster.nodes[0].health.describe(rig.loop.time()).startswith("check: no answer in 5000 ms")
        await rig.end()

    run(main())


def test_slower_without_traffic_and_faster_again_with_it():
    async def main() -> None:
        rig = Rig(50, interval=10, no_traffic_interval=60)
        await asyncio.sleep(60)
        assert min(rig.checks.counts.values()) >= 5
        await asyncio.sleep(60)  # the last that were due within the interval
        rig.checks.counts.clear()
        await asyncio.sleep(600)
        assert max(rig.checks.counts.values()) <= 12 and len(rig.checks.counts) == 50
        rig.cluster.start().close()
        await asyncio.sleep(22)  # one interval until that is seen, one until everybody had a turn
        rig.checks.counts.clear()
        await asyncio.sleep(30)
        assert min(rig.checks.counts.values()) >= 2 and len(rig.checks.counts) == 50
        await rig.end()

    run(main())


def test_sooner_while_in_doubt():
    async def main() -> None:
        rig = Rig(2, interval=100, unhealthy_interval=2, jitter=0)
        rig.checks.verdict = lambda endpoint: endpoint.id != "i1"
        await asyncio.sleep(20)
        assert rig.checks.counts["i0"] == 1 and rig.checks.counts["i1"] >= 9
        node = rig.cluster.nodes[1]
        assert node.is_unhealthy and node not in rig.cluster.view.nodes
        rig.checks.verdict = lambda endpoint: True
        await asyncio.sleep(5)
        assert not node.is_unhealthy and node in rig.cluster.view.nodes
        rig.checks.counts.clear()
        await asyncio.sleep(50)
        assert rig.checks.counts["i1"] == 0
        await rig.end()

    run(main())


def test_who_leaves_is_checked_no_more_and_who_comes_is():
    async def main() -> None:
        rig = Rig(4, interval=10)
        await asyncio.sleep(5)
        assert set(rig.checks.counts) == {"i0", "i1", "i2", "i3"}
        rig.checks.takes = 0.9
        await asyncio.sleep(10)
        while not rig.checks.running:
            await asyncio.sleep(0.1)
        rig.set([7, 8])
        await asyncio.sleep(0.01)
        assert not set(rig.checks.running) & {"i0", "i1", "i2", "i3"}  # what was under way has been cancelled
        rig.checks.takes = 0.01
        rig.checks.counts.clear()
        await asyncio.sleep(60)
        assert set(rig.checks.counts) == {"i7", "i8"}
        rig.set([1, 7])
        rig.checks.counts.clear()
        await asyncio.sleep(1)
        assert set(rig.checks.counts) <= {"i1", "i7"} and rig.checks.counts["i1"] == 1
        rig.set([])
        rig.checks.counts.clear()
        await asyncio.sleep(600)
        assert not rig.checks.counts
        await rig.end()

    run(main())


def test_what_changes_in_place_reaches_the_function_and_disturbs_nothing():
    async def main() -> None:
        rig = Rig(1, interval=10, jitter=0)
        seen = []
        rig.checks.verdict = lambda endpoint: bool(seen.append(endpoint.weight) or True)
        await asyncio.sleep(25)
        rig.set([0], weight=7)
        await asyncio.sleep(10)
        assert seen == [1, 1, 1, 7]
        await rig.end()

    run(main())


def test_outside_the_subset_nobody_is_checked():
    async def main() -> None:
        rig = Rig(2, interval=1)
        rig.cluster.nodes[0].leave_subset()
        await asyncio.sleep(10)
        assert set(rig.checks.counts) == {"i1"}
        rig.cluster.nodes[0].enter_subset()
        await asyncio.sleep(2)
        assert set(rig.checks.counts) == {"i0", "i1"}
        await rig.end()

    run(main())


def test_a_process_that_stood_still_blames_nobody():
    async def main() -> None:
        rig = Rig(3, interval=10, timeout=1, unhealthy_threshold=1)
        rig.checks.takes = 0.5
        while len(rig.checks.running) < 3:
            await asyncio.sleep(0.01)
        rig.loop.jump(30)  # SIGSTOP, for instance
        await asyncio.sleep(0.1)
        healths = [node.health for node in rig.cluster.nodes]
        assert [health.health for health in healths] == [Health.UNKNOWN] * 3
        assert "this process stood still for 3" in healths[0].describe(rig.loop.time())
        await asyncio.sleep(10)
        assert [health.health for health in healths] == [Health.HEALTHY] * 3
        rig.checks.takes = 3600  # while an endpoint that does not answer in time is to blame
        await asyncio.sleep(12)
        assert [health.health for health in healths] == [Health.UNHEALTHY] * 3
        await rig.end()

    run(main())


def test_the_first_checks_are_waited_for():
    async def main() -> None:
        rig = Rig(3, interval=10, wait_first=True)
        assert rig.cluster.try_start() is None
        assert {row["state"] for row in rig.cluster.snapshot()["endpoints"]} == {"unchecked"}
        rig.checks.verdict = lambda endpoint: endpoint.id == "i1"
        lease = await rig.cluster.start_async()
        assert lease.endpoint.id == "i1"
        lease.close()
        await asyncio.sleep(1)
        assert [node.standing.value for node in rig.cluster.nodes] == ["unhealthy", "ready", "unhealthy"]
        await rig.end()

    run(main())


@pytest.mark.parametrize("on_success", [True, False])
def test_a_passed_check_has_an_open_breaker_probed(on_success):
    async def main() -> None:
        rig = Rig(2, interval=1, probe_on_success=on_success)
        node = rig.cluster.nodes[0]
        with node.lock:
            node.breaker.open(rig.loop.time(), "5 consecutive failures")
            node.breaker.retry_at = rig.loop.time() + 3600
        rig.cluster.refresh()
        await asyncio.sleep(2)
        assert node.standing.value == ("half_open" if on_success else "open")
        assert (node in rig.cluster.view.nodes) is on_success
        await rig.end()

    run(main())


def test_no_check_is_traced():
    async def main() -> None:
        seen = []
        rig = Rig(1)
        rig.checks.verdict = lambda endpoint: bool(seen.append(otel_context.get_value("suppress_instrumentation")) or 1)
        await asyncio.sleep(1)
        assert seen == [True]
        await rig.end()

    run(main())
