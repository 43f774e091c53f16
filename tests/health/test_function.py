"""Checks by functions of the program's own."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading

import pytest

from meshlb import Endpoint, FunctionCheck
from tests.health.checked import SECONDS, checked
from tests.support.wait import eventually

ADDRESS = "10.0.0.1:80"
ENDPOINT = Endpoint("10.0.0.1", 80, meta={"role": "primary"})


def is_primary(endpoint: Endpoint) -> bool:
    return endpoint.meta["role"] == "primary"


async def is_primary_too(endpoint: Endpoint) -> bool:
    await asyncio.sleep(0)
    return is_primary(endpoint)


class Callable:
    async def __call__(self, endpoint: Endpoint) -> None:
        assert threading.current_thread().name == "meshlb-control"


@pytest.mark.parametrize(
    ("function", "label"),
    [
        (is_primary, "is_primary"),
        (is_primary_too, "is_primary_too"),
        (functools.partial(is_primary), "partial"),
        (functools.partial(is_primary_too), "partial"),
        (lambda endpoint: is_primary_too(endpoint), ".*<lambda>"),
        (Callable(), "Callable"),
        (lambda endpoint: None, ".*<lambda>"),
    ],
)
def test_functions_that_pass(function, label):
    with checked(FunctionCheck(function), ENDPOINT) as service:
        service.until(ADDRESS, "ready", rf"^{label}: passed in \d+ ms, ")


def raising(error: BaseException):
    def function(endpoint):
        raise error

    return function


async def raising_too(endpoint):
    raise ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda endpoint: False, "returned False in"),
        (lambda endpoint: 1, "returned 1 in"),
        (lambda endpoint: "replication lag is 40 s", "replication lag is 40 s in"),
        (raising(ValueError("no quorum")), "no quorum in"),
        (raising(KeyError()), "KeyError in"),
        (raising(StopIteration(1)), "StopIteration: 1 in"),
        (raising(SystemExit(3)), "SystemExit: 3 in"),
        (raising_too, "connection refused in"),
        (lambda endpoint: raising_too(endpoint), "connection refused in"),
    ],
)
def test_functions_that_fail(function, words):
    with checked(FunctionCheck(function, name="mine"), ENDPOINT) as service:
        service.until(ADDRESS, "unhealthy", f"^mine: {words}")


def test_what_is_no_endpoints_fault_changes_nothing():
    calls = []

    def no_descriptors(endpoint):
        calls.append(endpoint)
        raise OSError(24, "Too many open files")

    with checked(FunctionCheck(no_descriptors, unhealthy_threshold=1), ENDPOINT) as service:
        eventually(lambda: len(calls) > 5, SECONDS)
        service.until(ADDRESS, "ready", "too many open files in")


def test_a_function_that_hangs_is_not_called_twice_at_once_and_holds_up_nobody():
    release, running, most, lock = threading.Event(), [0], [0], threading.Lock()

    def hang(endpoint):
        if endpoint.host == "10.0.0.2":
            return True
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        release.wait(60)
        with lock:
            running[0] -= 1
        return True

    check = FunctionCheck(hang, name="hang", timeout=0.1, unhealthy_threshold=2)
    with checked(check, ENDPOINT, "10.0.0.2:80") as service:
        service.until(ADDRESS, "unhealthy", "hang: an earlier call still runs in")
        service.until("10.0.0.2:80", "ready", "passed")
        assert most[0] == 1
        release.set()
        service.until(ADDRESS, "ready", "passed in")
    release.set()


def test_an_async_function_that_hangs_is_cancelled():
    cancelled = []

    async def hang(endpoint):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(endpoint)
            raise

    with checked(FunctionCheck(hang, timeout=0.1, unhealthy_threshold=2), ENDPOINT) as service:
        service.until(ADDRESS, "unhealthy", "no answer in")
        assert len(cancelled) >= 2


def test_a_function_may_exit_on_the_control_loop_and_checks_go_on(caplog):
    calls = []

    async def leave(endpoint):
        calls.append(endpoint)
        if len(calls) == 1:
            sys.exit(1)

    with checked(FunctionCheck(leave), ENDPOINT) as service:
        service.until(ADDRESS, "ready", "passed in")
        assert len(calls) >= 2
