from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from meshlb.waiting import Signal
from tests.support.wait import eventually, eventually_async


def thread(target: Callable[[], Any]) -> threading.Thread:
    started = threading.Thread(target=target)
    started.start()
    return started


def test_all_threads_wake() -> None:
    signal = Signal()
    woken: list[bool] = []
    threads = [thread(lambda: woken.append(signal.wait(60))) for _ in range(8)]
    eventually(lambda: len(signal._callbacks) == 8)
    signal.set()
    signal.set()
    for waiter in threads:
        waiter.join()
    assert woken == [True] * 8
    assert signal.wait(None)
    assert signal.is_set()


def test_a_timeout_leaves_nothing_behind() -> None:
    signal = Signal()
    assert not signal.wait(0.01)
    assert not signal.wait(0)
    assert not signal.wait(-1)
    assert not signal._callbacks


@pytest.mark.parametrize("timeout", [None, 1e300, float("inf")])
def test_waiting_for_ever(timeout: float | None) -> None:
    signal = Signal()
    woken: list[bool] = []
    waiter = thread(lambda: woken.append(signal.wait(timeout)))
    eventually(lambda: signal._callbacks)
    signal.set()
    waiter.join()
    assert woken == [True]


def test_then_is_called_once_at_once_or_later() -> None:
    signal = Signal()
    called: list[str] = []
    signal.then(lambda: called.append("later"))
    assert called == []
    signal.set()
    signal.set()
    signal.then(lambda: called.append("at once"))
    assert called == ["later", "at once"]


async def test_tasks_wake_from_another_thread() -> None:
    signal = Signal()
    woken: list[bool] = []

    async def wait() -> None:
        woken.append(await signal.wait_async(60))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(wait)
        await eventually_async(lambda: len(signal._callbacks) == 5)
        setter = thread(signal.set)
    setter.join()
    assert woken == [True] * 5
    assert await signal.wait_async(None)


async def test_a_tasks_timeout_and_cancellation_leave_nothing_behind() -> None:
    signal = Signal()
    assert not await signal.wait_async(0.01)
    assert not await signal.wait_async(-1)
    async with anyio.create_task_group() as group:
        group.start_soon(signal.wait_async, None)
        group.start_soon(signal.wait_async, 1e300)
        await eventually_async(lambda: len(signal._callbacks) == 2)
        group.cancel_scope.cancel()
    assert not signal._callbacks


def test_a_signal_outlives_the_loops_that_waited_for_it(anyio_backend: str) -> None:
    signal = Signal()
    wakers: list[Callable[[], None]] = []

    async def leave_a_waker() -> None:
        from meshlb.waiting import _waker

        wakers.append(_waker(anyio.Event()))

    anyio.run(leave_a_waker, backend=anyio_backend)
    signal.then(wakers[0])
    signal.set()  # neither "loop is closed" nor "run finished" gets out


def test_set_and_wait_race() -> None:
    for _ in range(300):
        signal = Signal()
        waiter = thread(lambda signal=signal: signal.wait(60))  # type: ignore[misc]
        signal.set()
        waiter.join(60)
        assert not waiter.is_alive()
