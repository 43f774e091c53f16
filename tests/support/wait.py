"""Wait for a condition with a deadline: the only way a test waits."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    predicate: Callable[[], T | None],
    timeout: float = 10.0,
    interval: float = 0.01,
    message: str | Callable[[], str] = "",
) -> T:
    """Call `predicate` every `interval` seconds until it is truthy and return that value.

    AssertionError after `timeout` seconds, with `message` (a callable is asked only then) and the last value. What the
    predicate raises passes through: a predicate that may fail for a while says so itself.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(_failure(timeout, message, value))
        time.sleep(interval)


async def eventually_async(
    predicate: Callable[[], T | Awaitable[T | None] | None],
    timeout: float = 10.0,
    interval: float = 0.01,
    message: str | Callable[[], str] = "",
) -> T:
    """The twin of `eventually` for asyncio and trio; `predicate` may be a coroutine function."""
    import anyio  # here, because servers that start fast import this module too

    deadline = time.monotonic() + timeout
    while True:
        result = predicate()
        value: T | None = await result if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(_failure(timeout, message, value))
        await anyio.sleep(interval)


def _failure(timeout: float, message: str | Callable[[], str], value: object) -> str:
    said = message() if callable(message) else message
    return f"not true after {timeout:g} s{': ' if said else ''}{said} (last value: {value!r})"
