from __future__ import annotations

import asyncio
import contextvars
import gc
import importlib
import os
import resource
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from meshlb import control
from meshlb.control import ControlLoop
from tests.support.wait import eventually


@pytest.fixture
def loop() -> Iterator[ControlLoop]:
    loop = control.acquire()
    yield loop
    control.release(loop, lambda: None)
    loop.join(5)


def test_one_loop_for_all_and_it_ends_with_the_last() -> None:
    first, second = control.acquire(), control.acquire()
    assert first is second
    ended: list[str] = []
    control.release(first, partial(ended.append, "first"))
    assert ended == ["first"]
    assert second.alive
    control.release(second, partial(ended.append, "second"))
    second.join(5)
    assert ended == ["first", "second"]
    assert not second.alive
    third = control.acquire()
    assert third is not first
    control.release(third, lambda: None)
    third.join(5)


def test_calls_are_made_on_the_thread_in_order(loop: ControlLoop) -> None:
    made: list[Any] = []
    for number in range(100):
        assert loop.call_soon(made.append, number)
    loop.call_soon(lambda: made.append(threading.current_thread().name))
    eventually(lambda: len(made) == 101)
    assert made == [*range(100), "meshlb-control"]


def test_timers(loop: ControlLoop) -> None:
    fired: list[str] = []
    loop.call_later(0.02, lambda: fired.append("second"))
    loop.call_later(-5, lambda: fired.append("first"))
    cancelled = loop.call_later(0.01, lambda: fired.append("cancelled"))
    cancelled.cancel()
    cancelled.cancel()
    loop.call_later(0.03, lambda: fired.append("third"))
    eventually(lambda: "third" in fired)
    assert fired == ["first", "second", "third"]


def test_a_callback_that_raises_stops_nothing(loop: ControlLoop, caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []
    loop.call_soon(lambda: 1 / 0)
    loop.call_soon(made.append, 1)
    eventually(lambda: made)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_an_exit_on_the_control_loop_ends_nothing(
    loop: ControlLoop, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[int] = []

    def leave() -> None:
        raise error

    loop.call_soon(leave)
    loop.call_soon(made.append, 1)
    eventually(lambda: made)
    assert "goes on" in caplog.text


def test_a_task_says_when_it_is_done(loop: ControlLoop, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("mine")

    def unstartable() -> Any:
        raise ValueError("not even started")

    assert loop.run(lambda: asyncio.sleep(0), "good").done.wait(5)
    assert loop.run(fail, "bad").done.wait(5)
    assert "bad ended with an error" in caplog.text
    assert loop.run(unstartable, "worse").done.wait(5)
    endless = loop.run(lambda: asyncio.sleep(3600), "endless")
    endless.cancel()
    endless.cancel()
    assert endless.done.wait(5)


def test_the_callers_context_does_not_stay_in_the_loop(loop: ControlLoop) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    variable.set("the first request's")
    seen: list[str] = []
    loop.call_soon(lambda: seen.append(variable.get()))
    eventually(lambda: seen)
    assert seen == ["nothing"]


def test_after_its_end_nothing_is_taken_and_nothing_hangs() -> None:
    loop = control.acquire()
    control.release(loop, lambda: None)
    loop.join(5)
    assert not loop.call_soon(print)
    assert loop.run(lambda: asyncio.sleep(0), "late").done.wait(5)
    loop.call_later(0, print).cancel()
    finished: list[int] = []
    control.shut_down(loop, (), lambda: asyncio.sleep(0), partial(finished.append, 1))
    assert finished == [1]


def test_shutting_down_cancels_closes_and_releases_in_this_order() -> None:
    loop = control.acquire()
    steps: list[str] = []
    running = threading.Event()

    async def watch() -> None:
        try:
            running.set()
            await asyncio.sleep(3600)
        finally:
            steps.append("watch ended")

    async def close() -> None:
        steps.append("closed")

    task = loop.run(watch, "watch")
    assert running.wait(5)
    control.shut_down(loop, [task], close, partial(steps.append, "finished"))
    eventually(lambda: "finished" in steps)
    assert steps == ["watch ended", "closed", "finished"]
    loop.join(5)
    assert not loop.alive


def test_a_close_that_fails_is_logged_and_releases_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    loop = control.acquire()
    finished = threading.Event()

    async def close() -> None:
        raise ValueError("mine")

    control.shut_down(loop, [], close, finished.set)
    assert finished.wait(5)
    assert "closing a discovery failed" in caplog.text
    loop.join(5)


# asyncio's half-made loop cannot finalise itself, which pytest needs a file of its own to say.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_file_descriptor_left_is_the_callers_error_and_later_it_works() -> None:
    importlib.import_module("tracemalloc")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            control.acquire()  # must not wait for a thread that could not begin
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken[0])
    loop = control.acquire()
    control.release(loop, lambda: None)
    loop.join(5)


def test_weakly_keeps_nothing_alive() -> None:
    class Subject:
        pass

    called: list[tuple[object, ...]] = []
    first, second = Subject(), Subject()
    call = control.weakly(lambda *subjects: called.append(subjects), first, second)
    call()
    assert called == [(first, second)]
    called.clear()
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None
    call()
    assert called == []


def test_parking_brings_the_thread_to_rest(loop: ControlLoop) -> None:
    made: list[int] = []
    resume = loop.park()
    loop.call_soon(made.append, 1)
    assert not threading.Event().wait(0.05)
    assert made == []
    resume.set()
    eventually(lambda: made)


def test_parking_from_the_thread_itself_does_not_wait_for_it(loop: ControlLoop) -> None:
    parked: list[threading.Event] = []
    loop.call_soon(lambda: parked.append(loop.park()))
    eventually(lambda: parked, timeout=2)


def test_many_threads_acquire_and_release() -> None:
    def use() -> None:
        for _ in range(50):
            loop = control.acquire()
            seen = threading.Event()
            assert loop.call_soon(seen.set)
            assert seen.wait(10)
            control.release(loop, lambda: None)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert control._current is None
