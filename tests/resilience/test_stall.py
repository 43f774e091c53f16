"""Standing still is our own trouble: no endpoint is blamed for what timed out meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from meshlb import Breaker, Endpoint, Mesh, Outcome, OutcomeKind, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import AsyncMeshTransport
from meshlb.model import OK, Sent
from meshlb.resilience import Pulse, StallMonitor
from meshlb.resilience.stall import INTERVAL, TOLERANCE
from meshlb.testing import FakeClock
from tests.core.parts import FAILURE, Bench
from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.processes import REPO
from tests.support.wait import eventually, eventually_async

TIMED_OUT = Outcome(OutcomeKind.FAILURE, Sent.MAYBE, retryable=True, reason="ReadTimeout", timed_out=True)


# -- the record


def test_beats_in_time_are_no_stall() -> None:
    pulse, now = Pulse(), 100.0
    for _ in range(50):
        assert pulse.beat(now, now + INTERVAL) == 0
        now += INTERVAL + TOLERANCE
    assert pulse.stalled(0, now) == 0


def test_a_gap_is_a_stall_and_its_part_of_an_attempt_is_known() -> None:
    pulse = Pulse()
    pulse.beat(100, 100.25)
    assert pulse.beat(105.25, 105.5) == 5
    assert pulse.stalled(100, 105.25) == 5
    assert pulse.stalled(103, 105.25) == 2.25
    assert pulse.stalled(105.25, 105.5) == 0
    assert pulse.stalled(99, 106) == 5
    assert pulse.stalled(90, 100) == 0


def test_the_current_stall_counts_before_its_beat_has_come() -> None:
    pulse = Pulse()
    pulse.beat(100, 100.25)
    assert pulse.stalled(100, 100.7) == 0
    assert pulse.stalled(100, 104.25) == 4


def test_who_was_at_work_did_not_stand_still() -> None:
    pulse = Pulse()
    pulse.beat(100, 100.25)
    assert pulse.beat(103, 103.25, busy=2.5) == 0


def test_only_recent_stalls_are_remembered() -> None:
    pulse, now = Pulse(), 0.0
    for _ in range(1000):
        pulse.beat(now, now + INTERVAL)
        now += 2
    assert len(pulse._stalls) == 16


class Timers:
    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    def call_later(self, delay: float, callback: Any) -> object:
        return self.clock.call_later(delay, callback)


def monitor() -> tuple[FakeClock, StallMonitor]:
    clock = FakeClock()
    stalls = StallMonitor(clock)
    stalls.start(Timers(clock))
    clock.advance(5)
    return clock, stalls


def test_an_attempt_is_excused_if_half_of_it_was_not_ours() -> None:
    clock, stalls = monitor()
    started = clock()
    clock._now += 5  # the process is stopped: no timer fires
    assert stalls.excuses(started, clock())
    clock.advance()
    assert stalls.excuses(started, clock())
    assert stalls.excuses(started - 4, clock())
    assert not stalls.excuses(started - 6, clock())  # by then the endpoint had had six seconds for itself
    assert not stalls.excuses(clock() - 0.0, clock())

    async def watch() -> None:
        stalls.watch_running_loop()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(watch())
    assert len(stalls._loops) == 1
    clock.advance(5)
    assert not stalls.excuses(clock() - 1, clock())  # asked outside of any loop while there is one
    loop.close()
    stalls.stop()
    clock.advance(100)
    assert not stalls.excuses(clock() - 1, clock())


# -- what an endpoint's state makes of it


def test_a_timeout_in_a_stall_touches_nothing() -> None:
    bench = Bench()
    bench.owner.stood_still = True
    bench.call(TIMED_OUT, 10, seconds=5)
    node = bench.node
    assert (node.ignored, node.failures, node.last_failure, bench.owner.told) == (10, 0, "", [])
    assert not node.latency.has_history


def test_only_timeouts_are_excused_and_only_long_attempts_are_asked_about() -> None:
    bench = Bench()
    bench.owner.stood_still = True
    bench.call(FAILURE, 2, seconds=5)
    bench.call(TIMED_OUT, 2, seconds=0.1)
    assert (bench.node.failures, bench.node.ignored) == (4, 0)


def test_a_latency_that_was_ours_is_not_the_endpoints() -> None:
    bench = Bench(Breaker(slow_call_duration=1.0, minimum_calls=1))
    bench.call(OK, seconds=0.1)
    bench.owner.stood_still = True
    for answered in (False, True):
        lease = bench.begin()
        bench.clock.advance(5)
        if answered:
            lease.answered()
        lease.close()
        assert lease.latency == 5
    assert bench.node.latency.at(bench.clock()) < 0.2
    assert bench.owner.told == []  # nor was it a slow call


# -- real processes and loops


def states(snapshot: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(snapshot[0]["endpoints"])


@contextlib.contextmanager
def program(kind: str, timeout: float, backends: list[Backend]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.resilience.stopped_program", kind, str(timeout)]
    process = subprocess.Popen(
        [*command, *(backend.address for backend in backends)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    try:
        yield process
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    state: dict[str, Any] = json.loads(process.stdout.readline())
    return state


def progress(process: subprocess.Popen[str], by: int) -> dict[str, Any]:
    """Wait until so many more calls have gone well."""
    goal = ask(process)["good"] + by
    state: dict[str, Any] = {}

    def reached() -> bool:
        state.update(ask(process))
        return bool(state["good"] >= goal)

    eventually(reached, 60, 0.05, message=lambda: str(state))
    return state


def test_a_stopped_process_blames_nobody() -> None:
    """With blocking calls, with tasks, and with gRPC's core."""
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(http_backends(3, delay=0.05))
        grpc = stack.enter_context(grpc_backends(3, delay=0.05))
        processes = [
            stack.enter_context(program(kind, 2.5, servers))
            for kind, servers in (("sync", http), ("async", http), ("grpc", grpc))
        ]
        for process in processes:
            progress(process, 30)
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)  # not a wait for anything: the stop itself, longer than every timeout
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
        for process in processes:
            state = progress(process, 30)
            snapshot = state["snapshot"][0]
            assert snapshot["ejections"] == 0, state
            for row in snapshot["endpoints"]:
                assert (row["state"], row["failures"]) == ("ready", 0), state
                assert row["latency"] < 2.5, state


def blocked(seconds: float) -> None:
    time.sleep(seconds)  # what no coroutine should ever do


@pytest.mark.anyio
async def test_a_blocked_event_loop_blames_nobody(anyio_backend: str) -> None:
    with http_backends(3, delay=0.05) as servers:
        breaker = Breaker(consecutive_failures=3, minimum_calls=5)
        config = ServiceConfig(policy="round_robin", retry=None, breaker=breaker, connect_timeout=10)
        mesh = Mesh(StaticDiscovery({"orders": [server.address for server in servers]}), defaults=config)
        good, errors, over = 0, [], False

        async def run(client: httpx.AsyncClient) -> None:
            nonlocal good
            while not over:
                try:
                    await client.get("http://orders/")
                    good += 1
                except httpx.TransportError as error:
                    errors.append(type(error).__name__)

        async with mesh, httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=2.5) as client:
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(run, client)
                await eventually_async(lambda: good >= 50, 60)
                blocked(4)
                await eventually_async(lambda: good >= 100, 60)
                over = True
            snapshot = mesh.cluster("orders").snapshot()
            assert snapshot["ejections"] == 0, (snapshot, errors)
            for row in snapshot["endpoints"]:
                assert (row["state"], row["failures"]) == ("ready", 0), (snapshot, errors)
                assert row["latency"] < 2.5, snapshot


def test_a_hung_endpoint_is_blamed_all_the_same() -> None:
    with http_backends(1, hang=True) as servers:
        config = ServiceConfig(retry=None, breaker=Breaker(consecutive_failures=2))

        async def main() -> None:
            mesh = Mesh(StaticDiscovery({"orders": [servers[0].address, "127.0.0.1:9"]}), defaults=config)
            async with mesh, httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=0.6) as client:
                cluster = mesh.cluster("orders")
                await cluster.wait_ready_async(20)
                hung = cluster.nodes[0]
                deadline = time.monotonic() + 60
                while hung.failures < 2 and time.monotonic() < deadline:
                    with contextlib.suppress(httpx.TransportError):
                        await client.get("http://orders/")
                assert hung.last_failure == "ReadTimeout"

        asyncio.run(main())


def test_a_loop_is_watched_until_it_is_closed() -> None:
    with http_backends(1) as servers:
        mesh = Mesh(StaticDiscovery({"orders": [servers[0].address]}))

        async def main() -> None:
            async with httpx.AsyncClient(transport=AsyncMeshTransport(mesh)) as client:
                await client.get("http://orders/")
                assert len(stalls._loops) == 1
            async with mesh.cluster("orders").lease():
                assert len(stalls._loops) == 1

        with mesh:
            stalls = mesh._stalls
            asyncio.run(main())
            eventually(lambda: not stalls._loops, 20)


def test_a_loop_that_rests_between_two_runs_was_not_blocked(caplog: pytest.LogCaptureFixture) -> None:
    clock, stalls = monitor()

    async def call() -> bool:
        stalls.watch_running_loop()
        started = clock()
        for _ in range(8):
            clock.advance(INTERVAL)
            await asyncio.sleep(0)
        return stalls.excuses(started, clock())

    async def leave_a_question_open() -> None:
        clock.advance(INTERVAL)
        assert next(iter(stalls._loops.values())).due is not None

    loop = asyncio.new_event_loop()
    with caplog.at_level(logging.DEBUG, "meshlb.stall"):
        for _ in range(3):
            assert not loop.run_until_complete(call())
            loop.run_until_complete(leave_a_question_open())
            clock.advance(100)
    assert caplog.messages == []
    loop.close()
    clock.advance(1)
    assert len(stalls._loops) == 0


# -- the other local troubles


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL])
def test_whatever_this_process_runs_out_of_is_ignored(code: int) -> None:
    mesh = Mesh(StaticDiscovery({"orders": [Endpoint("127.0.0.1", 1)]}))
    with mesh:
        cluster = mesh.cluster("orders")
        for _ in range(20):
            with contextlib.suppress(OSError), cluster.lease():
                raise OSError(code, os.strerror(code))
        (node,) = cluster.nodes
        assert (node.ignored, node.failures, node.standing.value) == (20, 0, "ready")


def test_a_pool_timeout_and_a_cancelled_call_are_ignored() -> None:
    """The other local troubles (EMFILE in a real process, serialisation, bodies): tests/http, tests/grpc."""
    with http_backends(1, delay=0.3) as servers:
        mesh = Mesh(StaticDiscovery({"orders": [servers[0].address]}), defaults=ServiceConfig(retry=None))

        async def main() -> None:
            transport = AsyncMeshTransport(mesh, limits=httpx.Limits(max_connections=1))
            async with httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(30, pool=0.01)) as client:
                results = await asyncio.gather(
                    *(client.get("http://orders/") for _ in range(10)), return_exceptions=True
                )
                assert sum(isinstance(result, httpx.PoolTimeout) for result in results) == 9
                task = asyncio.create_task(client.get("http://orders/"))
                await eventually_async(lambda: mesh.cluster("orders").nodes[0].in_flight, 20)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        with mesh:
            asyncio.run(main())
            (node,) = mesh.cluster("orders").nodes
            assert (node.ignored, node.failures, node.successes, node.in_flight) == (10, 0, 1, 0)
